"""Next-token probabilities.

How the divergence splits, which tokens changed, and what the pictures draw.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import gemma
from support import KNOWN_WORDS

from common import (
    apply_activation_additions,
    effectiveness_and_disruption,
    get_x_vector,
    next_token_probs,
    plot_effectiveness_and_disruption,
    plot_top_changed_tokens,
    top_changed_tokens,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.next_token import split_divergence, token_set
from common.vectors.activation_additions import with_bos

PROMPT = "I went up to my friend and said that the"
ALIGNED = ["wedding", "bride", "groom"]
WORDS = ["love", "hate", "garden", "wedding", "bride", "old"]
prompts = st.lists(st.sampled_from(KNOWN_WORDS), min_size=2, max_size=8).map(" ".join)


@pytest.fixture(scope="module")
def steering(model, tokenizer):
    """What makes the wedding steering, anew each time."""
    return lambda: apply_activation_additions(model, tokenizer, get_x_vector(" weddings", "", 4, 2))


@pytest.fixture(autouse=True)
def closed():
    """Pictures do not pile up."""
    yield
    plt.close("all")


def plain_probs(model, tokenizer, prompt: str) -> torch.Tensor:
    """The probabilities after BOS and a prompt, [pos, vocab], from one plain pass."""
    with torch.no_grad():
        return model(torch.tensor([with_bos(tokenizer, prompt)])).logits[0].float().softmax(-1)


def kl(q: torch.Tensor, p: torch.Tensor) -> float:
    """KL(q || p) of two distributions without zeros, in fp64."""
    return (q.double() * (q.double() / p.double()).log()).sum().item()


# --- probabilities ---


@given(prompt=prompts, steered=st.booleans())
def test_rows_are_distributions(model, tokenizer, steering, prompt, steered):
    """One for each token and BOS; those of a plain pass, steered or not."""
    found = next_token_probs(model, tokenizer, prompt, steering if steered else None)
    assert (
        found.shape == (len(with_bos(tokenizer, prompt)), len(tokenizer))
        and found.dtype == torch.float32
    )
    assert (found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(len(found)), atol=1e-5)
    if steered:
        with steering():
            assert torch.allclose(found, plain_probs(model, tokenizer, prompt), atol=1e-6)
    else:
        assert torch.allclose(found, plain_probs(model, tokenizer, prompt), atol=1e-6)


def test_without_bos(model, tokenizer):
    found = next_token_probs(model, tokenizer, PROMPT, prepend_bos=False)
    with torch.no_grad():
        assert torch.allclose(
            found, model(**tokenizer(PROMPT, return_tensors="pt")).logits[0].softmax(-1), atol=1e-6
        )
    with pytest.raises(ValueError, match="empty"):
        next_token_probs(model, tokenizer, "", prepend_bos=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_in_bf16(name, tokenizer):
    """Probabilities are fp32 whatever the model is, and sum to 1 as such."""
    found = next_token_probs(tiny_model(name, len(tokenizer)).bfloat16(), tokenizer, PROMPT)
    assert found.dtype == torch.float32 and torch.allclose(
        found.sum(-1), torch.ones(len(found)), atol=1e-5
    )


# --- words that are one token ---


def test_both_forms_of_a_word(tokenizer):
    """With and without a space in front; once each, in any order and whatever the space around."""
    ids = token_set(tokenizer, ["wonderful", " awful "])
    assert sorted(tokenizer.decode([token]) for token in ids) == [
        " awful",
        " wonderful",
        "awful",
        "wonderful",
    ]
    assert ids == token_set(tokenizer, ["awful", "wonderful", " wonderful"]) == sorted(ids)


def test_one_form_is_enough():
    """GPT-2 has ' wedding' and not 'wedding': that one is taken."""

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [7] if text == " wedding" else [1, 2]}

        def decode(self, ids):
            return {(7,): " wedding"}[tuple(ids)]

    assert token_set(Tokenizer(), ["wedding"]) == [7]


def test_what_a_tokenizer_does_not_know_is_no_token():
    """Gemma has "I", and makes one "<unk>" of a letter that it never saw."""
    tokenizer = gemma()
    assert tokenizer("Ж", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    with pytest.raises(ValueError, match="'Ж' is not a single token of this tokenizer"):
        token_set(tokenizer, ["I", "Ж"])
    assert "I" in map(tokenizer.decode, token_set(tokenizer, ["I"]))


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "list of words"),
        ("wedding", "list of words"),
        ([""], "list of words"),
        (["bride", " "], "list of words"),
        ([3], "list of words"),
        (["bride", "weddinggroom"], "'weddinggroom' is not a single token"),
        (["old garden"], "'old garden' is not a single token"),
    ],
)
def test_other_words_are_refused(tokenizer, words, says):
    with pytest.raises(ValueError, match=says):
        token_set(tokenizer, words)


# --- which tokens changed ---


@given(prompt=prompts, coeff=st.floats(-4, 4), by=st.sampled_from(["kl", "probability"]))
def test_shares_of_all_tokens_are_the_divergence(model, tokenizer, prompt, coeff, by):
    """The column `kl` over the whole vocabulary sums to the divergence.

    The probabilities to 1.
    """

    def steering():
        return apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", coeff, 3))

    frame = top_changed_tokens(model, tokenizer, prompt, steering, len(tokenizer), by)
    p, q = (next_token_probs(model, tokenizer, prompt, how)[-1] for how in (None, steering))
    assert frame["kl"].sum() == pytest.approx(kl(q, p), abs=1e-4, rel=1e-3) and len(frame) == len(
        tokenizer
    )
    assert [frame["unsteered"].sum(), frame["steered"].sum()] == pytest.approx([1, 1], abs=1e-4)


def test_columns_of_the_changed_tokens(model, tokenizer, steering):
    """Each row is that of its token."""
    frame = top_changed_tokens(model, tokenizer, PROMPT, steering, 12)
    p, q = (
        next_token_probs(model, tokenizer, PROMPT, how)[-1].double().numpy()
        for how in (None, steering)
    )
    ids = [tokenizer(token)["input_ids"][0] for token in frame["token"]]
    assert (
        list(frame.columns) == ["token", "unsteered", "steered", "logprob_change", "kl"]
        and len(set(ids)) == 12
    )
    np.testing.assert_allclose(frame["unsteered"], p[ids], rtol=1e-5)
    np.testing.assert_allclose(frame["steered"], q[ids], rtol=1e-5)
    np.testing.assert_allclose(frame["logprob_change"], np.log(q[ids] / p[ids]), atol=1e-4)
    np.testing.assert_allclose(frame["kl"], q[ids] * np.log(q[ids] / p[ids]), atol=1e-4)


@pytest.mark.parametrize("by", ["kl", "probability", "logprob"])
def test_orders(model, tokenizer, steering, by):
    """The largest first, and none that is left out is larger than the last.

    Differences by their size.
    """
    p, q = (
        next_token_probs(model, tokenizer, PROMPT, how)[-1].double() for how in (None, steering)
    )
    sizes = {"kl": q * (q / p).log(), "probability": (q - p).abs(), "logprob": (q / p).log().abs()}[
        by
    ]
    if by == "logprob":
        sizes = sizes[torch.maximum(p, q) >= 1e-4]
    frame = top_changed_tokens(model, tokenizer, PROMPT, steering, 15, by)
    column = {
        "kl": frame["kl"],
        "probability": (frame["steered"] - frame["unsteered"]).abs(),
        "logprob": frame["logprob_change"].abs(),
    }[by]
    np.testing.assert_allclose(column, sizes.sort(descending=True).values[:15], rtol=1e-3)
    assert frame.index.tolist() == list(range(15))


def test_by_logprob_leaves_unlikely_tokens_out(model, tokenizer, steering):
    """Those that are unlikely both ways; each that is likely one way stays."""
    p, q = (next_token_probs(model, tokenizer, PROMPT, how)[-1] for how in (None, steering))
    for bound in (0, 1e-3, 0.05):
        frame = top_changed_tokens(
            model, tokenizer, PROMPT, steering, len(tokenizer), "logprob", bound
        )
        assert len(frame) == int((torch.maximum(p, q) >= bound).sum())
        assert frame[["unsteered", "steered"]].max(axis=1).min() >= bound
    assert 0 < len(frame) < 20 and len(
        top_changed_tokens(model, tokenizer, PROMPT, steering, len(tokenizer), "kl", 0.05)
    ) == len(tokenizer)


def test_no_steering_changes_no_token(model, tokenizer):
    nothing = top_changed_tokens(
        model,
        tokenizer,
        PROMPT,
        lambda: apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", 0, 3)),
    )
    assert (
        (nothing["kl"] == 0).all()
        and (nothing["logprob_change"] == 0).all()
        and (nothing["unsteered"] == nothing["steered"]).all()
    )


@pytest.mark.parametrize(
    "given, says",
    [
        ({"by": "loss"}, "kl, probability, logprob .* got 'loss'"),
        ({"count": 0}, "a count of 1 or more"),
        ({"count": True}, "True"),
        ({"count": 2.0}, "2.0"),
    ],
)
def test_unknown_orders_and_counts_are_refused(model, tokenizer, steering, given, says):
    with pytest.raises(ValueError, match=says):
        top_changed_tokens(model, tokenizer, PROMPT, steering, **given)


# --- effectiveness and disruption ---


@settings(max_examples=200)
@given(
    logits=st.lists(
        st.tuples(st.floats(-12, 12), st.floats(-12, 12), st.booleans()), min_size=2, max_size=9
    )
)
def test_the_divergence_splits(logits):
    """It is disruption plus the divergence of the two shares, with disruption as it is defined.

    None of them negative.
    """
    p, q, members = (torch.tensor(column) for column in zip(*logits))
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    found = split_divergence(p, q, members)
    assert found["kl"] == pytest.approx(kl(q, p), abs=1e-6)
    assert found["disruption"] >= -1e-9 and found["kl"] >= -1e-9
    if members.all() or not members.any():
        assert found["effectiveness"] == 0 and found["disruption"] == found["kl"]
        return
    sets = [(p[mask], q[mask]) for mask in (members, ~members)]
    assert found["effectiveness"] == pytest.approx(
        (sets[0][1].sum() / sets[0][0].sum()).log().item(), abs=1e-6
    )
    assert found["disruption"] == pytest.approx(
        sum(b.sum().item() * kl(b / b.sum(), a / a.sum()) for a, b in sets), abs=1e-6
    )
    shares = [torch.stack([inside[k].sum() for inside in sets]) for k in (0, 1)]
    assert found["kl"] == pytest.approx(found["disruption"] + kl(shares[1], shares[0]), abs=1e-6)


@given(
    logits=st.lists(st.floats(-8, 8), min_size=3, max_size=9),
    factor=st.floats(0.1, 30),
    data=st.data(),
)
def test_one_factor_for_all_aligned_tokens_disrupts_nothing(logits, factor, data):
    """Steering that only moves probability into the set is all effectiveness."""
    p = torch.tensor(logits).double().softmax(-1)
    members = torch.zeros(len(p), dtype=torch.bool)
    members[data.draw(st.lists(st.integers(0, len(p) - 2), min_size=1))] = True
    q = torch.where(members, factor * p, p)
    q = q / q.sum()
    found = split_divergence(p, q, members)
    assert found["disruption"] == pytest.approx(0, abs=1e-9)
    assert found["effectiveness"] == pytest.approx(
        (q[members].sum() / p[members].sum()).log().item(), abs=1e-9
    )


def test_probabilities_of_0_give_numbers():
    """What fp32 cannot hold is 0; every figure is finite all the same."""
    p, q = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    for members in (
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [False] * 3,
        [True] * 3,
    ):
        assert np.isfinite(list(split_divergence(p, q, torch.tensor(members)).values())).all()


@given(
    prompt=prompts,
    coeff=st.floats(-4, 4),
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4),
)
def test_every_position_of_a_prompt(model, tokenizer, prompt, coeff, words):
    """One row for each token that is read, BOS first, each with what its own distributions say."""

    def steering():
        return apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", coeff, 3))

    frame = effectiveness_and_disruption(model, tokenizer, prompt, steering, words)
    before, after = (next_token_probs(model, tokenizer, prompt, how) for how in (None, steering))
    inside = token_set(tokenizer, words)
    assert "".join(frame["token"]) == tokenizer.bos_token + prompt and frame.index.tolist() == list(
        range(len(before))
    )
    assert frame["kl"].tolist() == pytest.approx(
        [kl(q, p) for p, q in zip(before, after)], abs=1e-5
    )
    assert frame["effectiveness"].tolist() == pytest.approx(
        (after[:, inside].sum(-1).log() - before[:, inside].sum(-1).log()).tolist(), abs=1e-4
    )
    assert (frame["disruption"] >= -1e-9).all() and (
        frame["disruption"] <= frame["kl"] + 1e-9
    ).all()


def test_the_wedding_vector_is_effective(model, tokenizer, steering):
    """Words of weddings become likelier, and its opposite makes them less likely."""

    def away():
        return apply_activation_additions(model, tokenizer, get_x_vector(" weddings", "", -4, 2))

    found = [
        effectiveness_and_disruption(model, tokenizer, PROMPT, how, ALIGNED)["effectiveness"].iloc[
            -1
        ]
        for how in (steering, away)
    ]
    assert found[0] > 1 and found[1] < 0


def test_coefficient_0_is_neither_effective_nor_disruptive(model, tokenizer):
    def nothing():
        return apply_activation_additions(model, tokenizer, get_x_vector("Love", "Hate", 0, 3))

    frame = effectiveness_and_disruption(model, tokenizer, PROMPT, nothing, ALIGNED)
    assert (frame[["effectiveness", "disruption", "kl"]] == 0).all(axis=None)


def test_words_by_position(model, tokenizer, steering):
    """A position with words has its row of the whole, another one is all disruption.

    No words at all are the same.
    """
    whole = effectiveness_and_disruption(model, tokenizer, PROMPT, steering, ALIGNED)
    some = effectiveness_and_disruption(
        model, tokenizer, PROMPT, steering, {4: ALIGNED, 7: ["garden"], 6: []}
    )
    assert some.loc[4].equals(whole.loc[4]) and not np.isclose(
        some.loc[7, "effectiveness"], whole.loc[7, "effectiveness"]
    )
    rest = some.drop(index=[4, 7])
    assert (rest["effectiveness"] == 0).all() and (rest["disruption"] == rest["kl"]).all()
    none = effectiveness_and_disruption(model, tokenizer, PROMPT, steering, [])
    pd.testing.assert_frame_equal(none.drop(index=[4, 7]), rest)
    pd.testing.assert_series_equal(none["kl"], whole["kl"])


def test_masked_positions_are_left_out(model, tokenizer, steering):
    whole = effectiveness_and_disruption(model, tokenizer, PROMPT, steering, ALIGNED)
    for mask_len in (0, 2, len(whole) - 1):
        pd.testing.assert_frame_equal(
            effectiveness_and_disruption(model, tokenizer, PROMPT, steering, ALIGNED, mask_len),
            whole.loc[mask_len:],
        )


@pytest.mark.parametrize(
    "aligned, mask_len, says",
    [
        (
            {10: ALIGNED, 99: ALIGNED},
            0,
            "position 99 lies outside the prompt, which has positions 0 to 10",
        ),
        ({-1: ALIGNED}, 0, "position -1 lies outside"),
        (ALIGNED, 11, "mask_len from 0 to 10 .* 11 tokens, got 11"),
        (ALIGNED, -1, "got -1"),
        ("wedding", 0, "list of words"),
        (["weddinggroom"], 0, "not a single token"),
    ],
)
def test_mistakes_are_named(model, tokenizer, steering, aligned, mask_len, says):
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        effectiveness_and_disruption(model, tokenizer, PROMPT, steering, aligned, mask_len)
    assert_pristine(model, before)


def test_the_model_is_as_it_was(model, tokenizer, steering):
    """Also where the prompt is too short for the addition."""
    before = snapshot(model)
    top_changed_tokens(model, tokenizer, PROMPT, steering)
    effectiveness_and_disruption(model, tokenizer, PROMPT, steering, ALIGNED)
    with pytest.raises(ValueError, match="a prompt only 1"):
        next_token_probs(model, tokenizer, "", steering)
    assert_pristine(model, before)


# --- pictures ---


def test_bars_are_the_table(model, tokenizer, steering):
    """Two bars for each token, side by side, as high as the table says, with the token below."""
    frame = effectiveness_and_disruption(model, tokenizer, PROMPT, steering, ALIGNED, mask_len=2)
    (axes,) = plot_effectiveness_and_disruption(frame, "Embedded model").axes
    assert [bars.get_label() for bars in axes.containers] == [
        "effectiveness",
        "disruption",
    ] and axes.get_title() == "Embedded model"
    for bars, side in zip(axes.containers, (-1, 1)):
        assert [bar.get_height() for bar in bars] == frame[bars.get_label()].tolist()
        assert [
            round((bar.get_x() + bar.get_width() / 2 - place) / 0.2)
            for place, bar in enumerate(bars)
        ] == [side] * len(frame)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        token.replace(" ", "·") for token in frame["token"]
    ]
    assert list(axes.get_xticks()) == list(range(len(frame)))
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "effectiveness",
        "disruption",
    ]


def test_points_are_the_table(model, tokenizer, steering):
    """One line for each token, the first on top, from its unsteered to its steered probability."""
    frame = top_changed_tokens(model, tokenizer, PROMPT, steering, 8)
    frame.loc[3, "unsteered"] = 0.0
    (axes,) = plot_top_changed_tokens(frame, "Embedded model").axes
    for points, name in zip(axes.collections, ("unsteered", "steered")):
        assert points.get_label() == name
        np.testing.assert_allclose(
            points.get_offsets(),
            [(max(value, 1e-8), line) for line, value in enumerate(frame[name])],
            rtol=1e-6,
        )
    for line, (drawn, row) in enumerate(zip(axes.lines, frame.itertuples())):
        np.testing.assert_allclose(
            drawn.get_xydata(), [(max(row.unsteered, 1e-8), line), (row.steered, line)], rtol=1e-6
        )
    assert len(axes.lines) == len(frame) and axes.yaxis_inverted() and axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        token.replace(" ", "·") for token in frame["token"]
    ]


@pytest.mark.parametrize("tokens", [["$$", " $x_1$"], ["\n", "\t"], ["a\\", "{"]])
def test_any_token_can_be_a_label(tokens, tmp_path):
    """No token is a formula, and none is invisible."""
    changed = pd.DataFrame({"token": tokens, "unsteered": [0.1, 0.2], "steered": [0.3, 0.1]})
    along = pd.DataFrame({"token": tokens, "effectiveness": [1.0, 0.0], "disruption": [0.1, 0.2]})
    for figure, axis in (
        (plot_top_changed_tokens(changed), "yaxis"),
        (plot_effectiveness_and_disruption(along), "xaxis"),
    ):
        figure.savefig(tmp_path / "picture.png")
        labels = [label.get_text() for label in getattr(figure.axes[0], axis).get_ticklabels()]
        assert all(label.strip() for label in labels) and len(labels) == 2


def faults(figure) -> list[tuple[str, str]]:
    """The texts of a picture that are cut, the level ones that overlap.

    The legend where it lies on the plot.
    """
    figure.canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    ticks = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts = [
        text
        for text in (*ticks, axes.title, axes.xaxis.label, axes.yaxis.label, *legend.get_texts())
        if text.get_text()
    ]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    cut = [
        (name, "cut")
        for name, box in boxes
        if not figure.bbox.padded(1).containsx(box.x0)
        or not figure.bbox.padded(1).containsx(box.x1)
        or not figure.bbox.padded(1).containsy(box.y0)
        or not figure.bbox.padded(1).containsy(box.y1)
    ]
    # The boxes of slanted texts overlap where the texts do not.
    level = [pair for pair, text in zip(boxes, texts) if text.get_rotation() % 90 == 0] + [
        ("the plot", axes.get_window_extent())
    ]
    return cut + [
        (one, other)
        for i, (one, box) in enumerate(level)
        for other, second in level[:i]
        if box.overlaps(second)
    ]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_nothing_overlaps_or_is_cut(model, tokenizer, steering, count):
    """Whatever the number of tokens."""
    assert (
        faults(
            plot_top_changed_tokens(
                top_changed_tokens(model, tokenizer, PROMPT, steering, count), "Embedded model"
            )
        )
        == []
    )
    frame = effectiveness_and_disruption(
        model, tokenizer, " ".join([PROMPT] * 2), steering, ALIGNED
    ).iloc[:count]
    assert (
        faults(plot_effectiveness_and_disruption(frame, "Effectiveness in the embedded model"))
        == []
    )
