"""Metrics: columns of a table, words and sentiment, and the loss of texts, steered and not."""

import copy
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import KNOWN_WORDS
from transformers import BertConfig, BertForSequenceClassification, pipeline

from common import (
    add_metric_cols,
    apply_activation_additions,
    get_logprob_metric,
    get_loss_metric,
    get_sentiment_metric,
    get_word_count_metric,
    get_x_vector,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.likelihood import kl_divergence, token_logprobs
from common.measuring.metrics import measure
from common.measuring.tone import NEGATIONS, lexicon, mark_tone, tone, tone_shares, tone_sign
from common.texts.generation import generate
from common.vectors.activation_additions import with_bos
from common.vectors.steering_vector import SteeringVector

TEXTS = [
    "I love the old garden.",
    "They are charming",
    "The bride wore a white veil, and the captain sailed to the old mill.",
    "I",
]
texts_of_words = st.lists(
    st.lists(st.sampled_from(KNOWN_WORDS), min_size=1, max_size=9).map(" ".join),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def steering(model, tokenizer):
    """What makes a strong steering, anew each time."""
    return lambda: apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", 3, 4))


def plain_losses(model, tokenizer, text: str) -> torch.Tensor:
    """The loss of each token after BOS, from one plain pass."""
    ids = torch.tensor([with_bos(tokenizer, text)])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none"
        )


# --- columns of a table ---


@given(texts=texts_of_words, rows=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_a_metric_sees_the_joined_texts_and_the_table_given_stays(texts, rows):
    """Values stand beside their rows whatever the index, the index is kept.

    Nothing is done to the table given.
    """
    data = pd.DataFrame(
        {"prompts": texts, "completions": [text[::-1] for text in texts], "other": 1},
        index=rows[: len(texts)],
    )
    before = data.copy(deep=True)
    found = add_metric_cols(
        data, {"text": list, "length": lambda texts: [len(text) for text in texts]}
    )
    pd.testing.assert_frame_equal(data, before)
    pd.testing.assert_frame_equal(found[["prompts", "completions", "other"]], before)
    assert list(found.columns) == ["prompts", "completions", "other", "text", "length"]
    assert found["text"].tolist() == [text + text[::-1] for text in texts]
    assert found["length"].tolist() == [2 * len(text) for text in texts]
    assert (
        add_metric_cols(data, {"text": list}, "completions")["text"].tolist()
        == data["completions"].tolist()
    )
    assert add_metric_cols(data, {"text": list}, ["completions", "prompts"])["text"].tolist() == [
        text[::-1] + text for text in texts
    ]


def test_several_columns_are_named_after_the_metric():
    """Also where the metric numbers them from 0."""
    data = pd.DataFrame({"texts": ["a", "bb"]})
    assert measure(
        lambda texts: pd.DataFrame({"x": [1, 2]}, index=[7, 7]), ["a", "b"]
    ).index.tolist() == [0, 1]
    named = add_metric_cols(
        data, {"m": lambda texts: pd.DataFrame({"x": [1, 2], "y": [3, 4]}, index=[7, 7])}, "texts"
    )
    assert named.drop(columns="texts").to_dict("list") == {"m_x": [1, 2], "m_y": [3, 4]}
    numbered = add_metric_cols(data, {"m": lambda texts: pd.DataFrame([[1, 2], [3, 4]])}, "texts")
    assert numbered.drop(columns="texts").to_dict("list") == {"m_0": [1, 3], "m_1": [2, 4]}


@pytest.mark.parametrize(
    "values",
    [
        [1.5, 2.5],
        (1.5, 2.5),
        np.array([1.5, 2.5]),
        torch.tensor([1.5, 2.5]),
        pd.Series([1.5, 2.5], index=[4, 9]),
    ],
)
def test_values_may_come_in_any_container(values):
    found = add_metric_cols(
        pd.DataFrame({"texts": ["a", "b"]}), {"m": lambda texts: values}, "texts"
    )
    assert found["m"].dtype == float and found["m"].tolist() == [1.5, 2.5]


def test_an_empty_table_gets_its_columns(model, tokenizer, steering):
    """No text is measured, and every metric names its columns."""
    data = pd.DataFrame({"prompts": [], "completions": []})
    metrics = {
        "words": get_word_count_metric(["a"]),
        "tone": get_sentiment_metric(),
        "loss": get_loss_metric(model, tokenizer),
        "under": get_logprob_metric(model, tokenizer, steering),
    }
    found = add_metric_cols(data, metrics)
    assert list(found.columns)[2:] == [
        "words",
        "tone",
        "loss",
        "under_logprob",
        "under_logprob_change",
        "under_kl",
    ] and not len(found)


@pytest.mark.parametrize(
    "metrics, columns, says",
    [
        ({"other": list}, "texts", "a column 'other' already"),
        ({"texts": list}, "texts", "a column 'texts' already"),
        (
            {"m_x": list, "m": lambda texts: pd.DataFrame({"x": texts})},
            "texts",
            "a column 'm_x' already",
        ),
        (
            {"m": list},
            ["texts", "completions"],
            "no column 'completions': the table has texts, other",
        ),
        ({"m": list}, [], "one column of texts or more"),
        ({"m": lambda texts: texts[1:]}, "texts", "'m' returned 1 values for 2 texts"),
        (
            {"m": lambda texts: pd.DataFrame({"x": [1, 2, 3]})},
            "texts",
            "'m' returned 3 values for 2 texts",
        ),
        ({"m": len}, "texts", "'m' returned 2 for 2 texts"),
    ],
)
def test_mistakes_are_named(metrics, columns, says):
    data = pd.DataFrame({"texts": ["a", "b"], "other": 0})
    with pytest.raises(ValueError, match=says):
        add_metric_cols(data, metrics, columns)


# --- words ---

WORDS = ["wed", "wedding", "Weddings", "old", "old garden", "garden gate", "C++", "x"]
PIECES = [
    *WORDS,
    "WED",
    "weddings",
    "Old",
    "gate",
    "garden",
    "c",
    "_",
    "'s",
    "é",
    "3",
    ".",
    ",",
    "-",
    " ",
    "  ",
    "\n",
]


def naive_count(words: list[str], text: str, case_sensitive: bool) -> int:
    """Walk through a text.

    Where a word begins that stands whole, count the longest and go on after it.
    """
    words, text = (
        (words, text) if case_sensitive else ([word.lower() for word in words], text.lower())
    )
    count = place = 0
    while place < len(text):
        whole = [
            word
            for word in words
            if text.startswith(word, place)
            and not (place and (text[place - 1].isalnum() or text[place - 1] == "_"))
            and not re.match(r"\w", text[place + len(word) :])
        ]
        count += bool(whole)
        place += max(map(len, whole), default=1)
    return count


@settings(max_examples=200)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
    | st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join),
    case_sensitive=st.booleans(),
)
@example(["wed", "wedding"], "Wed the wedding, wed! Wedding-wed weddings wed_1 wed's", False)
@example(["old", "old garden", "garden gate"], "old garden gate, the old garden", True)
def test_words_are_counted_whole(words, text, case_sensitive):
    """As by a walk through the text; twice the same word, and space around it, change nothing."""
    expected = naive_count(words, text, case_sensitive)
    assert get_word_count_metric(words, case_sensitive)([text]) == [expected]
    assert get_word_count_metric([*words, f" {words[0]}    "], case_sensitive)([text, ""]) == [
        expected,
        0,
    ]


