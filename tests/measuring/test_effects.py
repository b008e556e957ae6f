"""What a sweep is judged by.

Moves prompt by prompt, costs, the window in which steering works, and the pictures of it.
"""

import itertools
import math
from contextlib import nullcontext

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from common import (
    effect_by_cell,
    perplexity_ratio_by_cell,
    plot_effect,
    plot_heat_map,
    plot_prompts,
    with_kl,
    working_window,
)
from common.measuring.effects import moves_by_prompt
from common.measuring.tone import moves, tone_by_prompt
from common.plots import plot_moves
from common.vectors.steering_vector import SteeringVector

PROMPTS = ["I think dogs are", "This year winter is"]
UNSTEERED = [0.0, 1.0, -0.5, 0.25]  # of four prompts
Moves = dict[tuple[str, str, int, float], list[float]]


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def rows_of(moves: Moves, samples: int = 1) -> pd.DataFrame:
    """A table as `sweep` returns it, from how far each prompt moves at each cell."""
    rows = []
    for (steering, kind, layer, coeff), moved in {
        ("unsteered", "unsteered", None, 0.0): [0.0] * 4,
        **moves,
    }.items():
        for prompt, move in enumerate(moved):
            for sample in range(samples):
                tone = (
                    UNSTEERED[prompt] + move + (sample - (samples - 1) / 2)
                )  # samples spread, and their mean stays
                rows.append(
                    {
                        "steering": steering,
                        "kind": kind,
                        "layer": layer,
                        "coeff": coeff,
                        "prompt": f"prompt {prompt}",
                        "tone": tone,
                    }
                )
    frame = pd.DataFrame(rows)
    return frame.assign(layer=frame["layer"].astype("Int64"))


def costs_of(ratios: dict[tuple[str, str, int, float], float]) -> pd.DataFrame:
    """A table as `sweep_perplexity` returns it.

    Two texts of different lengths, with this ratio together.
    """
    rows = [
        {
            "steering": "unsteered",
            "kind": "unsteered",
            "layer": None,
            "coeff": 0.0,
            "loss": 2.0,
            "unsteered_loss": 2.0,
            "tokens": tokens,
        }
        for tokens in (3, 7)
    ]
    for (steering, kind, layer, coeff), ratio in ratios.items():
        for tokens, more in ((3, math.log(ratio) + 0.7), (7, math.log(ratio) - 0.3)):
            rows.append(
                {
                    "steering": steering,
                    "kind": kind,
                    "layer": layer,
                    "coeff": coeff,
                    "loss": 2.0 + more,
                    "unsteered_loss": 2.0,
                    "tokens": tokens,
                }
            )
    frame = pd.DataFrame(rows)
    return frame.assign(layer=frame["layer"].astype("Int64"))


# --- effects ---


@pytest.mark.parametrize("samples", [1, 3])
def test_an_effect_is_a_mean_of_moves(samples):
    """Against the unsteered completions of the same prompt, with the spread over the prompts.

    The share that went astray is that of those prompts.
    """
    up, down = ("Love", "steering", 3, 2.0), ("Love", "steering", 3, -2.0)
    rows = rows_of({up: [1.0, 0.5, -0.25, 0.0], down: [-1.0, 0.25, -0.5, 0.75]}, samples)
    table = effect_by_cell(rows, "tone").set_index("coeff")
    assert list(table.columns) == [
        "steering",
        "kind",
        "layer",
        "effect",
        "spread",
        "error",
        "wrong way",
        "prompts",
    ]
    assert table.loc[2.0, "effect"] == pytest.approx(1.25 / 4) and table.loc[
        -2.0, "effect"
    ] == pytest.approx(-0.5 / 4)
    assert table.loc[2.0, "spread"] == pytest.approx(pd.Series([1.0, 0.5, -0.25, 0.0]).std())
    assert table.loc[2.0, "error"] == pytest.approx(table.loc[2.0, "spread"] / 2)
    assert table.loc[2.0, "wrong way"] == 0.25 and table.loc[-2.0, "wrong way"] == 0.5
    assert (table["prompts"] == 4).all() and (table["layer"] == 3).all()
    found = moves_by_prompt(rows, "tone")
    assert found[found["coeff"] == 2.0].set_index("prompt")["move"].to_dict() == pytest.approx(
        {"prompt 0": 1.0, "prompt 1": 0.5, "prompt 2": -0.25, "prompt 3": 0.0}
    )
    assert "unsteered" not in set(found["kind"]) and len(found) == 8


NAN = float("nan")


