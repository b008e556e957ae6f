"""All pictures have one style.

What each shows is tested beside its table, strips of tokens here.
"""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from common import plots
from common.measuring.effects import WorkingWindow
from common.plots import token_strip

LOVE = r"$\foo$ y"  # no formula that can be read; all of these are texts
SWEPT = pd.DataFrame(
    {
        "steering": ["unsteered", LOVE, LOVE, f"not {LOVE}", f"{LOVE}, random 1"],
        "kind": ["unsteered", "steering", "steering", "control", "random"],
        "layer": pd.array([None, 3, 3, 3, 3], "Int64"),
        "coeff": [0.0, 2.0, -2.0, 2.0, 2.0],
        "prompt": LOVE,
        LOVE: [0.0, 1.0, -1.0, 0.2, 0.1],
    }
)
CELLS = pd.DataFrame({"layer": [3], "coeff": [2.0], "effect": [1.0], "ratio": [1.1], "works": True})
DRAWN = {
    "plot_effectiveness_and_disruption": [
        pd.DataFrame({"token": [LOVE, " a"], "effectiveness": [1.0, 2.0], "disruption": [0.5, 0.1]})
    ],
    "plot_top_changed_tokens": [
        pd.DataFrame({"token": [LOVE, "\n"], "unsteered": [0.5, 0.0], "steered": [0.1, 0.2]})
    ],
    "plot_perplexity_ratios": [
        pd.DataFrame({"text": "on", "condition": LOVE, "ratio": [0.9], "low": 0.8, "high": 0.95})
    ],
    "plot_heat_map": [WorkingWindow(CELLS, 3, 2.0, "")],
    "plot_effect": [SWEPT, LOVE, 3],
    "plot_prompts": [SWEPT, LOVE, LOVE, 3, 2.0],
    "plot_moves": [pd.DataFrame({"I": [0.0, 0.5]}, index=["unsteered", LOVE])],
    "plot_line_up": [
        pd.DataFrame(
            {"prompt": [LOVE], "+3": " a", "steering": 30.0, "residual": 12.0, "ratio": 2.5}
        )
    ],
    "plot_shift": [
        {LOVE: torch.zeros(1, 2), f"to {LOVE}": torch.ones(1, 2)},
        (LOVE, f"not {LOVE}"),
        [LOVE],
    ],
    "plot_steerability": [
        pd.DataFrame(
            {
                "steering": [LOVE, LOVE, f"{LOVE}, random 1"],
                "kind": ["steering", "steering", "random"],
                "layer": pd.array([3, 3, 3], "Int64"),
                "slope": [0.5, -0.1, 0.0],
            }
        ),
        3,
    ],
    "plot_beside_controls": [
        pd.DataFrame(
            {
                "name": [LOVE, "random directions", "random directions"],
                "kind": ["vector", "random", "random"],
                "mean": [0.5, 0.1, -0.1],
                "low": [0.3, None, None],
                "high": [0.7, None, None],
            }
        ),
        LOVE,
    ],
    "plot_tones": [{"unsteered": {"positive": 0.3, "neither": 0.5, "negative": 0.2}}],
    "token_strip": [[[LOVE, " a"]], [[1]], [LOVE]],
}


def test_every_picture_is_here():
    assert DRAWN.keys() == {name for name in vars(plots) if name.startswith(("plot_", "token_"))}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_have_one_style_and_leave_that_of_the_caller(name):
    """No frame but around a heat map, a title, and no setting of matplotlib that stays changed.

    Whatever stands in titles, labels and names is shown as it is.
    """
    before = dict(matplotlib.rcParams)
    figure = getattr(plots, name)(*DRAWN[name], title=LOVE)
    assert dict(matplotlib.rcParams) == before
    titles = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
    assert LOVE.replace("$", r"\$") in titles
    assert type(figure.get_layout_engine()).__name__.startswith("Con")
    for axes in figure.axes:
        framed = {axes.spines[side].get_visible() for side in ("top", "right")}
        assert framed == {name == "plot_heat_map"}
    figure.canvas.draw()
    plt.close(figure)


def test_what_the_backend_of_a_notebook_asks_for_stays():
    """The first picture loads it, and it asks that each one be shown; the second must be, too."""

    @plots.styled
    def first() -> Figure:
        matplotlib.interactive(True)  # as the backend does when it is loaded
        return Figure()

    before = matplotlib.is_interactive()
    try:
        matplotlib.interactive(False)
        first()
        assert matplotlib.is_interactive()
    finally:
        matplotlib.interactive(before)