def test_counts_of_some_sentences():
    text = "Wed the wedding, wed! Wedding-wed WEDDINGS."
    assert [
        get_word_count_metric([word])([text])[0] for word in ("wed", "wedding", "weddings", "dding")
    ] == [3, 2, 1, 0]
    assert get_word_count_metric(["wed"], case_sensitive=True)([text]) == [2]
    assert get_word_count_metric("wedding")([text]) == [2]
    assert get_word_count_metric(["new", "new york", "york"])(
        ["New York, new york and a new one"]
    ) == [3]


@pytest.mark.parametrize("words", [[], "", ["wed", " "], ["wed", 3]])
def test_no_words_are_refused(words):
    with pytest.raises(ValueError, match="list of words"):
        get_word_count_metric(words)


# --- sentiment ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I love it", 1),
        ("I hate it", -1),
        ("It is a door", 0),
        ("LOVE, love and hate.", 1),
        ("", 0),
        ("loveless lovelock", 0),
        ("I do not love it", -1),
        ("I never really love it", -1),
        ("I hardly hate it", 1),
        ("No love", -1),
        ("I do not say that I love it", 1),
        ("No, I love it", -1),
        ("No. I love it", 1),
        ("Is it not? Love!", 1),
    ],
)
def test_tone(text, expected):
    """Words of the grammar, in any case and whole; a negation reaches two words of its sentence."""
    assert tone(text) == expected and tone_sign([text, "hate"]) == [expected, -1]
    assert get_sentiment_metric()([text]) == [expected]


