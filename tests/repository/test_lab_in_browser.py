"""JupyterLab as a reader has it: notebooks opened, run and saved in Chromium.

It works on a copy of the project, with the settings of `make lab`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from repository.mechanisms import ROOT
from repository.notebooks import failures, normalise, notebook_paths, problems, store, too_wide

pytestmark = pytest.mark.browser

NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in notebook_paths()]
RUN_ALL = '[data-command="runmenu:restart-and-run-all"], [data-command="notebook:restart-run-all"]'
SAVE, STATUS = '[data-command="docmanager:save"]', "#jp-main-statusbar"
PINK = '[data-mime-type="application/vnd.jupyter.stderr"]'
LONGEST = 600  # seconds for one cell, on a busy machine
RATING = """
import pandas as pd
from common import rating_widget
completions = pd.DataFrame({
    "prompts": ["I think dogs are"] * 4,
    "completions": [" kind.", " lovely.", " rotten.", " dreadful."],
    "is_modified": [True, True, False, False],
})
rating_widget(completions, "completions.ratings.jsonl", scale=(1, 3))
"""


def cleared(name: str) -> str:
    return str(Path(name).with_stem(f"{Path(name).stem}-cleared"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, so that nothing is saved in this one."""
    folder = tmp_path_factory.mktemp("lab") / "project"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "_build", "tests", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    for name in NOTEBOOKS:  # beside each, the same with nothing run, so that what has run is known
        notebook = read(folder / name)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count, cell.outputs = None, []
        store(notebook, folder / cleared(name))
    rate = new_notebook(cells=[new_code_cell(RATING.strip())])
    normalise(rate)
    store(rate, folder / "rate.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab as `make lab` starts it; pages and kernels are in `.venv`."""
    python = ROOT / ".venv/bin/python"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = tmp_path_factory.mktemp("jupyter")
    environment = os.environ | {
        "JUPYTER_CONFIG_PATH": str(project / ".jupyter"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    command = [str(python if python.exists() else sys.executable), "-m", "jupyterlab"]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    options += ["--ServerApp.disable_check_xsrf=True"]  # kernels are ended from here
    with open(own / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [*command, *options], cwd=project, env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: answers(f"{address}/api"), 120, lambda: (own / "log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(30)


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5):
            return True
    except (URLError, OSError):
        return False


def wait(
    done: Callable[[], bool],
    seconds: float,
    what: Callable[[], str],
    moves: Callable[[], object] = lambda: None,
) -> None:
    """Wait until something is so; else fail and say what is instead.

    Args:
        done: whether it is.
        seconds: how long nothing may move meanwhile.
        what: says what is instead.
        moves: changes as long as something does.
    """
    seen, end = moves(), time.monotonic() + seconds
    while not done():
        if (now := moves()) != seen:
            seen, end = now, time.monotonic() + seconds
        assert time.monotonic() < end, what()
        time.sleep(0.5)


def sessions(lab: str) -> list[dict]:
    """What runs there: notebooks, each with the state of its kernel."""
    return json.load(urlopen(f"{lab}/api/sessions", timeout=30))


@pytest.fixture
def opened(page, lab, request) -> Iterator[str]:
    """A notebook, open in a window of its own and with its kernel ready.

    A new window says that it is idle before it has a kernel, and where a kernel is restarted or
    ended while it starts, a window may wait for ever. So the server is asked, and the window.
    """
    name = getattr(request, "param", "rate.ipynb")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"{lab}/lab/workspaces/{Path(name).stem}/tree/{name}?reset")
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").first.wait_for(timeout=90_000)
    wait(lambda: is_idle(page, lab), 120, lambda: state(page, lab))
    yield name
    for session in sessions(lab):
        assert page.request.delete(f"{lab}/api/sessions/{session['id']}").ok


def is_idle(page, lab: str) -> bool:
    """Whether the one kernel has started, is connected to the window, and computes nothing."""
    kernels = [session["kernel"] for session in sessions(lab)]
    ready = [(it["execution_state"], it["connections"] > 0) for it in kernels] == [("idle", True)]
    return ready and page.locator(STATUS).get_by_text("| Idle").is_visible()


def state(page, lab: str) -> str:
    return f"{sessions(lab)}; the window says {page.locator(STATUS).inner_text()!r}"


def save(page) -> None:
    """Save what is open, and wait until the server has written it."""
    with page.expect_response(
        lambda it: it.request.method == "PUT" and "/contents/" in it.url
    ) as it:
        page.locator(SAVE).first.click()
    assert it.value.ok


def restart_and_run_all(page) -> None:
    page.locator(RUN_ALL).first.click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".jp-Dialog").wait_for(state="detached")


@pytest.mark.parametrize("opened", NOTEBOOKS, indirect=True)
def test_opening_and_saving_a_notebook_changes_nothing(opened, project, page):
    """Not one byte of the file, and nothing pink on the screen."""
    path = project / opened
    before = (ROOT / opened).read_bytes()
    page.wait_for_timeout(2000)  # JupyterLab writes soon after the kernel has answered, if it does
    assert path.read_bytes() == before
    assert page.locator(PINK).count() == 0
    save(page)
    assert path.read_bytes() == before


@pytest.mark.parametrize("opened", map(cleared, NOTEBOOKS), indirect=True, ids=NOTEBOOKS)
def test_restart_and_run_all_gives_the_stored_notebook(opened, project, page, lab):
    """No error, stderr, widget or wide line; cells and metadata are those that are stored."""
    before = read(ROOT / opened.replace("-cleared", ""))
    restart_and_run_all(page)

    def ran() -> bool:
        if not is_idle(page, lab):
            return False
        save(page)  # also between two cells
        after = read(project / opened)
        code = [cell for cell in after.cells if cell.cell_type == "code"]
        return bool(failures(after)) or all(cell.execution_count for cell in code)

    wait(
        ran,
        LONGEST,
        lambda: f"nothing has moved in {opened} for {LONGEST} s: {state(page, lab)}",
        lambda: [session["kernel"]["last_activity"] for session in sessions(lab)],
    )
    after = read(project / opened)
    assert problems(after) + too_wide(after) == []
    for old, new in zip(before.cells, after.cells, strict=True):
        assert (old.id, old.source, old.metadata) == (new.id, new.source, new.metadata)
    assert after.metadata == before.metadata
    assert page.locator(PINK).count() == 0


def test_the_rating_widget_is_clicked_through(opened, project, page):
    """Four texts rated, one taken back, each on disk at once; then the report."""
    restart_and_run_all(page)
    widget = page.locator(".jp-OutputArea-output .widget-vbox")
    widget.get_by_text("0 of 4 rated").wait_for(timeout=120_000)
    ratings = project / "completions.ratings.jsonl"

    def click(name: str, rated: int, lines: int) -> None:
        widget.get_by_role("button", name=name, exact=True).click()
        widget.get_by_text(f"{rated} of 4 rated").wait_for()
        assert len(ratings.read_text(encoding="utf-8").splitlines()) == lines

    for lines, (name, rated) in enumerate(
        [("3", 1), ("1", 2), ("undo", 1), ("2", 2), ("2", 3), ("2", 4)], 1
    ):
        click(name, rated, lines)
    entries = [json.loads(line) for line in ratings.read_text().splitlines()]
    assert [entry["rating"] for entry in entries] == [3, 1, None, 2, 2, 2]
    assert widget.get_by_role("button", name="1", exact=True).is_disabled()
    assert widget.get_by_text("interval").or_(widget.get_by_text("told apart")).first.is_visible()