def test_a_prompt_without_a_value_does_not_count():
    """Mean, spread and the share that went astray are those of the other prompts alone.

    Their number is said.
    """
    up, down, none = (("Love", "steering", 3, coeff) for coeff in (2.0, -2.0, 4.0))
    table = effect_by_cell(
        rows_of({up: [1.0, NAN, -0.25, 0.5], down: [NAN, NAN, 1.0, -0.5], none: [NAN] * 4}), "tone"
    ).set_index("coeff")
    for coeff, moved, astray in ((2.0, [1.0, -0.25, 0.5], 1 / 3), (-2.0, [1.0, -0.5], 1 / 2)):
        row = table.loc[coeff]
        assert row["prompts"] == len(moved) and row["wrong way"] == pytest.approx(astray)
        assert row["effect"] == pytest.approx(np.mean(moved)) and row["spread"] == pytest.approx(
            np.std(moved, ddof=1)
        )
        assert row["error"] == pytest.approx(row["spread"] / len(moved) ** 0.5)
    assert (
        table.loc[4.0, ["effect", "spread", "error", "wrong way"]].isna().all()
        and table.loc[4.0, "prompts"] == 0
    )


def test_a_sample_without_a_value_does_not_count():
    """The mean of a prompt is over the others; a prompt that has none unsteered counts nowhere."""
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4}, samples=3)
    steered, plain = rows.index[rows["coeff"] == 2.0], rows.index[rows["coeff"] == 0]
    rows.loc[steered[1], "tone"] = rows.loc[plain[3:6], "tone"] = NAN
    table = effect_by_cell(rows, "tone")
    assert table["prompts"].tolist() == [3] and table["effect"].tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("values", [[None] * 8, [NAN] * 8, [float("inf")] * 8])
def test_a_metric_without_values(values):
    """Rows of NaN and 0 prompts, and a sentence where a window is asked for.

    The pictures stay empty.
    """
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4}).assign(tone=pd.Series(values))
    table = effect_by_cell(rows, "tone")
    assert table["effect"].isna().all() and table["prompts"].tolist() == [0]
    found = working_window(rows, costs_of({("Love", "steering", 3, 2.0): 1.0}), "tone")
    assert (
        found.layer is None
        and "'tone' has no value" in found.reason
        and not found.cells["works"].any()
    )
    plot_heat_map(found)
    plot_prompts(rows, "tone", "Love", 3, 2.0)
    plot_effect(rows, "tone", 3)


@pytest.mark.parametrize("kind", [bool, object, "boolean", "Int64", "Float64"])
def test_truth_values_and_other_numbers(kind):
    """Truth values are 0 and 1, whatever the column is made of."""
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4})
    truth = [False, False, True, False, True, True, True, False]
    plain = effect_by_cell(rows.assign(tone=[float(value) for value in truth]), "tone")
    pd.testing.assert_frame_equal(
        effect_by_cell(rows.assign(tone=pd.Series(truth).astype(kind)), "tone"), plain
    )
    assert plain["effect"].tolist() == [0.5]
    if kind not in (bool,):
        gap = rows.assign(tone=pd.Series([*truth[:-1], None]).astype(kind))
        assert effect_by_cell(gap, "tone")["prompts"].tolist() == [3]


def test_large_numbers():
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4}).assign(
        tone=pd.Series([0] * 4 + [2**70] * 4, dtype=object)
    )
    assert effect_by_cell(rows, "tone")["effect"].tolist() == [2.0**70]


@pytest.mark.parametrize(
    "call", [lambda rows: effect_by_cell(rows, "tone"), lambda rows: plot_effect(rows, "tone", 3)]
)
def test_texts_are_no_effect(call):
    """Also those that look like numbers: a sentence with the column, and the text."""
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4}).astype({"tone": object})
    rows.loc[5, "tone"] = "1.5"
    with pytest.raises(ValueError, match="expected numbers in the column 'tone', got '1.5'"):
        call(rows)


def test_a_model_that_broke_has_no_perplexity_ratio():
    """One text without a loss, and the cell has no ratio.

    It is no cell of the window, and none that lacks its cost.
    """
    cells = dict.fromkeys(CELLS, 1.02)
    costs = costs_of(cells)
    costs.loc[
        costs["layer"].eq(3).fillna(False) & (costs["coeff"] == -2.0) & (costs["tokens"] == 3),
        "loss",
    ] = NAN
    ratios = perplexity_ratio_by_cell(costs).set_index(["layer", "coeff"])["ratio"]
    assert math.isnan(ratios[3, -2.0]) and ratios.drop((3, -2.0)).notna().all()
    moved = {cell: good(np.sign(cell[3])) for cell in CELLS}
    assert works(working_window(rows_of(moved), costs, "tone")) == ALL - {(3, 2.0)}


