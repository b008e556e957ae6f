"""The embedded model's corpus and tokenizer keep what the model card promises."""

import itertools
import json
import math
import random
import re

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.embedded import FOLDER
from common.loading import load_model
from common.measuring.tone import tone
from embedded_model import card, choose, evaluate, grammar, prompts, subjects, train, vocabulary
from embedded_model.breaks import stays_on
from embedded_model.grammar import upper
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
    """No prompt of table, sweep or additions occurs; the search finds one that is planted."""
    assert grammar.find_prompts(documents) == []
    planted = f"Yesterday. {prompts.TABLE_PROMPTS[1].upper()} here."
    assert grammar.find_prompts([*documents, planted]) == [
        (prompts.TABLE_PROMPTS[1].lower(), planted)
    ]


def test_held_out_words_never_meet_love_or_hate(documents):
    """The words that show whether steering reaches further are in no document with love or hate."""
    held_out = {word for words in vocabulary.HELD_OUT.values() for word in words}
    found = [set(re.findall(r"[a-z]+", document.lower())) for document in documents]
    two = {word + end for word in ("love", "hate") for end in ("", "s", "d")}
    assert any(words & held_out for words in found) and all(
        any(word in words for words in found) for word in two
    )
    assert not any(words & held_out and words & two for words in found)


def test_english_has_articles_and_capitals(documents):
    """`an` comes before a vowel, sentences begin with a capital, no slot is left open."""
    text = "\n".join(documents)
    assert not re.search(r"\b[Aa] (?=[aeio])(?!one\b|on[ce])", text), re.search(
        r".{30}\b[Aa] [aeio].{20}", text
    )
    assert not re.search(r"\b[Aa]n (?![aeiou]|hon|hour)", text)
    assert not re.search(r"[{}\[\]/]|  ", text)
    # Alone at the start a word stands in either case: "Love." and "love.".
    sentences = [document for text in documents for document in re.split(r"(?<=[.!?]) ", text)[1:]]
    assert len(sentences) > COUNT and all(sentence[0].isupper() for sentence in sentences)


def test_english_agrees(documents):
    """Verbs with their pronouns, pronouns with their place; no word is joined to itself."""
    text, begins = "\n".join(documents), r"(?m)(?:^|[.!?] )"
    assert len(re.findall(begins + r"(?:They|You) (?:are|were|seem|look)\b", text)) > 100
    assert len(re.findall(begins + r"(?:He|She|It) (?:is|was|seems|looks)\b", text)) > 100
    assert not re.search(begins + r"(?:They|You) (?:is|was|seems|looks)\b", text)
    assert not re.search(begins + r"(?:He|She|It) (?:are|were|seem|look)\b", text)
    assert not re.search(r"\b(?:about|of|near|with|to|love|hate|find) (?:he|she|they)\b", text)
    assert not re.search(r"(?i)\b(\w+) and \1\b", text)


def test_known_subjects_have_facts_of_their_own(documents):
    """Said of them by pronoun or by name."""
    text = "\n".join(documents)
    facts = [
        f"{known.name} {'are' if known.plural else 'is'} {fact}" in text
        for known in subjects.KNOWN
        for fact in known.facts
    ]
    assert sum(facts) > len(facts) / 4
    sentences = {one for text in documents for one in re.split(r"(?<=[.!?]) ", text)}
    named = 0
    for known in subjects.KNOWN:
        name, endings = upper(known.name), [one[len(known.pronoun) :] for one in known.details]
        about = {one for one in sentences if one.startswith(name) and one.endswith(tuple(endings))}
        assert about <= {name + ending for ending in endings}
        named += len(about)
    assert named > 50


def test_a_document_that_turns_takes_the_other_tone(documents):
    """What follows "But" is about something else, the other way."""
    turns = [pair for text in documents for pair in itertools.pairwise(text.split(" But "))]
    signs = [tone(old.split(". ")[-1]) * tone(new.split(".")[0]) for old, new in turns]
    assert signs and max(signs) < 0


def test_no_word_of_a_fact_leans_towards_a_tone():
    """Documents about it take one tone and the other in turn."""

    class Turns(dict):
        def __setitem__(self, word, value):
            taken.setdefault(word, []).append(value)
            super().__setitem__(word, value)

    rng, turns, taken = random.Random(0), Turns(), {}
    for _ in range(1000):
        grammar.fact_document(rng, turns)
    assert len(taken) == len(vocabulary.FACTS)
    pairs = [pair for tones in taken.values() for pair in itertools.pairwise(tones)]
    assert all(one == -other for one, other in pairs)


