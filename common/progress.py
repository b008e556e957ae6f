"""Bars for work that takes a while: in a terminal on stderr, in a notebook in an output of their own."""

import sys

from tqdm import tqdm

DELAY = 5.0  # seconds of work before `progress_bar` shows something


def progress_bar(total: int, title: str, unit: str, show: bool, done: int = 0) -> tqdm:
    """Return a bar that appears where the work takes longer than five seconds, and leaves nothing behind.

    TQDM_DISABLE in the environment hides it.
    """
    options = {"leave": False, "delay": DELAY} | ({} if show else {"disable": True}) | bar_options()
    return tqdm(total=total, initial=done, desc=title, unit=unit, **options)


def bar_options() -> dict:
    """Return what tqdm needs so that a bar leaves nothing in a notebook's cell; nothing where this is no notebook."""
    kernel = sys.modules.get("ipykernel.iostream")
    if kernel is None or not isinstance(sys.stderr, kernel.OutStream):
        return {}
    return {
        "file": _Output(),
        "leave": False,
        "position": 0,
    }  # of several bars, each is the first of its output


class _Output:
    """A file for the line of a bar, shown as an output of the cell, which has nothing in it once the bar is gone.

    On stderr a bar that is gone is an empty band, and it is stored; a widget would be stored too.
    IPython is imported here,
    where a kernel has loaded it already: nothing else can change an output.
    """

    encoding = "utf-8"  # tqdm asks before it draws with blocks

    def __init__(self) -> None:
        self._handle = None

    def write(self, text: str) -> None:
        from IPython.display import display

        line = text.strip("\r\n ")
        data = {"text/plain": line} if line else {}
        if self._handle is not None:
            self._handle.update(data, raw=True)
        elif line:
            self._handle = display(data, raw=True, display_id=True)

    def flush(self) -> None:
        """Nothing waits."""