def test_a_control_without_a_value_is_not_beaten():
    """It is not as if none had been swept."""
    control = {
        ("Hate", "control", layer, coeff): [NAN] * 4 if (layer, coeff) == (3, -2.0) else [0.0] * 4
        for _, _, layer, coeff in CELLS
    }
    assert works(window(control)) == ALL - {(3, 2.0)}


def test_coefficient_0_has_no_wrong_way():
    table = effect_by_cell(rows_of({("Love", "steering", 3, 0.0): [0.5, -0.5, 0.0, 0.0]}), "tone")
    assert table["wrong way"].tolist() == [0.0]


def test_tables_that_cannot_be_compared_are_refused():
    rows = rows_of({("Love", "steering", 3, 2.0): [1.0] * 4})
    for call in (effect_by_cell, moves_by_prompt):
        with pytest.raises(ValueError, match="no column 'love': the table has steering, kind"):
            call(rows, "love")
        with pytest.raises(ValueError, match="no unsteered rows"):
            call(rows[rows["kind"] != "unsteered"], "tone")


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=5
    ),
    st.sampled_from([1.0, -2.0]),
)
def test_a_perplexity_ratio_is_over_all_tokens(texts, coeff):
    """exp(all the losses, steered) / exp(all the losses, unsteered).

    A long text counts for more than a short one.
    """
    rows = pd.DataFrame(
        [
            {
                "steering": "Love",
                "kind": "steering",
                "layer": 3,
                "coeff": coeff,
                "loss": loss,
                "unsteered_loss": plain,
                "tokens": tokens,
            }
            for tokens, loss, plain in texts
        ]
    )
    rows = pd.concat(
        [
            rows,
            rows.assign(layer=4, loss=rows["unsteered_loss"]),
            rows.assign(kind="unsteered", steering="unsteered", layer=None),
        ]
    )
    table = perplexity_ratio_by_cell(rows)
    total = sum(tokens for tokens, _, _ in texts)
    steered, plain = (
        math.exp(sum(tokens * losses[which] for tokens, *losses in texts) / total)
        for which in (0, 1)
    )
    assert table[["steering", "kind", "coeff"]].drop_duplicates().values.tolist() == [
        ["Love", "steering", coeff]
    ]
    assert table["layer"].tolist() == [3, 4] and table["ratio"].tolist() == pytest.approx(
        [steered / plain, 1.0]
    )


# --- the window ---

GOOD = [1.0, 0.5, 0.5, 0.0]  # a mean of 0.5, no prompt the wrong way
CELLS = [
    ("Love", "steering", layer, sign * size)
    for layer in (2, 3, 4)
    for size in (1.0, 2.0)
    for sign in (1, -1)
]


def good(sign: float, factor: float = 1.0) -> list[float]:
    return [sign * factor * move for move in GOOD]


def window(changed: Moves | None = None, ratios: dict | None = None, **options):
    """The window of a table in which every cell works, but for what is changed."""
    moved = {cell: good(np.sign(cell[3])) for cell in CELLS} | {
        ("Love, random 1", "random", layer, coeff): [0.25, -0.25, 0.25, 0.25]
        for _, _, layer, coeff in CELLS
    }
    table, costs = (
        rows_of(moved | (changed or {})),
        costs_of(dict.fromkeys(CELLS, 1.02) | (ratios or {})),
    )
    return working_window(table, costs, "tone", **options)


def works(found) -> set[tuple[int, float]]:
    return {(row.layer, row.coeff) for row in found.cells[found.cells["works"]].itertuples()}


ALL = {(layer, size) for layer in (2, 3, 4) for size in (1.0, 2.0)}