@given(
    word=st.sampled_from(sorted(lexicon())),
    negation=st.sampled_from(sorted(NEGATIONS)),
    between=st.lists(st.sampled_from(["that", "door", "is"]), max_size=3),
)
def test_a_negation_turns_the_two_words_behind_it(word, negation, between):
    text = " ".join([negation, *between, word])
    assert tone(text) == (lexicon()[word] if len(between) > 1 else -lexicon()[word])


@given(
    st.lists(st.sampled_from(["no", "not", "love", "hate", "door"]), min_size=1, max_size=4).map(
        " ".join
    ),
    st.sampled_from([". ", "! ", "? ", ".", "... ", ".\n"]),
    st.lists(st.sampled_from(["no", "not", "love", "hate", "door"]), min_size=1, max_size=4).map(
        " ".join
    ),
)
def test_the_tones_of_sentences_add_up(first, end, second):
    """What one says does not change what the next one says."""
    assert tone(first + end + second) == tone(first) + tone(second)
    marked = mark_tone(first) + end + mark_tone(second)
    assert mark_tone(first + end + second) == marked


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*sorted(lexicon()), *sorted(NEGATIONS), " ", "door", "LOVE", "\n"]),
            st.text(st.characters(exclude_characters="▲▼"), max_size=3),
        )
    ).map(" ".join)
)
def test_marks_are_what_tone_counts(text):
    """As many as the tone has words, in front of them, and nothing else in the text changes."""
    marked = mark_tone(text)
    assert marked.count("▲") - marked.count("▼") == tone(text) == tone(marked)
    assert marked.replace("▲", "").replace("▼", "") == text
    for word in re.findall("[▲▼]([A-Za-z]*)", marked):
        assert word.lower() in lexicon()


def test_a_word_is_marked_by_what_it_counts_as():
    assert mark_tone("I love it, do not love it and never hate it.") == (
        "I ▲love it, do not ▼love it and never ▲hate it."
    )
    assert mark_tone("_love_ or love1") == "_▲love_ or ▲love1"  # a word is its letters


def test_lexicon_is_what_tone_can_read():
    """Single words in lower case: others would never be found."""
    assert all(
        re.fullmatch("[a-z]+", word) and weight in (-1, 1) for word, weight in lexicon().items()
    )


@given(
    st.lists(st.sampled_from(["I love it", "I hate it", "It is a door"]), min_size=1, max_size=9)
)
def test_shares_of_tones(texts):
    shares = tone_shares(texts)
    assert shares == {
        "positive": texts.count("I love it") / len(texts),
        "negative": texts.count("I hate it") / len(texts),
        "neither": texts.count("It is a door") / len(texts),
    }


def test_no_texts_have_no_shares():
    with pytest.raises(ValueError, match="at least one text"):
        tone_shares([])


