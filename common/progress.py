"""Progress bars: in a terminal on stderr, in a notebook in an output of their own."""

import sys
from typing import Any

from tqdm import tqdm

DELAY = 5.0  # seconds of work before `progress_bar` shows something


def progress_bar(total: int, title: str, unit: str, show: bool, done: int = 0) -> tqdm:
    """Return a bar that appears after five seconds of work and is gone at the end.

    TQDM_DISABLE in the environment hides it.
    """
    options: dict[str, Any] = {"leave": False, "delay": DELAY, **bar_options()}
    if not show:
        options["disable"] = True
    return tqdm(total=total, initial=done, desc=title, unit=unit, **options)


def bar_options() -> dict[str, Any]:
    """Return what tqdm needs so that a bar leaves nothing in a notebook's cell, if this is one."""
    kernel = sys.modules.get("ipykernel.iostream")
    if kernel is None or not isinstance(sys.stderr, kernel.OutStream):
        return {}
    # Of several bars, each is the first of its output.
    return {"file": CellOutput(), "leave": False, "position": 0}


class CellOutput:
    """A file for the line of a bar: an output of the cell, empty once the bar is gone.

    On stderr a bar that is gone leaves an empty band, and it is stored; a widget would be stored
    too. Only IPython can change an output; it is imported where a kernel has loaded it already.
    """

    encoding = "utf-8"  # tqdm asks before it draws with blocks

    def __init__(self) -> None:
        self._handle: Any = None

    def write(self, text: str) -> None:
        """Show a line in the place of the last one."""
        from IPython.display import display

        line = text.strip("\r\n ")
        data = {"text/plain": line} if line else {}
        if self._handle is not None:
            self._handle.update(data, raw=True)
        elif line:
            self._handle = display(data, raw=True, display_id=True)

    def flush(self) -> None:
        """Do nothing: nothing waits."""