def test_all_cells_work():
    """Recommended is the middle of the window, here with three neighbours.

    Of several it is the strongest; not a corner that is stronger still.
    """
    found = window(
        {
            ("Love", "steering", layer, sign * 2.0): good(sign, factor)
            for sign in (1, -1)
            for layer, factor in ((3, 1.5), (4, 1.75))
        }
    )
    assert works(found) == ALL and (found.layer, found.coeff) == (3, 2.0)
    assert isinstance(found.layer, int) and isinstance(found.coeff, float)
    assert list(found.cells) == [
        "layer",
        "coeff",
        "effect",
        "ratio",
        "wrong way",
        "control",
        "works",
        "neighbours",
    ]
    assert found.cells.set_index(["layer", "coeff"])["neighbours"].to_dict() == {
        (2, 1): 2,
        (2, 2): 2,
        (3, 1): 3,
        (3, 2): 3,
        (4, 1): 2,
        (4, 2): 2,
    }
    assert (
        found.reason
        == "layer 3, coefficient 2: effect 0.75 (asked 0.44), controls at most 0.12, perplexity"
        " ratio 1.02 (at most 1.1), 0% of the prompts the wrong way; 3 of its neighbours"
        " work too"
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "what", ["weak", "other way", "control", "random", "ratio", "wrong way", "nan"]
)
def test_a_cell_must_hold_with_both_signs(sign, what):
    """One sign that is too weak, too dear, astray or no better than a control.

    The cell does not work; the others do.
    """
    cell, changed, ratios = ("Love", "steering", 3, sign * 1.0), {}, {}
    if what == "weak":
        changed = {cell: good(sign, 0.4)}
    elif what == "other way":
        changed = {cell: good(-sign)}
    elif what == "control":  # as large as the effect, the other way
        changed = {("Weddings", "control", 3, sign * 1.0): good(-sign)}
    elif what == "random":
        changed = {("Love, random 2", "random", 3, sign * 1.0): good(sign)}
    elif what == "ratio":
        ratios = {cell: 1.11}
    elif what == "wrong way":
        changed = {cell: [sign * move for move in (2.0, 2.0, -0.25, -0.25)]}
    elif what == "nan":
        changed = {cell: [math.nan] * 4}
    found = window(changed, ratios)
    assert works(found) == ALL - {(3, 1.0)}
    (cell,) = found.cells[(found.cells["layer"] == 3) & (found.cells["coeff"] == 1.0)].to_dict(
        "records"
    )
    assert math.isnan(cell["wrong way"]) == (
        what == "nan"
    )  # it could be larger than that of the other sign


def test_limits_are_those_that_are_given():
    cell = ("Love", "steering", 3, 1.0)
    assert works(window(min_effect=0.5)) == ALL and not works(window(min_effect=0.51))
    assert works(window(ratios={cell: 1.3}, max_ratio=1.31)) == ALL
    astray = {cell: [1.0, 2.0, -0.25, -0.25]}
    assert works(window(astray, max_wrong_way=0.5)) == ALL and (3, 1.0) not in works(
        window(astray, max_wrong_way=0.49)
    )


def test_a_limit_is_allowed_itself():
    """A ratio, or a share that went astray, that is exactly the limit."""
    dear = {("Love", "steering", 3, 1.0): 1.3}
    limit = window(ratios=dear, max_ratio=9).cells["ratio"].max()
    assert works(window(ratios=dear, max_ratio=limit)) == ALL


def test_a_name_is_no_pattern():
    """The random directions of "Love (a+b)" are its controls."""
    name, names = "Love (a+b)", {"Love": "Love (a+b)", "Love, random 1": "Love (a+b), random 1"}
    moved = {cell: good(np.sign(cell[3])) for cell in CELLS}
    moved |= {("Love, random 1", "random", *cell[2:]): good(1, 9) for cell in CELLS}
    rows, costs = (
        table.replace({"steering": names})
        for table in (rows_of(moved), costs_of(dict.fromkeys(CELLS, 1.0)))
    )
    found = working_window(rows, costs, "tone", name)
    assert not works(found) and found.cells["control"].notna().all()


def test_one_sign_is_enough_where_only_one_was_swept():
    cells = [cell for cell in CELLS if cell[3] > 0]
    found = working_window(
        rows_of({cell: good(1) for cell in cells}), costs_of(dict.fromkeys(cells, 1.0)), "tone"
    )
    assert works(found) == ALL and "no controls" in found.reason and "nan" not in found.reason


def test_other_steerings_are_no_controls_and_their_random_directions_neither():
    """But unrelated pairs are controls for all of them."""
    strong = {
        (name, kind, 3, sign * 1.0): good(sign, 4)
        for sign in (1, -1)
        for name, kind in (
            ("Hate", "steering"),
            ("Hate, random 1", "random"),
            ("Love, randomly", "steering"),
            ("Love, randomly, random 1", "random"),
        )
    }
    assert works(window(strong, steering="Love")) == ALL
    with pytest.raises(
        ValueError, match="expected one of 'Love', 'Hate', 'Love, randomly' as steering, got None"
    ):
        window(strong)
    with pytest.raises(ValueError, match="expected one of 'Love' as steering, got 'Lov'"):
        window(steering="Lov")
    with pytest.raises(ValueError, match="no steering as steering, got None"):
        working_window(rows_of({}), costs_of({}), "tone")


def test_no_cell_works():
    """Then nothing is recommended, and the sentence says what the best cell lacks."""
    found = window(
        {
            ("Love", "steering", 4, sign * 2.0): [sign * move for move in (4.0, 4.0, 4.0, -1.0)]
            for sign in (1, -1)
        },
        {("Love", "steering", 4, 2.0): 1.5},
        max_wrong_way=0.0,
    )
    assert not works(found) and found.layer is None and found.coeff is None
    assert (
        found.reason
        == "no cell works: the largest effect is that of layer 4, coefficient 2: effect 2.75 (asked"
        " 1.38), controls at most 0.12, perplexity ratio 1.50 (at most 1.1), 25% of the prompts"
        " the wrong way"
    )