def test_letters_of_a_single_text_are_not_texts():
    with pytest.raises(ValueError, match="expected a list of texts, got the text 'I love it'"):
        tone_shares("I love it")


def test_weights_of_words():
    """Whole words and words of several parts, in any case.

    Those that are not in the list weigh nothing.
    """
    metric = get_sentiment_metric({"Good": 1, "very good": 2.5, "bad": -1, "don't": -0.5})
    assert metric(["Good, good BAD", "a very GOOD badge", "I don't", "", "ſ"]) == [
        1,
        2.5,
        -0.5,
        0,
        0,
    ]


def test_a_callable_sees_one_text_at_a_time():
    assert get_sentiment_metric(len)(["a", "bb", ""]) == [1, 2, 0]


@pytest.mark.parametrize(
    "sentiment, says",
    [
        ("positive", "word weights, a pipeline or a callable"),
        ({}, "list of words"),
        (["good"], "word weights"),
    ],
)
def test_other_sentiments_are_refused(sentiment, says):
    with pytest.raises(ValueError, match=says):
        get_sentiment_metric(sentiment)


@pytest.fixture(scope="module")
def classifier(tokenizer):
    """A real pipeline, around a tiny model with random weights and three labels."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    labels = {0: "good", 1: "middling", 2: "bad"}
    torch.manual_seed(2)  # a draw that gives TEXTS different labels
    config = BertConfig(
        **sizes, vocab_size=len(tokenizer), pad_token_id=0, id2label=labels, initializer_range=0.5
    )
    tiny = BertForSequenceClassification(config).eval()
    return pipeline("text-classification", model=tiny, tokenizer=tokenizer, device="cpu")


def test_a_pipeline_of_transformers(classifier, tokenizer):
    """Label and score are those of a plain pass through its model."""
    texts = [*TEXTS, "Hate", "I hate the old mill"]
    data = pd.DataFrame({"texts": texts})
    found = add_metric_cols(
        data,
        {
            "s": get_sentiment_metric(classifier, ["good", "middling"]),
            "one": get_sentiment_metric(classifier, "good"),
            "bare": get_sentiment_metric(classifier),
        },
        "texts",
    )
    assert list(found.columns)[1:] == [
        "s_label",
        "s_score",
        "s_is_positive",
        "one_label",
        "one_score",
        "one_is_positive",
        "bare_label",
        "bare_score",
    ]
    for row in found.itertuples():
        with torch.no_grad():
            probs = (
                classifier.model(**tokenizer(row.texts, return_tensors="pt")).logits[0].softmax(-1)
            )
        assert (
            row.s_label == row.bare_label == classifier.model.config.id2label[int(probs.argmax())]
        )
        assert row.s_score == pytest.approx(probs.max().item(), abs=1e-5)
        assert row.s_is_positive == (row.s_label != "bad") and row.one_is_positive == (
            row.s_label == "good"
        )
    assert found["s_label"].nunique() > 1


def test_a_pipeline_that_returns_all_labels(classifier, tokenizer):
    """The likeliest label counts, as where it returns one."""
    every = pipeline(
        "text-classification", model=classifier.model, tokenizer=tokenizer, top_k=None, device="cpu"
    )
    pd.testing.assert_frame_equal(
        measure(get_sentiment_metric(every, ["good"]), TEXTS),
        measure(get_sentiment_metric(classifier, ["good"]), TEXTS),
    )


@pytest.fixture(scope="module")
def zero_shot(classifier, tokenizer):
    """The same model, as if it judged whether one sentence follows from another."""
    model = copy.deepcopy(classifier.model)
    model.config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model.config.label2id = {label: number for number, label in model.config.id2label.items()}
    options = {"model": model, "tokenizer": tokenizer, "device": "cpu"}
    return pipeline("zero-shot-classification", candidate_labels=["old", "new"], **options)


def test_pipelines_are_metrics_as_they_are(classifier, zero_shot, model, tokenizer):
    """Labels with scores, the scores of all labels, chosen labels, and written texts."""
    options = {"model": classifier.model, "tokenizer": tokenizer, "device": "cpu"}
    every = pipeline("text-classification", top_k=None, **options)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    # The pipeline knows the settings of its call by keyword, so they are bound here.
    write = partial(writer, max_new_tokens=2, do_sample=False, return_full_text=False)
    metrics = {"one": classifier, "all": every, "age": zero_shot, "more": write}
    found = add_metric_cols(pd.DataFrame({"texts": TEXTS}), metrics, "texts")
    titles = ["one_label", "one_score", "all_bad", "all_good", "all_middling", "age_new", "age_old"]
    assert list(found.columns)[1:] == [*titles, "more_generated_text"]
    for row, one, chosen in zip(found.to_dict("records"), classifier(TEXTS), zero_shot(TEXTS)):
        assert row["one_label"] == one["label"] and row["one_score"] == one["score"]
        assert row[f"all_{one['label']}"] == pytest.approx(one["score"], abs=1e-6)
        assert row["all_good"] + row["all_bad"] + row["all_middling"] == pytest.approx(1)
        assert row[f"age_{chosen['labels'][0]}"] == chosen["scores"][0]
        inputs = tokenizer(row["texts"], return_tensors="pt")
        ids = generate(model, inputs, max_new_tokens=2)[0, -2:]
        assert row["more_generated_text"] == tokenizer.decode(ids)


def test_a_judge_gets_prompts_and_completions():
    """Two lists, row by row, from the columns of a sweep or any two others."""
    rows = pd.DataFrame({"prompt": ["a", "bb"], "completion": ["xyz", "x"], "kind": "steering"})

    def judge(prompts, completions):
        assert isinstance(prompts, list) and isinstance(completions, list)
        return [f"{prompt}>{text}" for prompt, text in zip(prompts, completions, strict=True)]

    metrics = {"judge": judge, "length": lambda texts: [len(text) for text in texts]}
    found = add_metric_cols(rows, metrics)
    assert found["judge"].tolist() == ["a>xyz", "bb>x"] and found["length"].tolist() == [4, 3]
    turned = add_metric_cols(rows, metrics, ["completion", "prompt"])
    assert turned["judge"].tolist() == ["xyz>a", "x>bb"]
    assert add_metric_cols(rows[:0], {"judge": judge}).columns[-1] == "judge"
    for columns in ("completion", ["kind", "prompt", "completion"]):
        with pytest.raises(ValueError, match="'judge' takes prompts and completions"):
            add_metric_cols(rows, {"judge": judge}, columns)
    # A second argument that has a default is none that has to be given.
    one = {"m": lambda texts, size=2: [len(text) * size for text in texts]}
    assert add_metric_cols(rows, one)["m"].tolist() == [8, 6]


# --- the loss of a text ---


@pytest.mark.parametrize("text", TEXTS)
def test_loss_is_that_of_a_plain_pass(model, tokenizer, text):
    """With BOS in front, which does not count; every way to aggregate it."""
    ids = torch.tensor([with_bos(tokenizer, text)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    each = plain_losses(model, tokenizer, text)
    found = {
        mode: get_loss_metric(model, tokenizer, mode)([text])[0]
        for mode in ("mean", "sum", "max", "full")
    }
    assert found["mean"] == pytest.approx(loss, abs=1e-4)
    np.testing.assert_allclose(found["full"], each, atol=1e-4)
    assert (
        found["sum"] == pytest.approx(found["full"].sum(), abs=1e-4)
        and found["max"] == found["full"].max()
    )
    assert len(found["full"]) == ids.shape[1] - 1


@given(texts=texts_of_words, batch_size=st.integers(1, 4), steered=st.booleans())
def test_a_text_has_its_loss_in_any_batch(model, tokenizer, steering, texts, batch_size, steered):
    """Steered or not: whatever else is in the batch, and whatever the padding."""
    how = steering if steered else None
    together = get_loss_metric(model, tokenizer, steering=how, batch_size=batch_size)(texts)
    alone = [get_loss_metric(model, tokenizer, steering=how)([text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=2e-4)


def test_steering_counts_and_is_made_for_each_batch(model, tokenizer, steering):
    made = []

    def counted():
        made.append(1)
        return steering()

    found = get_loss_metric(model, tokenizer, "full", counted, batch_size=2)(TEXTS[:3])
    assert len(made) == 2
    for text, row in zip(TEXTS, found):
        with steering():
            expected = plain_losses(model, tokenizer, text)
        np.testing.assert_allclose(row, expected, atol=1e-4)
        assert (abs(row - plain_losses(model, tokenizer, text).numpy()) > 0.01).any()


def test_an_empty_text_has_no_loss(model, tokenizer):
    """A completion may be empty: it gives no number, and leaves the others theirs."""
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({3: torch.randn(model.config.hidden_size, generator=generator)})
    texts = ["", TEXTS[0]]
    for mode, expected in (("mean", np.nan), ("max", np.nan), ("sum", 0.0)):
        metric = get_loss_metric(model, tokenizer, mode)
        np.testing.assert_allclose(metric(texts), [expected, *metric(texts[1:])], atol=1e-4)
    assert [len(row) for row in get_loss_metric(model, tokenizer, "full")(texts)] == [
        0,
        len(tokenizer(TEXTS[0])["input_ids"]),
    ]
    assert get_logprob_metric(model, tokenizer, lambda: vector.apply(model))(texts).isna().all(
        axis=1
    ).tolist() == [True, False]


def test_another_mode_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="agg_mode, got 'median'"):
        get_loss_metric(model, tokenizer, "median")


def test_a_text_longer_than_the_model_is_named(model, tokenizer, steering):
    """On a GPU it would end the process's use of it."""
    before, text = snapshot(model), "the garden " * 200
    for metric in (
        get_loss_metric(model, tokenizer, steering=steering),
        get_logprob_metric(model, tokenizer, steering),
    ):
        with pytest.raises(ValueError, match="tokens is longer than the 256 positions"):
            metric(["I", text])
    assert_pristine(model, before)


