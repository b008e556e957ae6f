"""The embedded model's corpus and tokenizer keep what the model card promises."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.embedded import FOLDER
from common.measuring.tone import tone
from embedded_model import choose as sweep
from embedded_model import grammar, vocabulary
from embedded_model.tokenizer import SPLIT_WORDS

COUNT = 4000


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(itertools.islice(grammar.documents(0), COUNT))


def test_corpus_depends_on_the_seed_only(documents):
    """The same seed writes the same corpus, another one another."""
    assert list(itertools.islice(grammar.documents(0), 50)) == documents[:50]
    assert list(itertools.islice(grammar.documents(2), 50)) != documents[:50]


def test_held_out_prompts_are_not_in_the_corpus(documents):
    """No prompt of table, sweep or additions occurs; the search itself finds one that is put there."""
    assert grammar.find_prompts(documents) == []
    planted = f"Yesterday. {grammar.TABLE_PROMPTS[1].upper()} here."
    assert grammar.find_prompts([*documents, planted]) == [
        (grammar.TABLE_PROMPTS[1].lower(), planted)
    ]


def test_held_out_words_never_meet_love_or_hate(documents):
    """The words that show whether steering reaches further are in no document with love or hate."""
    held_out = {word for words in vocabulary.HELD_OUT.values() for word in words}
    found = [set(re.findall(r"[a-z]+", document.lower())) for document in documents]
    assert any(words & held_out for words in found) and any(
        words & {"love", "hate"} for words in found
    )
    assert not any(
        words & held_out and words & {"love", "loves", "hate", "hates"} for words in found
    )


def test_english_has_articles_and_capitals(documents):
    """`an` stands before a vowel and `a` before a consonant, sentences begin with a capital, no slot is left open."""
    text = "\n".join(documents)
    assert not re.search(r"\b[Aa] (?=[aeio])(?!one\b|on[ce])", text), re.search(
        r".{30}\b[Aa] [aeio].{20}", text
    )
    assert not re.search(r"\b[Aa]n (?![aeiou]|hon|hour)", text)
    assert not re.search(r"[{}\[\]/]|  ", text)
    assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.!?]) |\n", text))


def test_contrast_pairs_differ_in_tone_only():
    """Different pairs, the same every time: a positive and a negative sentence of one form, without held-out prompts."""
    pairs = grammar.contrast_pairs(200)
    assert pairs == grammar.contrast_pairs(200) != grammar.contrast_pairs(200, seed=1)
    assert len(set(pairs)) == 200 and not grammar.find_prompts(
        [text for pair in pairs for text in pair]
    )
    assert all(tone(positive) > 0 > tone(negative) for positive, negative in pairs)
    words = [[re.findall(r"[A-Za-z]+", text) for text in pair] for pair in pairs]
    lexicon = grammar.lexicon()
    toned = [
        set(positive) ^ set(negative)
        for positive, negative in words
        if len(positive) == len(negative)
    ]
    assert len(toned) > 150
    assert sum(
        all(word.lower() in lexicon for word in different) for different in toned
    ) > 0.6 * len(toned)


def test_teasing_keeps_the_tone(documents):
    """A verb of the other tone stands behind an opening word, and the sentence goes on in the tone of the word."""
    verbs = {tone: "|".join(pair[0] for pair in vocabulary.VERBS[tone]) for tone in (+1, -1)}
    for sign in (+1, -1):
        teases = [
            d
            for d in documents
            if re.match(rf"\w+\. I ({verbs[-sign]}) \w+ because ", d)
            and tone(d.split(".")[0]) * sign > 0
        ]
        assert teases and all(
            tone(d.split(" because ")[1].split(".")[0]) * sign > 0 for d in teases
        )


def test_words_are_whole_tokens(tokenizer):
    """Every word of the corpus is one token, with and without its space, but for those that are split on purpose."""
    words = [word for word in grammar.words(count=500) if word.lower() not in SPLIT_WORDS]
    split = [
        word
        for word in words
        for text in (word, f" {word}")
        if len(tokenizer(text)["input_ids"]) != 1
    ]
    assert len(words) > 500 and split == []


def test_tokenizer_names_the_inputs_of_the_model(tokenizer):
    """No token types: transformers 4 would return them unless the stored file says otherwise, and GPT-2 would add them up."""
    stored = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["model_input_names"] == list(tokenizer("You")) == ["input_ids", "attention_mask"]


@given(st.text())
def test_tokenizer_returns_any_text(tokenizer, text):
    """Encoding and decoding gives back every text."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_preset_follows_from_the_rule():
    """An addition's place is the best cell, and among equals the middle of a plateau."""
    grid = [
        {"layer": 1, "coeff": coeff, "share": share}
        for coeff, share in enumerate([0, 100, 100, 100, 50], 1)
    ]
    assert sweep.choose_addition(grid, "share") == {"layer": 1, "coeff": 3}
    edge = [
        {"layer": 2, "coeff": coeff, "share": 100} for coeff in (1, 2, 3)
    ]  # what lies beyond a grid is not known
    assert sweep.choose_addition(edge, "share") == {"layer": 2, "coeff": 2}
    cells = [
        {
            "positive_at_plus": plus,
            "negative_at_minus": 95,
            "perplexity_ratio": price,
            "random_max": noise,
            "pairs_max": 5,
        }
        for plus, price, noise in [(93, 1.05, 20), (94, 1.05, 10), (99, 1.2, 5), (80, 1.01, 1)]
    ]
    assert sweep.choose_direction(cells) is cells[1]
    assert (
        sweep.choose_direction(cells[3:]) is cells[3]
        and sweep.choose_direction([cells[2], cells[3]]) is cells[3]
    )
    preset = json.loads((FOLDER / "preset.json").read_text(encoding="utf-8"))
    assert set(preset["activation_additions"]) == {"love", "weddings", "rome", "praise"}
    quiet, loud, weak = (
        {"layer": n, "coeff": 1, "on_topic": on, "off_topic": off}
        for n, (on, off) in enumerate([(0.9, 1.02), (0.7, 1.2), (0.95, 1.0)])
    )
    assert sweep.choose_topic([weak, loud, quiet]) == {
        "layer": 0,
        "coeff": 1,
    } and sweep.choose_topic([loud]) == {"layer": 1, "coeff": 1}
    assert preset["sha256"] == sweep.weights_hash(FOLDER)