def test_a_cell_needs_its_cost():
    """Each sign its own; coefficient 0 costs nothing."""
    moved = {cell: good(np.sign(cell[3])) for cell in CELLS}
    lacking = costs_of({cell: 1.0 for cell in CELLS if cell[2:] != (3, -2.0)})
    with pytest.raises(ValueError, match="the costs lack layer 3, coefficient -2 of 'Love'"):
        working_window(rows_of(moved), lacking, "tone")
    nothing = {("Love", "steering", 3, 0.0): [0.0] * 4}
    assert (
        works(working_window(rows_of(moved | nothing), costs_of(dict.fromkeys(CELLS, 1.0)), "tone"))
        == ALL
    )
    with pytest.raises(ValueError, match="other than 0"):
        working_window(rows_of(nothing), costs_of({}), "tone")


quarters = st.integers(-3, 6).map(lambda number: number / 4)


@given(
    data=st.data(),
    layers=st.integers(1, 3),
    sizes=st.integers(1, 3),
    signs=st.sampled_from([(1,), (-1,), (1, -1)]),
    min_effect=st.none() | st.sampled_from([-1.0, 0.25, 1.0]),
    max_wrong_way=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_what_is_recommended_works(data, layers, sizes, signs, min_effect, max_wrong_way):
    """Some cell is recommended if and only if one meets all conditions.

    Of those with the most such neighbours, a strongest one.
    """
    grid = [(layer, size) for layer in range(layers) for size in range(1, sizes + 1)]
    cells = [
        ("Love", "steering", layer, float(sign * size)) for layer, size in grid for sign in signs
    ]
    moved = {
        cell: [sign * move for move in data.draw(st.lists(quarters, min_size=4, max_size=4))]
        for cell in cells
        for sign in [np.sign(cell[3])]
    }
    controls = {("Weddings", "control", *cell[2:]): [data.draw(quarters)] * 4 for cell in cells}
    ratios = {cell: data.draw(st.sampled_from([0.9, 1.0, 1.05, 1.2])) for cell in cells}
    found = working_window(
        rows_of(moved | controls),
        costs_of(ratios),
        "tone",
        min_effect=min_effect,
        max_wrong_way=max_wrong_way,
    )

    weakest = {
        (layer, size): min(
            sign * np.mean(moved["Love", "steering", layer, float(sign * size)]) for sign in signs
        )
        for layer, size in grid
    }
    least = max(weakest.values()) / 2 if min_effect is None else min_effect

    def holds(layer: int, size: int) -> bool:
        both = [float(sign * size) for sign in signs]
        control = max(abs(np.mean(controls["Weddings", "control", layer, coeff])) for coeff in both)
        astray = max(
            np.mean([move * coeff < 0 for move in moved["Love", "steering", layer, coeff]])
            for coeff in both
        )
        ratio = max(ratios["Love", "steering", layer, coeff] for coeff in both)
        return (
            weakest[layer, size] >= least
            and weakest[layer, size] > max(control, 0)
            and ratio <= 1.1
            and astray <= max_wrong_way
        )

    working = {cell for cell in grid if holds(*cell)}
    assert works(found) == working and (found.layer is not None) == (
        found.coeff is not None
    ) == bool(working)

    def neighbours(layer: int, size: int) -> int:
        return len(
            {(layer + 1, size), (layer - 1, size), (layer, size + 1), (layer, size - 1)} & working
        )

    if working:
        assert (found.layer, found.coeff) in working
        ranks = {cell: (neighbours(*cell), weakest[cell]) for cell in working}
        assert ranks[found.layer, found.coeff] == max(ranks.values())


# --- pictures ---


def framed(axes, layers: list[int], coeffs: list[float]) -> set[tuple[int, float]]:
    """The cells that are framed in a heat map."""
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    middles = [
        (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2) for box in boxes
    ]
    return {(layers[round(y)], coeffs[round(x)]) for x, y in middles}


def test_heat_maps_frame_the_window():
    """In both pictures.

    A star stands in the cell that is recommended, and each cell says its number.
    """
    found = window(
        {("Love", "steering", 4, 1.0): good(1, 0.2)}, {("Love", "steering", 2, -2.0): 1.4}
    )
    figure = plot_heat_map(found, "embedded model")
    for axes, column in zip(figure.axes, ("effect", "ratio"), strict=True):
        assert framed(axes, [2, 3, 4], [1.0, 2.0]) == works(found) == ALL - {(4, 1.0), (2, 2.0)}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
        for text in axes.texts:
            x, y = text.get_position()
            cell = found.cells[
                (found.cells["layer"] == [2, 3, 4][y]) & (found.cells["coeff"] == [1.0, 2.0][x])
            ]
            assert text.get_text() == f"{cell[column].item():.2f}"
        assert len(axes.texts) == 6
    (star,) = figure.axes[0].lines
    assert ([2, 3, 4][round(star.get_ydata()[0])], [1.0, 2.0][round(star.get_xdata()[0])]) == (
        found.layer,
        found.coeff,
    )


def test_heat_maps_of_nothing():
    """No frame and no star. A cell that was not swept, or has no number, stays empty."""
    none = plot_heat_map(window(min_effect=9.0))
    assert not any(axes.patches or axes.lines for axes in none.axes)
    cells = [cell for cell in CELLS if cell[2:] not in {(2, 1.0), (2, -1.0)}]
    moved = {cell: good(np.sign(cell[3])) for cell in cells} | {
        ("Love", "steering", 4, 1.0): [math.nan] * 4
    }
    figure = plot_heat_map(
        working_window(rows_of(moved), costs_of(dict.fromkeys(cells, 1.0)), "tone")
    )
    assert [len(axes.texts) for axes in figure.axes] == [4, 5] and "nan" not in {
        text.get_text() for axes in figure.axes for text in axes.texts
    }


def test_colours_of_a_heat_map_are_those_of_finite_numbers():
    """A cell without bounds leaves the others their colours."""
    found = window()
    found.cells.loc[0, ["effect", "ratio"]] = np.inf
    assert [axes.images[0].get_clim() for axes in plot_heat_map(found).axes] == [
        (-2.0, 2.0),
        (1.0, 2.0),
    ]


def test_plot_effect():
    """A line for each steering through the unsteered mean at 0, with its standard error.

    Controls share one entry of the legend.
    """
    moved = {
        ("Love", "steering", 3, coeff): [coeff, coeff / 2, 0.0, 0.0] for coeff in (-2.0, 1.0, 2.0)
    }
    moved |= {("Hate", "steering", 3, coeff): good(-coeff) for coeff in (-2.0, 2.0)}
    moved |= {(f"Love, random {number}", "random", 3, 2.0): good(0.1 * number) for number in (1, 2)}
    moved |= {("Weddings", "control", 3, 2.0): good(0.1), ("Love", "steering", 4, 9.0): good(1)}
    rows, plain = rows_of(moved, samples=2), np.mean(UNSTEERED)
    figure = plot_effect(rows, "tone", 3, "the tone", "a title")
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()].count(
        "random directions"
    ) == 1
    assert {"Love", "Hate", "random directions", "unrelated pairs"} == {
        text.get_text() for text in figure.legends[0].get_texts()
    }
    love = next(container for container in axes.containers if container.get_label() == "Love")
    assert love[0].get_xdata().tolist() == [-2.0, 0.0, 1.0, 2.0]
    assert love[0].get_ydata() == pytest.approx([plain - 0.75, plain, plain + 0.375, plain + 0.75])
    at_2 = pd.Series(
        [start + move for start, move in zip(UNSTEERED, [2.0, 1.0, 0.0, 0.0], strict=True)]
    )
    ends = love[2][0].get_segments()[-1][:, 1]
    assert (ends[1] - ends[0]) / 2 == pytest.approx(at_2.std() / 2)
    assert axes.get_ylabel() == "the tone" and axes.get_xlabel() == "coefficient, layer 3"
    with pytest.raises(ValueError, match=r"layer 5 was not swept: the table has \[3, 4\]"):
        plot_effect(rows, "tone", 5)