# --- what steering does to the predictions along a text ---


@given(texts=texts_of_words, batch_size=st.integers(1, 4))
def test_logprobs_along_a_text(model, tokenizer, steering, texts, batch_size):
    """The log-probability is minus the steered loss, its change the difference of two losses.

    Batches change nothing.
    """
    found = get_logprob_metric(model, tokenizer, steering, batch_size)(texts)
    steered, plain = (
        np.array(get_loss_metric(model, tokenizer, steering=how)(texts)) for how in (steering, None)
    )
    np.testing.assert_allclose(found["logprob"], -steered, atol=2e-4)
    np.testing.assert_allclose(found["logprob_change"], plain - steered, atol=2e-4)
    # A text of one token is predicted after BOS alone, where an X-vector is 0.
    assert (found["kl"] >= 0).all() and (found["kl"] > 0).tolist() == [
        len(tokenizer(text)["input_ids"]) > 1 for text in texts
    ]
    assert list(found.columns) == ["logprob", "logprob_change", "kl"]
    alone = pd.concat(
        [get_logprob_metric(model, tokenizer, steering)([text]) for text in texts],
        ignore_index=True,
    )
    pd.testing.assert_frame_equal(found, alone, atol=2e-4, rtol=0)


def test_kl_is_the_mean_over_the_tokens(model, tokenizer, steering):
    """Of the distributions that predict a token of the text.

    After BOS, but not after the last token.
    """
    for text in TEXTS:
        ids = torch.tensor([with_bos(tokenizer, text)])
        with torch.no_grad():
            p = model(ids).logits[0, :-1].double().softmax(-1)
            with steering():
                q = model(ids).logits[0, :-1].double().softmax(-1)
        expected = (q * (q / p).log()).sum(-1).mean().item()
        assert get_logprob_metric(model, tokenizer, steering)([text])["kl"][0] == pytest.approx(
            expected, abs=1e-4
        )


