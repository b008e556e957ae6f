"""Pictures that several notebooks draw."""

import matplotlib.pyplot as plt
import pytest

from common.plots import token_strip


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