def test_a_table_gets_the_divergence_of_its_cells():
    """Rows, effects and costs alike; unsteered is 0."""
    moved = {("Love", "steering", layer, coeff): good(1) for layer in (3, 4) for coeff in (-1, 2.0)}
    moved["Love", "random", 3, 2.0] = good(0.1)  # the kind tells it apart
    rows = rows_of(moved)
    kls = rows[["steering", "kind", "layer", "coeff"]].drop_duplicates()
    kls = kls.assign(kl=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]).iloc[::-1]
    found = with_kl(rows, kls)
    pd.testing.assert_frame_equal(found.drop(columns="kl"), rows)
    assert found["kl"].tolist() == [kl / 10 for kl in range(6) for _ in range(4)]
    assert with_kl(effect_by_cell(rows, "tone"), kls)["kl"].tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    with pytest.raises(ValueError, match="no kl of 'Love' at layer 4, coefficient 2"):
        with_kl(rows, kls[(kls["layer"] != 4) | (kls["coeff"] != 2)])
    with pytest.raises(ValueError, match="'kl' already"):
        with_kl(found, kls)
    with pytest.raises(ValueError, match="kls with the columns steering, kind, layer, coeff, kl"):
        with_kl(rows, rows)


def test_divergences_of_two_tables_can_be_joined():
    """Both have the unsteered cell: each row stays one row. Two values for a cell are no value."""
    moved = {
        ("Love", "steering", layer, coeff): good(1) for layer in (3, 4) for coeff in (1.0, 2.0)
    }
    rows = rows_of(moved)
    kls = rows[["steering", "kind", "layer", "coeff"]].drop_duplicates()
    kls = kls.assign(kl=[0.0, 0.1, float("nan"), 0.3, 0.4])
    joined = pd.concat([kls[kls["layer"].isna() | (kls["layer"] == layer)] for layer in (3, 4)])
    assert len(joined) == len(kls) + 1
    pd.testing.assert_frame_equal(with_kl(rows, joined), with_kl(rows, kls))
    pd.testing.assert_frame_equal(with_kl(rows, pd.concat([kls, kls])), with_kl(rows, kls))
    other = pd.concat([kls, kls.assign(kl=kls["kl"] + (kls["coeff"] == 2))])
    with pytest.raises(ValueError, match="two values as kl of 'Love' at layer 4, coefficient 2"):
        with_kl(rows, other)