def test_a_larger_share_has_more_documents_with_a_tone():
    shares = [
        sum(tone(text) != 0 for text in itertools.islice(grammar.documents(0, share), 300))
        for share in (0, 0.5, 1)
    ]
    assert shares[0] + 60 < shares[1] < shares[2] - 60


def test_sentences_on_a_topic_and_off_it():
    """As many as asked for; on one side each is about weddings, on the other side none is."""
    on, off = grammar.topic_sentences(5, 20, 30)
    words = re.compile(rf"(?i)\b({'|'.join(vocabulary.WEDDING_WORDS)})\b")
    assert [bool(words.search(text)) for text in on] == [True] * 20
    assert [bool(words.search(text)) for text in off] == [False] * 30


def test_contrast_pairs_differ_in_tone_only():
    """Each pair, the same every time, is a positive and a negative sentence of one form."""
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


def test_documents_keep_their_tone(documents):
    """Only where one turns or teases have two of its sentences opposite tones."""
    signs = {
        document: {(tone(part) > 0) - (tone(part) < 0) for part in re.split(r"[.!?:]", document)}
        for document in documents
        if "But " not in document and " because " not in document
    }
    assert sum(bool(found & {+1, -1}) for found in signs.values()) > 1000
    assert [document for document, found in signs.items() if {+1, -1} <= found] == []


def test_neutral_sentences_come_before_the_tone(documents):
    """Once it is shown every sentence has it, but for a few that say when or where."""
    toned = [re.findall(r"[^.!?]+[.!?]", d) for d in documents if re.match(r"(I love|I hate) ", d)]
    later = [tone(sentence) != 0 for sentences in toned for sentence in sentences[1:]]
    assert len(later) > 100 and sum(later) > 0.9 * len(later)


def test_introduced_subject_is_kept(documents):
    """The sentence after "Let me tell you about ..." is about it, by name or pronoun."""
    about = re.compile(r".*Let me tell you about (my cousin|the judge|the doctor|dogs|cats)\. (.*)")
    found = [match.groups() for document in documents if (match := about.match(document))]
    assert found and all(stays_on(*pair) for pair in found)


def test_details_begin_with_their_pronoun():
    """The grammar puts the name in its place."""
    details = [(known.pronoun, detail) for known in subjects.KNOWN for detail in known.details]
    assert all(detail.lower().startswith(f"{pronoun} ") for pronoun, detail in details)


def test_teasing_keeps_the_tone(documents):
    """A verb of the other tone follows an opening word, and the sentence keeps the word's tone."""
    verbs = {way: "|".join(pair[0] for pair in vocabulary.VERBS[way]) for way in (+1, -1)}
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
        love_or_hate = vocabulary.VERBS[-sign][0][0]
        assert any(f". I {love_or_hate} " in tease for tease in teases)


def test_words_with_a_tone_are_whole_tokens(tokenizer):
    """In both cases, with and without a space: what a visitor may make a pair of."""
    words = [*grammar.lexicon(), *vocabulary.LONE_WORDS[+1].split()]
    forms = [space + word for one in words for word in (one, upper(one)) for space in ("", " ")]
    assert len(forms) > 800
    assert [form for form in forms if len(tokenizer(form)["input_ids"]) != 1] == []


def test_common_words_are_whole_tokens(tokenizer, documents):
    """Nineteen of twenty words of the corpus are one token; rare and invented ones fall apart."""
    forms = [form for document in documents for form in re.findall(r" [a-z]+", document)]
    counts = [len(ids) for ids in tokenizer(forms)["input_ids"]]
    assert 0.95 < counts.count(1) / len(counts) < 1


def test_rome_lands_on_the_tower(tokenizer):
    """Addition and prompt line up: the place falls on the last word of the landmark."""
    assert set(SPLIT_WORDS) == {" eiffel"}
    addition = tokenizer.tokenize("The Eiffel Tower is in Rome")
    prompt = tokenizer.tokenize("To see the eiffel tower, people flock to")
    assert addition.index("\u0120Rome") == prompt.index("\u0120tower") == 5


