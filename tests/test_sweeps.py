"""Sweeps of tone: what is compared with what, and the figures that come of it."""

from contextlib import nullcontext

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from common.pictures import token_strip
from common.steering_vector import SteeringVector
from common.sweeps import moves, plot_moves, tone_by_prompt

PROMPTS = ["I think dogs are", "This year winter is"]


def test_conditions_differ_by_the_steering_only(model, tokenizer):
    """The same seed for all: an empty condition is the unsteered one, and a vector of no length as well."""
    nothing = SteeringVector({2: torch.ones(128)}).apply(model, multiplier=0.0)
    tones = tone_by_prompt(model, tokenizer, {"empty": nullcontext(), "nothing": nothing}, PROMPTS, per_prompt=3, max_new_tokens=6)
    assert list(tones.columns) == PROMPTS and list(tones.index) == ["unsteered", "empty", "nothing"]
    assert (tones == tones.loc["unsteered"]).all(axis=None) and (tones.abs() <= 1).all(axis=None)


def test_completions_belong_to_their_prompts(model, tokenizer, monkeypatch):
    """Row by row: a prompt gets the tone of its own completions, and not of its neighbour's."""
    monkeypatch.setattr("common.sweeps.completions", lambda tokenizer, inputs, ids: ["love", "hate"] * 3)
    assert tone_by_prompt(model, tokenizer, {}, PROMPTS, per_prompt=3, max_new_tokens=1).loc["unsteered"].tolist() == [1.0, -1.0]


def test_moves():
    """Mean, spread over the prompts, and the share that moved against the mean."""
    tones = pd.DataFrame({"a": [0.0, 0.5, -1.0], "b": [0.0, 1.0, 0.5], "c": [0.5, 0.0, 0.5]}, index=["unsteered", "up", "down"])
    table = moves(tones)
    assert table.loc["up", "moved"] == pytest.approx((0.5 + 1.0 - 0.5) / 3)
    assert table.loc["up", "wrong way"] == pytest.approx(1 / 3)
    assert table.loc["down", "moved"] == pytest.approx((-1 + 0.5 + 0) / 3)
    assert table.loc["down", "spread"] == pytest.approx(pd.Series([-1, 0.5, 0]).std())
    figure = plot_moves(tones, "title")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(table["moved"].tolist())
    plt.close(figure)


def test_token_strip_colours_what_is_marked():
    """One box for each token, coloured where it is marked; spaces are visible."""
    figure = token_strip([["I", " think"], ["You"]], [[1], []], ["a", "b"])
    boxes = figure.axes[0].patches
    assert [box.get_facecolor() == boxes[1].get_facecolor() for box in boxes] == [False, True, False]
    assert [text.get_text() for text in figure.axes[0].texts] == ["I", "·think", "You"]
    plt.close(figure)


@pytest.mark.parametrize("rows, marked, labels, says", [
    ([["I"]], [[1]], ["a"], "positions from 0 to 0"), ([["I"]], [[-1]], ["a"], "positions from 0 to 0"), ([["I"]], [[0]], [], "as many rows"),
])
def test_token_strip_refuses_what_does_not_fit(rows, marked, labels, says):
    """Positions outside the text, and lists of other lengths."""
    with pytest.raises(ValueError, match=says):
        token_strip(rows, marked, labels)