def test_an_effect_can_be_drawn_over_the_divergence():
    """Each line at its own divergences, with the signs of the coefficients, through 0."""
    moved = {("Love", "steering", 3, coeff): good(coeff) for coeff in (-2.0, 1.0, 2.0)}
    moved |= {("Love, random 1", "random", 3, coeff): good(0.1) for coeff in (-2.0, 1.0, 2.0)}
    rows = rows_of(moved)
    kls = rows[["steering", "kind", "layer", "coeff"]].drop_duplicates()
    kls = kls.assign(kl=[0.0, 1.5, 0.5, 1.0, 0.4, 0.1, 0.3])
    figure = plot_effect(with_kl(rows, kls), "tone", 3, over="kl")
    (axes,) = figure.axes
    love = axes.containers[0][0]
    assert love.get_xdata().tolist() == [-1.5, 0.0, 0.5, 1.0]
    plain = np.mean(UNSTEERED)
    expected = [plain + np.mean(good(coeff)) for coeff in (-2.0, 0.0, 1.0, 2.0)]
    assert love.get_ydata().tolist() == pytest.approx(expected)
    random = next(line for line in axes.lines if line.get_label() == "random directions")
    assert random.get_xdata().tolist() == [-0.4, 0.0, 0.1, 0.3]
    places = axes.transData.transform([(x, 0.0) for x in (-1.0, -0.25, 0.0, 0.25, 1.0)])[:, 0]
    assert np.diff(places) == pytest.approx([places[1] - places[0]] * 4)  # as far apart as roots
    assert axes.get_xlabel() == "divergence from unsteered in nats, signed, root scale, layer 3"
    with pytest.raises(ValueError, match="no column 'kl'"):
        plot_effect(rows, "tone", 3, over="kl")


def test_plot_effect_has_colours_for_many():
    moved = {(f"steering {number}", "steering", 3, 1.0): good(number) for number in range(15)}
    assert len(plot_effect(rows_of(moved), "tone", 3).axes[0].containers) == 15


