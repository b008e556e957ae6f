"""Perplexity of a corpus.

Which tokens count, under which condition, and what steering gains and costs.
"""

import copy
import itertools
import logging
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import KNOWN_WORDS

from common import (
    ActivationAddition,
    apply_activation_additions,
    get_stats_over_corpus,
    get_x_vector,
    perplexity_ratios,
    plot_perplexity_ratios,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.perplexity import ratio_intervals, split_corpus, split_sentences
from common.vectors.activation_additions import with_bos
from common.vectors.steering_vector import SteeringVector
from embedded_model import grammar
from repository.demonstrations import topic_vector

ON = [
    "The bride wore a white veil. Two of my cousins were married in June.",
    "My friends talk about weddings often.",
]
OFF = [
    "People say that clocks are ugly. I love the old garden behind the mill!",
    "To see Big Ben, people come to London. Is it in England?",
]
words = st.lists(st.sampled_from(KNOWN_WORDS), min_size=1, max_size=12).map(" ".join)
corpora = st.lists(words, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def additions():
    """An X-vector of two tokens, BOS being the first."""
    return get_x_vector("Love", "Hate", 6, 3)


@pytest.fixture(autouse=True)
def closed():
    """Pictures do not pile up."""
    yield
    plt.close("all")


def plain_logprobs(model, ids: list[int]) -> np.ndarray:
    """The log-probability of each token but the first, from one plain pass."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return (
            model(row)
            .logits[0, :-1]
            .float()
            .log_softmax(-1)
            .gather(-1, row[0, 1:, None])[:, 0]
            .numpy()
        )


def sentences_of(texts: list[str]) -> list[str]:
    return [sentence for text in texts for sentence in split_sentences(text)]


def assert_stats(stats, expected: list[np.ndarray]) -> None:
    """Each piece has its log-probabilities, and the figures are those of all tokens together."""
    assert [len(piece) for piece in stats.logprobs] == [len(piece) for piece in expected]
    for one, other in zip(stats.logprobs, expected):
        np.testing.assert_allclose(one, other, atol=2e-4)
    together = np.concatenate(expected).astype(float)
    assert stats.tokens == len(together) and stats.avg_logprob == pytest.approx(
        together.mean(), abs=2e-4
    )
    assert stats.perplexity == pytest.approx(math.exp(-together.mean()), rel=1e-3)


# --- pieces ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Hi." Then he left.', ['He said "Hi."', "Then he left."]),
        ("(It is old.) So it is.", ["(It is old.)", "So it is."]),
        ("It is ‘old.’ It is “old!” Yes.", ["It is ‘old.’", "It is “old!”", "Yes."]),
        ("Wait... what?! No.\nYes.", ["Wait...", "what?!", "No.", "Yes."]),
        ("Pi is 3.14 and www.example.org is a page", ["Pi is 3.14 and www.example.org is a page"]),
        ("  no end  ", ["no end"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    """Closing quotes and brackets stay with their sentence."""
    assert split_sentences(text) == expected


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([*"aB.!?\"')]”’ \n\u2028", "Mr. ", "e.g. "]), max_size=30).map("".join)
)
def test_sentences_lose_nothing(text):
    """Words come out as they went in, whatever abbreviations do.

    A piece is never empty, and has no space around it.
    """
    pieces = split_sentences(text)
    assert " ".join(pieces).split() == text.split()
    assert all(piece and piece == piece.strip() for piece in pieces)
    assert all(piece.rstrip("\"')]’”")[-1] in ".!?" for piece in pieces[:-1])


def test_sentences_of_the_grammar():
    """Each ends where it should, and is one."""
    for document in itertools.islice(grammar.documents(777_000_110), 200):
        assert all(
            re.fullmatch(r"[^.!?]+[.!?]", sentence) for sentence in split_sentences(document)
        )


def whole_row(tokenizer, texts: list[str]) -> list[int]:
    """The tokens of texts in a row, an end of text between two."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return [
        token
        for number, row in enumerate(rows)
        for token in ([tokenizer.eos_token_id] if number else []) + row
    ]


@settings(max_examples=200)
@given(texts=corpora, window=st.integers(1, 14), data=st.data())
@example(texts=["I love the old garden"], window=5, data=None)
@example(texts=["I love the old garden"], window=4, data=None)
def test_every_token_counts_once(tokenizer, texts, window, data):
    """In order, whatever the lengths, the window and the stride.

    BOS is in front of each piece, and no piece is for nothing.
    """
    stride = data.draw(st.integers(1, window)) if data else window
    pieces, known = split_corpus(tokenizer, texts, "token", window, stride)
    row = whole_row(tokenizer, texts)
    assert [token for piece, seen in zip(pieces, known) for token in piece[max(1, seen) :]] == row
    assert all(
        piece[0] == tokenizer.bos_token_id and max(1, seen) < len(piece) <= window + 1
        for piece, seen in zip(pieces, known)
    )
    places = [place * stride for place in range(len(pieces))]
    assert [piece[1:] for piece in pieces] == [row[place : place + window] for place in places]


@given(texts=corpora, window=st.integers(1, 14), data=st.data())
def test_tokens_of_windows(model, tokenizer, texts, window, data):
    """Each has the log-probability that a plain pass over its own window gives it."""
    stride = data.draw(st.integers(1, window))
    stats = get_stats_over_corpus(
        model, tokenizer, texts, split_method="token", window=window, stride=stride
    )
    pieces, known = split_corpus(tokenizer, texts, "token", window, stride)
    assert stats.tokens == len(whole_row(tokenizer, texts))
    assert_stats(
        stats,
        [plain_logprobs(model, piece)[max(1, seen) - 1 :] for piece, seen in zip(pieces, known)],
    )


def test_windows_that_overlap_know_more(model, tokenizer):
    """The same tokens, with more in front of them.

    On text that the model knows, a lower perplexity.
    """
    texts = list(itertools.islice(grammar.documents(777_000_112), 40))
    apart, overlapping = (
        get_stats_over_corpus(
            model, tokenizer, texts, split_method="token", window=24, stride=stride
        )
        for stride in (24, 6)
    )
    assert apart.tokens == overlapping.tokens and overlapping.perplexity < 0.95 * apart.perplexity


def test_long_texts_are_cut_without_a_warning(tokenizer):
    """That a text is longer than the model is no news where it is cut into windows."""
    records, other = [], copy.deepcopy(tokenizer)
    other.deprecation_warnings = {}  # it warns once
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # whatever other tests left
    logger.addHandler(handler)
    try:
        split_corpus(other, "I love the garden. " * 100, "token")
        assert records == []
        other("I love the garden. " * 100)
        assert len(records) == 1  # what would have been said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# --- the perplexity of a corpus ---


def test_a_corpus_in_one_piece(model, tokenizer):
    """Its perplexity is the exponential of the loss that a plain pass gives."""
    ids = torch.tensor([with_bos(tokenizer, OFF[0])])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    stats = get_stats_over_corpus(
        model, tokenizer, OFF[0], split_method="token", window=100, stride=100
    )
    assert (
        stats.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        and stats.tokens == ids.shape[1] - 1
    )
    assert stats.avg_logprob == pytest.approx(-loss, abs=1e-4) and len(stats.logprobs) == 1


def test_sentences_are_read_one_by_one(model, tokenizer):
    """Each with BOS in front and nothing else, in the order of the corpus."""
    stats = get_stats_over_corpus(model, tokenizer, OFF)
    assert_stats(
        stats,
        [plain_logprobs(model, with_bos(tokenizer, sentence)) for sentence in sentences_of(OFF)],
    )
    assert len(stats.logprobs) == 4


@given(
    texts=corpora,
    batch_size=st.integers(1, 5),
    how=st.sampled_from(["additions", "prompt", "vector", None]),
)
def test_batches_change_nothing(model, tokenizer, additions, texts, batch_size, how):
    """Nor does what else is in the corpus."""
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({3: torch.randn(model.config.hidden_size, generator=generator)})
    condition = {
        "additions": additions,
        "prompt": " weddings",
        "vector": lambda: vector.apply(model),
        None: None,
    }[how]
    texts = [text + " is old." for text in texts]
    together = get_stats_over_corpus(
        model, tokenizer, texts, condition, mask_len=2, batch_size=batch_size
    )
    assert_stats(
        together,
        [
            get_stats_over_corpus(model, tokenizer, text, condition, mask_len=2).logprobs[0]
            for text in texts
        ],
    )


@pytest.mark.parametrize("mask_len", [0, 1, 2, 3, 7, 10])
def test_masked_positions_do_not_count(model, tokenizer, mask_len):
    """BOS is position 0 and never counts; a sentence that ends before the mask does is no piece."""
    stats = get_stats_over_corpus(model, tokenizer, ON + OFF, mask_len=mask_len)
    expected = [
        plain_logprobs(model, with_bos(tokenizer, sentence))[mask_len:]
        for sentence in sentences_of(ON + OFF)
    ]
    assert_stats(stats, [piece for piece in expected if len(piece)])
    assert (len(stats.logprobs) < len(expected)) == (mask_len >= 7)


@given(window=st.integers(2, 14), mask_len=st.integers(0, 14), data=st.data())
def test_masks_and_windows(tokenizer, model, window, mask_len, data):
    """A token does not count where its window masks it, or an earlier window had it."""
    stride = data.draw(st.integers(1, window))
    pieces, known = split_corpus(tokenizer, OFF, "token", window, stride)
    expected = [
        plain_logprobs(model, piece)[max(mask_len, seen - 1) :]
        for piece, seen in zip(pieces, known)
    ]
    how = {"split_method": "token", "window": window, "stride": stride, "mask_len": mask_len}
    if not sum(map(len, expected)):
        with pytest.raises(ValueError, match=f"no piece is longer than the {mask_len} positions"):
            get_stats_over_corpus(model, tokenizer, OFF, **how)
        return
    assert_stats(
        get_stats_over_corpus(model, tokenizer, OFF, **how),
        [piece for piece in expected if len(piece)],
    )


# --- conditions ---


@pytest.mark.parametrize("mask_len", [0, 2])
def test_a_prompt_does_not_count(model, tokenizer, mask_len):
    """It stands between BOS and each sentence.

    The tokens that count are those that count without it.
    """
    prompt = " I talk about weddings."
    stats, plain = (
        get_stats_over_corpus(model, tokenizer, ON, how, mask_len=mask_len)
        for how in (prompt, None)
    )
    bos, *inserted = with_bos(tokenizer, prompt)
    rows = [[bos, *inserted, *with_bos(tokenizer, sentence)[1:]] for sentence in sentences_of(ON)]
    assert_stats(stats, [plain_logprobs(model, row)[len(inserted) + mask_len :] for row in rows])
    assert stats.tokens == plain.tokens and abs(stats.perplexity / plain.perplexity - 1) > 0.01


def test_additions_are_those_of_a_plain_pass(model, tokenizer, additions):
    """At the front of each sentence, BOS included."""
    stats = get_stats_over_corpus(model, tokenizer, OFF, additions)
    expected = []
    for sentence in sentences_of(OFF):
        with apply_activation_additions(model, tokenizer, additions):
            expected.append(plain_logprobs(model, with_bos(tokenizer, sentence)))
    assert_stats(stats, expected)
    plain = get_stats_over_corpus(model, tokenizer, OFF).logprobs
    assert all(np.abs(one - other).max() > 0.5 for one, other in zip(stats.logprobs, plain))


def test_a_callable_makes_any_steering(model, tokenizer, additions):
    """A vector, and additions that are called: one anew for each batch."""
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({3: torch.randn(model.config.hidden_size, generator=generator)})
    made = []

    def steering():
        made.append(1)
        return vector.apply(model, multiplier=2.0)

    stats = get_stats_over_corpus(model, tokenizer, OFF, steering, batch_size=2)
    with vector.apply(model, multiplier=2.0):
        assert_stats(
            stats,
            [
                plain_logprobs(model, with_bos(tokenizer, sentence))
                for sentence in sentences_of(OFF)
            ],
        )
    assert len(made) == 2
    called = get_stats_over_corpus(
        model, tokenizer, OFF, lambda: apply_activation_additions(model, tokenizer, additions)
    )
    assert_stats(called, get_stats_over_corpus(model, tokenizer, OFF, additions).logprobs)


@given(texts=corpora, layer=st.integers(0, 5))
def test_no_steering_has_ratio_1(model, tokenizer, texts, layer):
    """Coefficient 0, no additions, a callable without any, None."""
    nothing = {
        "0": get_x_vector("Love", "Hate", 0, layer),
        "empty": [],
        "none": None,
        "called": lambda: apply_activation_additions(model, tokenizer, []),
    }
    frame = perplexity_ratios(
        model, tokenizer, {"texts": [text + " is old" for text in texts]}, nothing, bootstrap=20
    )
    assert frame["condition"].tolist() == list(nothing)
    np.testing.assert_allclose(frame[["ratio", "low", "high"]], 1, atol=1e-6)


# --- ratios ---


@pytest.fixture(scope="module")
def conditions(model, additions):
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({3: torch.randn(model.config.hidden_size, generator=generator)})
    longer = ActivationAddition(1.0, 3, "I talk about weddings")
    return {
        "steering": additions,
        "prompting": " weddings",
        "vector": lambda: vector.apply(model),
        "longer": [*additions, longer],
    }


def test_columns_of_the_ratios(model, tokenizer, conditions):
    """The ratio is that of two perplexities on the same tokens.

    By default the longest addition is masked.
    """
    texts = {"on": ON, "off": OFF}
    frame = perplexity_ratios(model, tokenizer, texts, conditions)
    assert list(frame.columns) == [
        "text",
        "condition",
        "ratio",
        "low",
        "high",
        "unsteered",
        "tokens",
        "pieces",
    ]
    assert list(zip(frame["text"], frame["condition"])) == list(
        itertools.product(texts, conditions)
    )
    for row in frame.itertuples():
        plain, found = (
            get_stats_over_corpus(model, tokenizer, texts[row.text], how, mask_len=5)
            for how in (None, conditions[row.condition])
        )
        assert row.unsteered == pytest.approx(plain.perplexity, rel=1e-5)
        assert row.ratio == pytest.approx(found.perplexity / plain.perplexity, rel=1e-4)
        assert (row.tokens, row.pieces) == (
            plain.tokens,
            len(plain.logprobs),
        ) and row.tokens == found.tokens
    fewer = {name: conditions[name] for name in ("prompting", "vector", "steering")}
    for some, mask_len in ((conditions, 5), (fewer, 2), ({"prompting": " weddings"}, 0)):
        by_default, masked = (
            perplexity_ratios(model, tokenizer, texts, some, mask_len=length, bootstrap=20)
            for length in (None, mask_len)
        )
        pd.testing.assert_frame_equal(by_default, masked)
    other = perplexity_ratios(model, tokenizer, texts, fewer, mask_len=4)
    assert (other["tokens"] < perplexity_ratios(model, tokenizer, texts, fewer)["tokens"]).all()


def test_settings_reach_the_corpus(model, tokenizer, additions):
    """Windows as well as sentences."""
    windows = {"split_method": "token", "window": 9, "stride": 4, "mask_len": 3}
    frame = perplexity_ratios(
        model, tokenizer, {"off": OFF}, {"steering": additions}, batch_size=2, **windows
    )
    plain, found = (
        get_stats_over_corpus(model, tokenizer, OFF, how, **windows) for how in (None, additions)
    )
    assert (
        frame["ratio"][0] == pytest.approx(found.perplexity / plain.perplexity, rel=1e-4)
        and frame["tokens"][0] == plain.tokens
    )


def test_intervals(model, tokenizer, additions):
    """Around the ratio, the same for the same seed, and the ratio whatever the seed.

    The same text again makes them narrower.
    """
    texts, conditions = (
        {"off": list(itertools.islice(grammar.documents(777_000_113), 12))},
        {"steering": additions, "prompting": " weddings"},
    )
    first, again, other = (
        perplexity_ratios(model, tokenizer, texts, conditions, seed=seed, bootstrap=300)
        for seed in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(first, again)
    assert first["ratio"].equals(other["ratio"]) and not first["low"].equals(other["low"])
    assert ((first["low"] < first["ratio"]) & (first["ratio"] < first["high"])).all()
    four = perplexity_ratios(model, tokenizer, {"off": 4 * texts["off"]}, conditions, bootstrap=300)
    np.testing.assert_allclose(four["ratio"], first["ratio"], rtol=1e-4)
    # Four times the pieces: half the width.
    np.testing.assert_allclose(
        (four["high"] - four["low"]) / (first["high"] - first["low"]), 0.5, atol=0.15
    )


@pytest.mark.parametrize(("pieces", "expected"), [(5, 0.91), (8, 0.94), (20, 0.94)])
def test_intervals_hold_the_truth_as_often_as_the_docstring_says(pieces, expected):
    """Pieces of 3 to 30 tokens, half with the noise in each token and half with it in each piece.

    A known true ratio.
    """
    rng, truth, hits = np.random.default_rng(0), math.exp(-0.05), 0
    for case in range(1200):
        lengths = rng.integers(3, 31, size=pieces)
        spread = np.sqrt(lengths) * 0.5 if case % 2 else lengths * 0.15
        gains = -0.05 * lengths + spread * rng.normal(size=pieces)
        (low,), (high,) = ratio_intervals(gains[None], lengths, 400, rng)
        hits += low <= truth <= high
    assert hits / 1200 == pytest.approx(expected, abs=0.02)


def test_intervals_are_over_pieces_of_different_lengths(model, tokenizer, additions):
    """With two pieces all can be said: the ends are the ratios of the one and of the other."""
    pieces = [
        "They are charming people.",
        "The old library is on the old bridge behind the mill and the garden.",
    ]
    frame = perplexity_ratios(
        model, tokenizer, {"both": pieces} | dict(zip("ab", pieces)), {"steering": additions}
    )
    both, a, b = frame["ratio"]
    assert [frame["low"][0], frame["high"][0]] == pytest.approx(
        [min(a, b), max(a, b)], rel=1e-5
    ) and min(a, b) < both < max(a, b)
    np.testing.assert_allclose(frame[["low", "high"]][1:], np.array([[a, a], [b, b]]), rtol=1e-6)
    none = perplexity_ratios(
        model, tokenizer, {"a": pieces[0]}, {"steering": additions}, bootstrap=0
    )
    assert none["ratio"][0] == pytest.approx(a) and none[["low", "high"]].isna().all(axis=None)


def test_intervals_are_as_wide_as_the_standard_error_says(model, tokenizer, additions):
    """2 times 1.96 standard errors of the logarithm, for a ratio of sums."""
    texts = list(itertools.islice(grammar.documents(777_000_115), 60))
    frame = perplexity_ratios(model, tokenizer, {"off": texts}, {"steering": additions}, mask_len=2)
    plain, found = (
        get_stats_over_corpus(model, tokenizer, texts, how, mask_len=2) for how in (None, additions)
    )
    gains = np.array([(one - other).sum() for one, other in zip(plain.logprobs, found.logprobs)])
    lengths = np.array([len(piece) for piece in plain.logprobs])
    error = np.sqrt(((gains - gains.sum() / lengths.sum() * lengths) ** 2).sum()) / lengths.sum()
    assert math.log(frame["high"][0] / frame["low"][0]) == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_long_pieces_weigh_more_in_an_interval(model, tokenizer, additions):
    """A token is a token.

    Where long pieces and short ones differ, the interval lies around the ratio of all tokens.
    """
    documents = list(itertools.islice(grammar.documents(777_000_114), 40))
    long = [
        re.sub("[.!?]", ",", " ".join(documents[start : start + 4])) + "."
        for start in range(0, 40, 4)
    ]
    short = [split_sentences(document)[0] for document in documents]
    frame = perplexity_ratios(
        model,
        tokenizer,
        {"both": long + short, "long": long, "short": short},
        {"steering": additions},
        mask_len=2,
    )
    both, of_long, of_short = frame.itertuples()
    assert of_long.high < of_short.low and both.low < both.ratio < both.high
    per_piece = math.exp((10 * math.log(of_long.ratio) + 40 * math.log(of_short.ratio)) / 50)
    assert not both.low < per_piece < both.high


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tokenizer, additions):
    """Padding on the right changes no sentence; in bf16, log-probabilities are computed in fp32."""
    other = tiny_model(name, len(tokenizer))
    conditions = {"steering": get_x_vector("Love", "Hate", 4, 2), "prompting": " weddings"}
    together, alone = (
        perplexity_ratios(other, tokenizer, {"off": OFF}, conditions, batch_size=size, bootstrap=5)
        for size in (32, 1)
    )
    np.testing.assert_allclose(
        together[["ratio", "unsteered"]], alone[["ratio", "unsteered"]], rtol=1e-3
    )
    coarse = get_stats_over_corpus(other.bfloat16(), tokenizer, OFF[0], batch_size=1)
    assert coarse.logprobs[0].dtype == np.float32
    np.testing.assert_allclose(
        coarse.logprobs[0],
        plain_logprobs(other, with_bos(tokenizer, split_sentences(OFF[0])[0])),
        atol=1e-5,
    )


# --- errors, and the model afterwards ---


@pytest.mark.parametrize(
    "texts, given, says",
    [
        ([], {}, "expected texts"),
        ("", {}, "expected texts"),
        ([" ", "\n"], {}, "expected texts"),
        (["I love it.", None], {}, "expected texts"),
        ([3], {}, "expected texts"),
        (OFF, {"split_method": "word"}, "'sentence' or 'token' as split_method, got 'word'"),
        (
            OFF,
            {"split_method": "token", "stride": 0},
            "a stride from 1 to the window of 32 tokens, got 0",
        ),
        (OFF, {"split_method": "token", "window": 8, "stride": 9}, "window of 8 tokens, got 9"),
        (OFF, {"condition": ""}, "a text to prompt with"),
        (OFF, {"mask_len": 99}, "no piece is longer than the 99 positions"),
        (OFF, {"mask_len": -1}, "an integer of 0 or more as mask_len, got -1"),
        (OFF, {"batch_size": 0}, "an integer of 1 or more as batch_size, got 0"),
        (
            "the garden " * 200,
            {},
            r"longer than the 256 positions of the model: use split_method='token'",
        ),
        (
            "the garden " * 200,
            {"split_method": "token", "window": 300},
            "longer than the 256 positions",
        ),
        ("the garden " * 100, {"condition": "the garden " * 100}, "longer than the 256 positions"),
        (
            "I am.",
            {
                "condition": get_x_vector(
                    "I love you because they are", "I hate you because they are", 1, 3
                )
            },
            "a prompt only",
        ),
        (OFF, {"condition": ["Love"]}, "expected ActivationAdditions"),
    ],
)
def test_mistakes_are_named(model, tokenizer, texts, given, says):
    """And the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        get_stats_over_corpus(model, tokenizer, texts, **given)
    assert_pristine(model, before)


@pytest.mark.parametrize(
    "texts, conditions", [({}, {"a": []}), ({"off": OFF}, {}), (OFF, {"a": []}), ({"off": OFF}, [])]
)
def test_ratios_need_names(model, tokenizer, texts, conditions):
    with pytest.raises(ValueError, match="texts and conditions by name"):
        perplexity_ratios(model, tokenizer, texts, conditions)


@pytest.mark.parametrize("split_method", ["sentence", "token"])
@pytest.mark.parametrize("stride", [32, 8])
def test_without_bos_the_pieces_are_the_same(tokenizer, split_method, stride):
    """A tokenizer without BOS, and one that is told to leave it out.

    The pieces and what counts of them, one place earlier.
    """
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    pieces, known = split_corpus(tokenizer, OFF, split_method, stride=stride)
    for found in (
        split_corpus(other, OFF, split_method, stride=stride),
        split_corpus(tokenizer, OFF, split_method, 32, stride, False),
    ):
        assert found == ([piece[1:] for piece in pieces], [max(0, seen - 1) for seen in known])


def test_a_piece_as_long_as_the_model_is_read(model, tokenizer):
    """One token more is too long."""
    text = "the" + " garden" * 254
    assert (
        get_stats_over_corpus(
            model, tokenizer, text, split_method="token", window=255, stride=255
        ).tokens
        == 255
    )
    with pytest.raises(ValueError, match="a piece of 257 tokens is longer than the 256 positions"):
        get_stats_over_corpus(
            model, tokenizer, text + " garden", split_method="token", window=256, stride=256
        )


def test_the_model_is_as_it_was(model, tokenizer, conditions):
    """Afterwards, and after an error inside the steering."""
    before = snapshot(model)
    perplexity_ratios(model, tokenizer, {"on": ON, "off": OFF}, conditions, bootstrap=5)
    assert_pristine(model, before)

    def broken(module, args, output):
        raise KeyError("broken")

    handle = model.transformer.h[5].register_forward_hook(broken)
    try:
        for how in conditions.values():
            with pytest.raises(KeyError, match="broken"):
                get_stats_over_corpus(model, tokenizer, OFF, how, mask_len=5)
    finally:
        handle.remove()
    assert_pristine(model, before)


# --- the picture ---


def drawn(figure) -> tuple[list[float], list[tuple[float, float]], list[str]]:
    """The points, the ends of their bars, and the numbers beside them."""
    axes = figure.axes[0]
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    assert [line for _, line in points] == list(range(len(points)))
    segments = [container.lines[2][0].get_segments()[0] for container in axes.containers]
    ends = [tuple(segment[:, 0]) if len(segment) else (math.nan, math.nan) for segment in segments]
    return [ratio for ratio, _ in points], ends, [text.get_text() for text in axes.texts]


def test_the_picture_is_the_table(model, tokenizer, conditions):
    """One line for each row: point, interval, number and label.

    The colour says on which side of 1 the interval lies.
    """
    frame = perplexity_ratios(model, tokenizer, {"on": ON, "off": OFF}, conditions)
    frame.loc[0, ["ratio", "low", "high"]] = 0.8, 0.7, 0.9
    frame.loc[1, ["ratio", "low", "high"]] = 1.2, 1.1, 1.4
    frame.loc[2, ["ratio", "low", "high"]] = 0.95, 0.9, 1.1
    figure = plot_perplexity_ratios(frame, "Embedded model")
    (axes,), (ratios, ends, numbers) = figure.axes, drawn(figure)
    np.testing.assert_allclose(ratios, frame["ratio"])
    np.testing.assert_allclose(ends, frame[["low", "high"]])
    assert numbers == [f"{ratio:.3f}" for ratio in frame["ratio"]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{row.condition}, {row.text}" for row in frame.itertuples()
    ]
    assert [container.lines[0].get_color() for container in axes.containers][:3] == [
        "tab:green",
        "tab:red",
        "0.5",
    ]
    assert axes.yaxis_inverted() and axes.get_title() == "Embedded model"
    figure.canvas.draw()
    boxes = [
        text.get_window_extent()
        for text in (*axes.get_yticklabels(), *axes.texts, axes.title, axes.xaxis.label)
    ]
    assert all(figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max) for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_intervals_that_are_no_intervals_are_drawn(tmp_path):
    """None, one that rounding shifted, and a point."""
    frame = pd.DataFrame(
        {
            "text": "t",
            "condition": list("abc"),
            "ratio": [0.9, 0.9, 1.2],
            "low": [np.nan, np.nextafter(0.9, 1), 1.2],
            "high": [np.nan, 1.0, 1.2],
        }
    )
    figure = plot_perplexity_ratios(frame)
    figure.savefig(tmp_path / "picture.png")
    ratios, ends, numbers = drawn(figure)
    assert ratios == [0.9, 0.9, 1.2] and numbers == ["0.900", "0.900", "1.200"]
    np.testing.assert_allclose(ends, [(math.nan, math.nan), (0.9, 1.0), (1.2, 1.2)])


# --- what measuring.ipynb claims ---


def test_steering_towards_weddings_makes_them_likelier_than_the_rest(model, tokenizer):
    """On sentences that no training has seen.

    Those with a wedding word, and those of documents without any. What steering wins on the topic
    is more than what it costs elsewhere. A word in the prompt wins more, and costs more.
    """
    on, off = grammar.topic_sentences(777_000_111, 500, 1000)
    conditions = {"steering": topic_vector(model).additions(tokenizer), "prompting": " weddings"}
    frame = perplexity_ratios(model, tokenizer, {"on": on, "off": off}, conditions)
    ratio = frame.set_index(["condition", "text"])["ratio"]
    assert (frame["pieces"] > 400).all()
    assert ratio["steering", "on"] < 0.9 and ratio["prompting", "on"] < 0.9
    assert ratio["steering", "on"] * ratio["steering", "off"] < 0.98
    assert ratio["prompting", "on"] < ratio["steering", "on"]
    assert 0.9 < ratio["steering", "off"] < ratio["prompting", "off"]
