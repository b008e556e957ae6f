"""Progress bars: what a notebook is shown of them."""

from common.progress import CellOutput, progress_bar


def test_a_bar_without_text_makes_no_output(monkeypatch):
    """Tqdm may write a blank line first; an output without anything in it would stay."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: shown.append(args))
    for text in ("\r", "   ", "\n"):
        CellOutput().write(text)
    assert not shown
    CellOutput().write("\r 1 of 2")
    assert shown == [({"text/plain": "1 of 2"},)]


def test_a_bar_that_is_not_wanted_is_off(capsys):
    """It counts, and shows nothing."""
    with progress_bar(3, "rows", "row", show=False, done=1) as bar:
        bar.update(2)
    assert bar.disable and capsys.readouterr().err == ""