@pytest.mark.parametrize("signs", [(1, -1), (1,), (-1,)])
def test_plot_prompts(signs):
    """Each prompt unsteered and steered, those that moved furthest on top.

    At the bottom the one that went astray.
    """
    up = [0.25, 1.0, 0.5, -0.25]
    rows = rows_of(
        {("Love", "steering", 3, 2.0 * sign): [sign * move for move in up] for sign in signs}
    )
    (axes,) = plot_prompts(rows, "tone", "Love", 3, 2.0).axes
    order = [f"prompt {number}" for number in (3, 0, 2, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == order
    points = {
        line.get_label(): line.get_xdata()
        for line in axes.lines
        if not line.get_label().startswith("_")
    }
    # The rings come last, so that no dot hides one.
    assert list(points) == [*(f"{2 * sign:+g}" for sign in signs), "unsteered"]
    for sign in signs:
        assert list(points[f"{2 * sign:+g}"]) == pytest.approx(
            [UNSTEERED[int(name[-1])] + sign * up[int(name[-1])] for name in order]
        )
    with pytest.raises(ValueError, match="layer 3, coefficient 1 of 'Love' was not swept"):
        plot_prompts(rows, "tone", "Love", 3, 1.0)


LONG = "I talk about weddings constantly - I do not talk about weddings constantly"


@pytest.mark.parametrize("layers, sizes", [(1, 1), (3, 2), (12, 10)])
def test_no_text_is_cut_and_none_lies_on_another(monkeypatch, layers, sizes):
    """With few cells and with many, and with long prompts and names.

    All of it lies within the picture, labels and numbers apart.
    """
    grid = [(layer, size / 4) for layer in range(layers) for size in range(1, sizes + 1)]
    moved = {
        (name, kind, layer, sign * size): good(sign, -0.01 if layer else 12.5)
        for layer, size in grid
        for sign in (1, -1)
        for name, kind in (
            (LONG, "steering"),
            ("Love - Hate", "steering"),
            ("b" * 120, "steering"),
            ("w", "control"),
            (f"{LONG}, random 1", "random"),
        )
    }
    costs = costs_of({cell: 1.0 + cell[2] for cell in moved})
    rows = rows_of(moved)
    rows["prompt"] = rows["prompt"].map(
        lambda prompt: f"{prompt} {LONG} {LONG}" if prompt < "prompt 2" else prompt
    )
    tones = rows.pivot_table(
        index=["steering", "layer", "coeff"], columns="prompt", values="tone", dropna=False
    ).iloc[:8]
    tones.index = [
        "unsteered",
        *(f"a condition that has a name {number}" for number in range(1, len(tones))),
    ]
    drawn, draw = {}, Text.draw
    monkeypatch.setattr(
        Text,
        "draw",
        lambda text, renderer: (
            drawn.update({text: text.get_window_extent()}),
            draw(text, renderer),
        ),
    )
    for figure in (
        plot_heat_map(working_window(rows, costs, "tone", LONG), LONG),
        plot_effect(rows, "tone", 0, "positive minus negative share", LONG),
        plot_prompts(rows, "tone", LONG, 0, 0.25, "positive minus negative share", LONG),
        plot_moves(tones, LONG),
    ):
        figure.canvas.draw()
        drawn.clear()
        figure.canvas.draw()
        boxes = {text: box for text, box in drawn.items() if text.get_text() and text.get_visible()}
        assert len(boxes) > 5
        for text, box in boxes.items():
            assert (
                box.x0 > -1
                and box.y0 > -1
                and box.x1 < figure.bbox.width + 1
                and box.y1 < figure.bbox.height + 1
            ), text
        for one, other in itertools.combinations(boxes, 2):
            assert not boxes[one].padded(-1).overlaps(boxes[other].padded(-1)), (one, other)


# --- tone by prompt ---


def test_conditions_differ_by_the_steering_only(model, tokenizer):
    """The same seed for all.

    An empty condition is the unsteered one, and a vector of no length as well.
    """
    nothing = SteeringVector({2: torch.ones(model.config.hidden_size)}).apply(model, multiplier=0.0)
    tones = tone_by_prompt(
        model,
        tokenizer,
        {"empty": nullcontext(), "nothing": nothing},
        PROMPTS,
        per_prompt=3,
        max_new_tokens=6,
    )
    assert list(tones.columns) == PROMPTS and list(tones.index) == ["unsteered", "empty", "nothing"]
    assert (tones == tones.loc["unsteered"]).all(axis=None) and (tones.abs() <= 1).all(axis=None)


def test_completions_belong_to_their_prompts(model, tokenizer, monkeypatch):
    """Row by row: a prompt gets the tone of its own completions, and not of its neighbour's."""
    monkeypatch.setattr(
        "common.measuring.tone.completions", lambda tokenizer, inputs, ids: ["love", "hate"] * 3
    )
    assert tone_by_prompt(model, tokenizer, {}, PROMPTS, per_prompt=3, max_new_tokens=1).loc[
        "unsteered"
    ].tolist() == [1.0, -1.0]


def test_moves():
    """Mean, spread over the prompts, and the share that moved against the mean."""
    tones = pd.DataFrame(
        {"a": [0.0, 0.5, -1.0], "b": [0.0, 1.0, 0.5], "c": [0.5, 0.0, 0.5]},
        index=["unsteered", "up", "down"],
    )
    table = moves(tones)
    assert table.loc["up", "moved"] == pytest.approx((0.5 + 1.0 - 0.5) / 3)
    assert table.loc["up", "wrong way"] == pytest.approx(1 / 3)
    assert table.loc["down", "moved"] == pytest.approx((-1 + 0.5 + 0) / 3)
    assert table.loc["down", "spread"] == pytest.approx(pd.Series([-1, 0.5, 0]).std())
    figure = plot_moves(tones, "title")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(
        table["moved"].tolist()
    )