def test_plot_tones_draws_a_whole_bar_for_each_condition():
    """Positive, neither and negative from left to right, as wide as their shares."""
    shares = {
        "unsteered": {"positive": 0.25, "negative": 0.25, "neither": 0.5},
        "to Love": {"negative": 0.0, "neither": 0.02, "positive": 0.98},
        "random": {"positive": 0.05, "neither": 0.91, "negative": 0.04},
    }
    figure = plots.plot_tones(shares)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares)
    for line, share in enumerate(shares.values()):
        positive, neither, negative = (bars[line] for bars in axes.containers)
        assert positive.get_x() == 0 and positive.get_width() == share["positive"]
        assert neither.get_x() == share["positive"]
        assert negative.get_width() == pytest.approx(share["negative"])
        assert negative.get_x() + negative.get_width() == pytest.approx(1)
    numbers = [text.get_text() for text in axes.texts]  # none where there is no room
    assert sorted(numbers) == ["25%", "25%", "5%", "50%", "91%", "98%"]
    assert axes.texts[0].get_position() == (0.125, 0)  # in the middle of its part
    inks = [to_rgba(colour) for colour in (plots.STEERED, plots.REVERSED)]
    assert [bars[0].get_facecolor() for bars in axes.containers][::2] == inks
    top, bottom = reversed(axes.get_ylim())
    assert top < bottom and axes.get_xlim() == (0, 1)  # the first one is above the others
    assert axes.xaxis.get_major_formatter()(0.5) == "50%"
    plt.close(figure)


def test_labels_of_tones_are_text():
    """A dollar begins no formula, be it one that can be read or not."""
    names = [r"from $1 to $\what", "costs $5", "[b]"]
    figure = plots.plot_tones(dict.fromkeys(names, DRAWN["plot_tones"][0]["unsteered"]))
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [text.replace(r"\$", "$") for text in shown] == names
    assert all(text.count("$") == text.count(r"\$") for text in shown)
    plt.close(figure)


def test_token_strip_colours_what_is_marked():
    """One box for each token, coloured where it is marked; spaces are visible."""
    figure = token_strip([["I", " think"], ["You"]], [[1], []], ["a", "b"])
    boxes = figure.axes[0].patches
    assert [box.get_facecolor() == boxes[1].get_facecolor() for box in boxes] == [
        False,
        True,
        False,
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["I", "·think", "You"]
    plt.close(figure)


@pytest.mark.parametrize(
    "rows, marked, labels, says",
    [
        ([["I"]], [[1]], ["a"], "positions from 0 to 0"),
        ([["I"]], [[-1]], ["a"], "positions from 0 to 0"),
        ([["I"]], [[0]], [], "as many rows"),
    ],
)
def test_token_strip_refuses_what_does_not_fit(rows, marked, labels, says):
    """Positions outside the text, and lists of other lengths."""
    with pytest.raises(ValueError, match=says):
        token_strip(rows, marked, labels)


def test_plot_shift_draws_an_arrow_for_each_point():
    """Arrows go from the unsteered points to the others; other shapes are refused."""
    start, end = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[4.0, 1.0], [6.0, 3.0]])
    figure = plots.plot_shift({"unsteered": start, "to Love": end}, ("x", "y"), ["a", "b"])
    arrows = [text for text in figure.axes[0].texts if text.arrow_patch]
    assert [(*text.xyann, *text.xy) for text in arrows] == [(0, 1, 4, 1), (2, 3, 6, 3)]
    plt.close(figure)
    with pytest.raises(ValueError, match=r"shape \[2, 2\] for 'to Love', got \[1, 2\]"):
        plots.plot_shift({"unsteered": start, "to Love": end[:1]}, ("x", "y"), ["a", "b"])
    many = dict.fromkeys("abcde", start)
    with pytest.raises(ValueError, match="up to three more, got 5"):
        plots.plot_shift(many, ("x", "y"), ["a", "b"])


def test_labels_of_points_at_one_height_stand_above_and_below():
    """So both can be read; two that are far apart in height may stand on the same side."""
    start, end = torch.tensor([[0.0, 1.0], [0.1, 1.0]]), torch.tensor([[2.0, 1.0], [2.1, 1.0]])
    figure = plots.plot_shift({"unsteered": start, "to Love": end}, ("x", "y"), ["a", "b"])
    sides = {text.get_text(): text.xyann[1] for text in figure.axes[0].texts if text.get_text()}
    assert sorted(sides) == ["a", "b"] and sides["a"] * sides["b"] < 0


def test_a_dot_at_zero_is_whole():
    """The axis goes on beyond 0, where every bar begins."""
    tones = pd.DataFrame({"p": [0.0, 0.5], "q": [0.0, 0.0]}, index=["unsteered", "steered"])
    assert plots.plot_moves(tones).axes[0].get_xlim()[0] < 0
