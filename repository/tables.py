"""Tables in the notebooks: text on the left, numbers on the right, no index that says nothing."""

import html
from collections.abc import Mapping

import pandas as pd
from IPython.display import display
from pandas.api.types import is_numeric_dtype


def show_table(frame: pd.DataFrame | Mapping, index: bool = False, decimals: int = 2) -> None:
    """Show a table, as HTML in a notebook and as text elsewhere.

    Args:
        frame: what is shown, or its columns by name; missing values stay empty.
        index: whether the index is shown, as the first column, under its name if it has one.
        decimals: of a column of floats.
    """
    frame = pd.DataFrame(frame)
    columns = ({frame.index.name or "": frame.index.to_series()} if index else {}) | dict(
        frame.items()
    )
    cells = {
        str(name): [_written(value, decimals) for value in column]
        for name, column in columns.items()
    }
    right = [is_numeric_dtype(column) for column in columns.values()]
    display({"text/html": _html(cells, right), "text/plain": _text(cells, right)}, raw=True)


def _written(value: object, decimals: int) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        value = f"{round(value, decimals) + 0.0:.{decimals}f}"  # never -0.00
    return str(value)


def _html(cells: dict[str, list[str]], right: list[bool]) -> str:
    def line(tag: str, texts: list[str] | tuple[str, ...]) -> str:
        sides = ("right" if number else "left" for number in right)
        written = (
            f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'
            for text, side in zip(texts, sides)
        )
        return f"<tr>{''.join(written)}</tr>"

    lines = [line("th", list(cells)), *(line("td", row) for row in zip(*cells.values()))]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _text(cells: dict[str, list[str]], right: list[bool]) -> str:
    columns = [[name, *texts] for name, texts in cells.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, right)
        )
        for row in zip(*columns)
    )
    return "\n".join(line.rstrip() for line in lines)