def test_coefficient_0_changes_nothing(model, tokenizer):
    nothing = get_logprob_metric(
        model,
        tokenizer,
        lambda: apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", 0, 4)),
    )(TEXTS)
    assert (nothing["logprob_change"] == 0).all() and (nothing["kl"] == 0).all()
    assert nothing["logprob"].tolist() == pytest.approx(
        [-loss for loss in get_loss_metric(model, tokenizer)(TEXTS)], abs=1e-5
    )


@given(
    rows=st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=2, max_size=2),
    shift=st.floats(-5, 5),
)
def test_kl_divergence(rows, shift):
    """As torch has it; never negative, 0 for the same distribution.

    The same for logits and log-probabilities.
    """
    q, p = torch.tensor(rows)
    expected = torch.nn.functional.kl_div(
        p.double().log_softmax(-1), q.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    assert kl_divergence(q, p) >= 0 and kl_divergence(q, q + shift) == pytest.approx(0, abs=1e-4)
    assert torch.allclose(kl_divergence(q, p).double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(
        kl_divergence(q.log_softmax(-1), p.log_softmax(-1)),
        kl_divergence(q, p),
        atol=1e-4,
        rtol=1e-4,
    )


def test_kl_divergence_is_never_negative():
    """Nor by rounding, between distributions that hardly differ."""
    p = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
    assert (kl_divergence(p + 1e-5 * p.flip(0), p) >= 0).all()


# --- other models, and the model afterwards ---


def test_a_model_in_bf16_is_measured_in_fp32(tokenizer):
    """Its logits are coarse; what is computed from them is not made coarser."""
    other = tiny_model("GPT-2", len(tokenizer)).bfloat16()

    def steering():
        return apply_activation_additions(other, tokenizer, get_x_vector("Love", "Hate", 3, 2))

    for text in TEXTS:
        (found,) = token_logprobs(other, tokenizer, [text])
        assert found.dtype == torch.float32 and torch.allclose(
            -found, plain_losses(other, tokenizer, text), atol=1e-5
        )
    with torch.no_grad():
        ids = torch.tensor([with_bos(tokenizer, TEXTS[0])])
        p = other(ids).logits[0, :-1].double().softmax(-1)
        with steering():
            q = other(ids).logits[0, :-1].double().softmax(-1)
    assert get_logprob_metric(other, tokenizer, steering)(TEXTS[:1])["kl"][0] == pytest.approx(
        (q * (q / p).log()).sum(-1).mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tokenizer):
    """Padding on the left moves no loss, steered or not."""
    other = tiny_model(name, len(tokenizer))
    for how in (
        None,
        lambda: apply_activation_additions(other, tokenizer, get_x_vector("Love", "Hate", 4, 2)),
    ):
        texts = TEXTS if how is None else TEXTS[:3]
        together = get_loss_metric(other, tokenizer, steering=how)(texts)
        assert together == pytest.approx(
            [get_loss_metric(other, tokenizer, steering=how)([text])[0] for text in texts], abs=1e-3
        )


def test_the_model_is_as_it_was(model, tokenizer, steering):
    """Also after an error."""
    before = snapshot(model)
    get_loss_metric(model, tokenizer, steering=steering)(TEXTS)
    get_logprob_metric(model, tokenizer, steering)(TEXTS)
    assert_pristine(model, before)

    def too_long():
        return apply_activation_additions(model, tokenizer, get_x_vector(TEXTS[2], TEXTS[0], 1, 4))

    for metric in (
        get_loss_metric(model, tokenizer, steering=too_long),
        get_logprob_metric(model, tokenizer, too_long),
    ):
        with pytest.raises(ValueError, match="a prompt only"):
            metric(["I"])
    assert_pristine(model, before)