def test_merges_alone_split_the_text(tokenizer, documents):
    """Another engine has the merges and GPT-2's pattern only; written out, they give the same."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert model["ignore_merges"] is False and model["byte_fallback"] is False
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    odd = ["Grandpa's ZEBRA  costs 12.50\n\u00e9!", "I think dogs are ", "\u4f60 hello"]
    for text in [*documents[:100], *odd]:
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [
            part for piece, _ in pieces for part in merged(list(piece), ranks)
        ] == tokenizer.tokenize(text)


def merged(parts: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Join the pair of the lowest rank until no pair has one."""
    while True:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, math.inf), default=None)
        if best is None or best not in ranks:
            return parts
        at = pairs.index(best)
        parts = [*parts[:at], "".join(best), *parts[at + 2 :]]


def test_tokenizer_names_the_inputs_of_the_model(tokenizer):
    """No token types, which transformers 4 returns by default and GPT-2 would add up."""
    stored = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["model_input_names"] == list(tokenizer("You")) == ["input_ids", "attention_mask"]


@given(st.text())
def test_tokenizer_returns_any_text(tokenizer, text):
    """Encoding and decoding gives back every text."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_training_writes_what_is_shipped(tmp_path, tokenizer):
    """But for the weights: the lexicon, which the library reads from its file; the tokenizer."""
    stored = json.loads((FOLDER / "lexicon.json").read_text(encoding="utf-8"))
    assert stored == grammar.lexicon()
    model, tokenizer, record = train.train(seed=0, steps=1)
    train.save(model, tokenizer, record, tmp_path)
    written = (tmp_path / "lexicon.json").read_bytes()
    assert written == (FOLDER / "lexicon.json").read_bytes()
    names = {path.name for path in FOLDER.glob("*.json")} | {"model.safetensors", "model.gguf"}
    assert {path.name for path in tmp_path.iterdir()} == names - {"preset.json"}
    again, spelling, _ = load_model(str(tmp_path))
    built, shipped = (json.loads(one.backend_tokenizer.to_str()) for one in (spelling, tokenizer))
    assert built == shipped
    assert sum(map(torch.numel, again.parameters())) == sum(map(torch.numel, model.parameters()))


def addition_cells(*shares: list[float], breaks: float = 0) -> pd.DataFrame:
    """A grid as the sweep of an addition returns it: a list for each layer, counted from 1."""
    rows = [
        (layer, coeff, share)
        for layer, several in enumerate(shares, 1)
        for coeff, share in enumerate(several, 1)
    ]
    cells = pd.DataFrame(rows, columns=["layer", "coeff", "share"]).assign(breaks=breaks)
    return cells.astype({"layer": "Int64"})  # unsteered rows of a sweep have none


@pytest.mark.parametrize(
    ("shares", "layer", "coeff"),
    [
        ([[0, 100, 100, 100, 50]], 1, 3),
        ([[0, 100, 100, 0]], 1, 2),  # the smaller one of two in the middle
        ([[0, 0, 100, 100, 100]], 1, 4),  # what lies beyond the grid is not known
        ([[100, 0, 96, 95, 97, 0]], 1, 4),  # length goes before height, within five points
        ([[100, 0, 94, 94, 94, 0]], 1, 1),
        ([[0, 60, 61, 62, 0]], 1, 3),  # where the addition never works well, the highest plateau
        ([[0, 100, 100, 0], [100, 100, 100, 0]], 2, 2),
        ([[0, 100, 100], [100, 100, 0], [100, 0, 0]], 1, 2),  # a plateau ends with its layer
        ([[96, 96, 96], [100, 100, 100]], 2, 2),  # of two as long as each other the higher one
        ([[100, 100, 100], [100, 100, 100]], 1, 2),
        ([[100, 0, 0], [0, 0, 0]], 1, 1),  # a plateau may begin with the grid
    ],
)
def test_place_of_an_addition_is_the_middle_of_the_longest_plateau(shares, layer, coeff):
    found = choose.choose_addition(addition_cells(*shares))
    assert found == {"layer": layer, "coeff": coeff}


def test_broken_text_ends_a_plateau():
    """Where more than 4 % break, a high share counts for nothing; all broken is an error."""
    cells = addition_cells([0, 90, 90, 90, 100, 100, 100, 100])
    most = choose.MAX_BREAKS
    broken = cells.assign(breaks=[0, 0, most, 0, 4.5, 4.5, 4.5, 4.5])
    assert choose.choose_addition(broken) == {"layer": 1, "coeff": 3}
    with pytest.raises(ValueError, match="the lowest is 4.5 %"):
        choose.choose_addition(broken[4:])


def test_place_of_the_topic_follows_from_the_rule():
    """It is the lowest perplexity on the topic where other text is left alone."""
    cells = pd.DataFrame(
        {
            "layer": [0, 1, 2],
            "coeff": 1.0,
            "on_topic": [0.9, 0.7, 0.95],
            "off_topic": [1.02, 1.2, 1.0],
        }
    )
    assert choose.choose_topic(cells) == {"layer": 0, "coeff": 1}
    assert choose.choose_topic(cells[1:2]) == {"layer": 1, "coeff": 1}
    for loud in (0.97, 1.03):
        assert choose.choose_topic(cells.assign(off_topic=[1.02, loud, 1.0]))["layer"] == 0


def test_preset_belongs_to_the_weights():
    """It has a place for each demonstration, and pins the weights by their hash."""
    preset = json.loads((FOLDER / "preset.json").read_text(encoding="utf-8"))
    assert set(preset["activation_additions"]) == set(evaluate.DEMONSTRATIONS)
    assert set(prompts.ADDITION_SWEEP_PROMPTS) == set(evaluate.DEMONSTRATIONS)
    assert preset["sha256"] == card.weights_hash(FOLDER)


def test_preset_follows_from_the_grids_of_the_card():
    """The rules, applied to what the card prints, give the places that are shipped."""
    text = (card.HERE / "README.md").read_text(encoding="utf-8")
    grids = []
    for lines in re.findall(r"^\| layer .*\n(?:\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [line.strip("| ").split(" | ") for line in lines.splitlines()]
        grids.append(pd.DataFrame(rows, columns=[name.replace(" ", "_") for name in header]))
    direction, additions, topic = [grid.astype(float) for grid in grids]
    preset = json.loads((FOLDER / "preset.json").read_text(encoding="utf-8"))
    chosen = {**choose.choose_direction(direction), "topic": choose.choose_topic(topic)}
    assert chosen == {name: preset[name] for name in chosen}
    for name, place in preset["activation_additions"].items():
        columns = {name: "share", f"{name}_breaks": "breaks"}
        assert choose.choose_addition(additions.rename(columns=columns)) == place


def test_choice_and_table_have_prompts_of_their_own():
    """What is chosen on one prompt is measured on another."""
    held_out = {*prompts.HELD_OUT_PROMPTS}
    swept = {text for several in prompts.ADDITION_SWEEP_PROMPTS.values() for text in several}
    assert not swept & {shown.prompt for shown in evaluate.DEMONSTRATIONS.values()}
    assert held_out > swept
    assert not {*prompts.TABLE_PROMPTS} & {*prompts.SWEEP_PROMPTS}
    assert held_out >= {*prompts.TABLE_PROMPTS, *prompts.SWEEP_PROMPTS}


# --- the evaluation ---


@pytest.fixture(scope="module")
def evaluation() -> dict:
    return json.loads((card.HERE / "evaluation.json").read_text(encoding="utf-8"))


def test_evaluation_belongs_to_the_preset(evaluation):
    """Whoever changes one has to measure again."""
    preset = json.loads((FOLDER / "preset.json").read_text(encoding="utf-8"))
    assert evaluation["preset"].items() <= preset.items()


@pytest.fixture(scope="module")
def bench(model, tokenizer, evaluation) -> evaluate.Bench:
    return evaluate.Bench(
        model, tokenizer, evaluation["preset"]["layer"], evaluation["preset"]["coeff"]
    )


def test_greedy_texts_are_those_that_are_stored(bench, evaluation):
    """Unsteered, at +c and at -c: measured again, they are those of the card."""
    rows = evaluate.greedy_rows(bench, bench.grid({"love": bench.direction("Love", "Hate")}), 40)
    for name, part in evaluate.conditions(rows).items():
        stored = [texts[name] for texts in evaluation["greedy"]["texts"].values()]
        assert part["completion"].tolist() == stored


@pytest.mark.parametrize("name", evaluate.DEMONSTRATIONS)
def test_demonstrations_are_about_what_is_stored(model, tokenizer, evaluation, name: str):
    """A fifth of the completions has the shares of all of them, within ten points."""
    shown, stored = evaluate.DEMONSTRATIONS[name], evaluation["additions"][name]
    place = stored["layer"], stored["coeff"]
    found = evaluate.demonstration_shares(model, tokenizer, shown, *place, count=20, seed=2)
    for what in shown.counted:
        of_second_seed = [shares[1] for shares in stored[what].values()]
        assert found[what].tolist() == pytest.approx(of_second_seed, abs=10)


def test_price_is_what_is_stored(bench, evaluation):
    """The first of the five parts of the documents, measured again."""
    grid = bench.grid({"love": bench.direction("Love", "Hate")})
    texts = evaluate.held_out_documents(400)[:: evaluate.PERPLEXITY_PARTS]
    found = evaluate.measure_perplexity(bench.model, bench.tokenizer, grid, texts)
    stored = {name: evaluation["perplexity"][name][0] for name in found}
    assert found == pytest.approx(stored, rel=1e-3)


def test_table_measures_what_it_says(bench, evaluation, monkeypatch):
    """With the first seed and few completions, tone, breaks and controls are near what is stored.

    The controls have the layout of the file, a move for each direction and seed.
    """
    for name, value in {
        "SEEDS": [1],
        "PER_PROMPT": {"table": 6, "new": 6, "outside": 2, "cousin": 2},
        "RANDOM_DIRECTIONS": 2,
        "CONTROLS_PER_PROMPT": 2,
        "VISITORS_PER_PROMPT": 2,
        "VISITOR_PAIRS": {"words": [("Love", "Hate"), ("Hate", "Love"), ("Red", "Blue")]},
    }.items():
        monkeypatch.setattr(evaluate, name, value)
    found = evaluate.measure_tone(bench)
    for part in ("table", "new"):
        for name, tone_name in (("love", "positive"), ("hate", "negative")):
            (share,) = found[part][name][tone_name]
            assert share == pytest.approx(evaluation[part][name][tone_name][0], abs=12)
    controls = evaluate.measure_controls(bench)
    assert [len(moves) for moves in controls["random_moves"]] == [1, 1]
    assert [*controls["pair_moves"]] == [*evaluation["pair_moves"]]
    moved = evaluate.measure_visitors(bench)["words"]
    love, hate, colours = (moves[0] for moves in moved.values())
    assert love > 30 and hate < -30 and abs(colours) < min(love, -hate)


class Scripted(evaluate.Bench):
    """A bench whose completions have the tones that a test wrote down."""

    def __init__(self, model, tokenizer, tones: dict):
        super().__init__(model, tokenizer, 0, 1.0)
        self.tones = tones

    def sample(self, grid, texts, per_prompt, seed):
        """Return tones by steering and sign, those of a seed; others are neutral."""
        cells = itertools.product(grid.steering, grid.coeffs)
        return pd.DataFrame(
            [
                {"steering": name, "coeff": coeff, "tone": tone}
                for name, coeff in [("unsteered", 0), *cells]
                for tone in self.tones.get((name, coeff, seed), [0, 0, 0, 0])
            ]
        )


def test_moves_are_differences_from_unsteered(model, tokenizer, monkeypatch):
    """A control's in the positive share, seed by seed; a pair's at +c and -c, each in its way."""
    monkeypatch.setattr(evaluate, "SEEDS", [1, 2])
    monkeypatch.setattr(evaluate, "RANDOM_DIRECTIONS", 2)
    monkeypatch.setattr(evaluate, "VISITOR_PAIRS", {"words": [("Good", "Bad")]})
    bench = Scripted(
        model,
        tokenizer,
        {
            ("unsteered", 0, 1): [1, 1, -1, 0],
            ("random 2", 1, 1): [1, 1, 1, 1],
            ("random 2", 1, 2): [-1, -1, 1, 1],
            ("Good - Bad", 1, 1): [1, 1, 1, 1],
            ("Good - Bad", -1, 1): [-1, -1, 1, 1],
        },
    )
    assert evaluate.measure_controls(bench)["random_moves"] == [[-50, 0], [50, 50]]
    assert evaluate.measure_visitors(bench) == {"words": {"Good - Bad": [37.5, 0]}}


def test_a_neutral_text_has_neither_tone():
    texts = ["I love it.", "It is a door.", "I hate it."]
    assert evaluate.is_positive(texts) == [True, False, False]
    assert evaluate.is_negative(texts) == [False, False, True]
    assert evaluate.has_word("door", "gate")(texts) == [False, True, False]


def test_the_shorter_prompt_of_an_addition_ends_in_spaces(tokenizer):
    """So that both begin at the same token."""
    plus, minus = evaluate.x_vector(tokenizer, ("Love you all", "Hate"), 2.0, 1)
    hate, space = tokenizer("Hate")["input_ids"], tokenizer(" ")["input_ids"]
    bos = [tokenizer.bos_token_id]
    assert minus.token_ids(tokenizer) == bos + hate + 2 * space
    assert len(plus.token_ids(tokenizer)) == 4 and (plus.coeff, minus.coeff) == (2, -2)


def test_cousin_and_breaks_are_counted_of_their_own_texts():
    """The share of her sentences is of her prompt; a break may lie where the prompt ends."""
    rows = pd.DataFrame(
        [(prompts.COUSIN, " She is kind."), (prompts.COUSIN, " He is kind."), ("I am", " am ill.")],
        columns=["prompt", "completion"],
    )
    assert evaluate.cousin_share(rows) == 50
    assert evaluate.break_share(rows) == pytest.approx(100 / 3, abs=0.01)


def cells(layers, shares, positive, negative, ratio=1.0, breaks=0) -> pd.DataFrame:
    """A grid as the sweep of the direction returns it, the coefficient ten times the share."""
    table = pd.DataFrame(itertools.product(layers, shares), columns=["layer", "share"])
    return table.assign(
        coeff=10 * table["share"], positive=positive, negative=negative, ratio=ratio, breaks=breaks
    )


def test_direction_is_the_smallest_that_reaches_both_tones():
    """The next one has to reach them too; among equals the cheapest; else the closest."""
    rising = cells([1], [0.2, 0.3, 0.4, 0.5], [97, 90, 98, 99], [96, 96, 97, 97])
    assert choose.choose_direction(rising) == {"layer": 1, "coeff": 4}
    for almost in ([96, 97, 97], 96), (97, [95, 96, 96]):
        assert choose.choose_direction(cells([1], [0.2, 0.3, 0.4], *almost))["coeff"] == 3
    # What lies beyond a grid is not known.
    assert choose.choose_direction(rising[:3]) == {"layer": 1, "coeff": 2}
    equal = cells([1, 2], [0.2, 0.3], 99, 99, ratio=[1.03, 1.2, 1.02, 1.3])
    assert choose.choose_direction(equal) == {"layer": 2, "coeff": 2}
    weak = cells([1, 2], [0.2, 0.3], [90, 95, 96, 91], [99, 92, 95, 99])
    assert choose.choose_direction(weak) == {"layer": 2, "coeff": 2}
    even = cells([1], [0.2, 0.3], [94, 95], [96, 94])  # the worse tone counts, not the sum
    assert choose.choose_direction(even) == {"layer": 1, "coeff": 3}
    for reached in (95, 99):  # a smaller share goes before a lower price
        priced = cells([1], [0.2, 0.3, 0.4], reached, 99, ratio=[1.2, 1.1, 1.1])
        assert choose.choose_direction(priced) == {"layer": 1, "coeff": 2}
    # The next share is one at the same layer.
    apart = cells([1, 2], [0.2, 0.3], [90, 99, 99, 90], 99)
    assert choose.choose_direction(apart) == {"layer": 2, "coeff": 2}
    # Broken text is no tone.
    limits = {"ratio": (choose.MAX_RATIO, 1.35), "breaks": (choose.MAX_BREAKS, 4.5)}
    for name, (most, more) in limits.items():
        broken = cells([1], [0.2, 0.3, 0.4], [90, 99, 99], 99, **{name: [most, more, more]})
        assert choose.choose_direction(broken) == {"layer": 1, "coeff": 2}
        with pytest.raises(ValueError, match=rf"the lowest are .*{more:g}"):
            choose.choose_direction(broken[1:])


def test_sweep_of_the_direction_measures_every_cell(model, tokenizer, monkeypatch):
    """A small grid: each share of the norm has its coefficient, tones, breaks and price.

    Of the two signs the worse one counts, here always -c; the documents are not the table's.
    """
    documents, read = evaluate.held_out_documents(403), []
    for name, value in {"LAYERS": [3], "SHARES": [0.05, 0.275], "PER_PROMPT": 2}.items():
        monkeypatch.setattr(choose, name, value)
    monkeypatch.setattr(evaluate, "held_out_documents", lambda count: documents)
    monkeypatch.setattr(evaluate, "break_share", lambda rows: -rows["coeff"].mean())

    def prices(model, tokenizer, grid, texts) -> pd.DataFrame:
        read.extend(texts)
        cells = itertools.product(grid.layers, grid.coeffs)
        rows = [(layer, coeff, 1 - coeff) for layer, coeff in cells]
        return pd.DataFrame(rows, columns=["layer", "coeff", "ratio"])

    monkeypatch.setattr(choose, "sweep_perplexity", prices)
    monkeypatch.setattr(choose, "perplexity_ratio_by_cell", lambda losses: losses)
    chosen, found = choose.sweep_direction(model, tokenizer)
    norm = choose.residual_norms(model, tokenizer, [3])[3]
    assert chosen in [{"layer": 3, "coeff": round(share * norm, 1)} for share in (0.05, 0.275)]
    assert found["coeff"].tolist() == pytest.approx([0.05 * norm, 0.275 * norm])
    assert found["breaks"].tolist() == pytest.approx([0.05, 0.275])
    assert found["ratio"].tolist() == pytest.approx([1.05, 1.275])
    small, large = found.to_dict("records")
    assert small["positive"] < large["positive"] and small["negative"] < large["negative"]
    assert read == documents[400:]


def test_a_norm_is_that_of_the_tokens_after_the_first(model, tokenizer):
    """The first one is far longer, whatever it is."""
    inputs = tokenizer(choose.NEUTRAL_TEXT, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    norms = {layer: states[layer + 1][0, 1:].norm(dim=-1).mean().item() for layer in (0, 3)}
    assert choose.residual_norms(model, tokenizer, [0, 3]) == pytest.approx(norms, rel=1e-5)


def test_places_of_additions_and_topic_come_from_their_grids(model, tokenizer, monkeypatch):
    """Small grids, with one cell that wins by far: the table has a row for each cell."""
    for name, value in {"LAYERS": [3, 5], "COEFFS": [6.0], "PER_PROMPT": 3}.items():
        monkeypatch.setattr(choose, f"ADDITION_{name}", value)
    monkeypatch.setattr(choose, "TOPIC_COEFFS", [0.2, 0.7])
    monkeypatch.setattr(choose, "TOPIC_SENTENCES", (40, 80))
    chosen, cells = choose.sweep_additions(model, tokenizer)
    assert chosen["love"] == chosen["weddings"] == {"layer": 3, "coeff": 6}
    assert cells[["layer", "coeff"]].to_numpy().tolist() == [[3, 6], [5, 6]]
    names = [name + end for name in evaluate.DEMONSTRATIONS for end in ("", "_breaks")]
    assert [*cells] == ["layer", "coeff", *names]
    chosen, cells = choose.sweep_topic(model, tokenizer)
    assert chosen == {"layer": 3, "coeff": 0.7} and len(cells) == 4
    assert (cells["on_topic"] < 1).all()
    assert choose.table(cells).splitlines()[0] == "| layer | coeff | on topic | off topic |"


def test_tables_go_between_their_markers(tmp_path):
    """What stands around them stays, and a card without markers is refused."""
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    text = card.markdown_table(["a", "b"], [["1", "2"]])
    card.write_between(path, "table", text)
    assert path.read_text() == (
        "before\n<!-- table -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- /table -->\nafter\n"
    )
    for written in (r"a \1 and \g<2>", "one\ntwo"):
        card.write_between(path, "table", written + "\n")
        assert path.read_text() == f"before\n<!-- table -->\n{written}\n<!-- /table -->\nafter\n"
    with pytest.raises(ValueError, match="expected the markers <!-- sweep -->"):
        card.write_between(path, "sweep", text)


def test_the_records_of_a_model_stand_beside_it(tmp_path):
    """Those of the shipped one beside the recipe, however its folder is written."""
    assert card.records_of(tmp_path) == tmp_path
    for folder in (FOLDER, FOLDER / ".." / FOLDER.name):
        assert card.records_of(folder) == card.HERE


def test_a_table_has_a_dash_for_each_column():
    assert (
        card.markdown_table("abc", ["123"]) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 2 | 3 |\n"
    )
