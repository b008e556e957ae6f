"""The first cell of every notebook, run as Colab runs it, and the command that writes it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from common import colab
from common.mechanisms import ROOT
from common.notebooks import notebook_paths, store


def run_python(source: str, folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, without the project on its path."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *flags, "-c", source], cwd=folder, env=clean | environment, capture_output=True, text=True
    )


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """A folder that makes `google.colab` importable, beside whatever else of `google` is installed."""
    package = tmp_path / "stub" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return str(tmp_path / "stub")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small root: one notebook with badge, cell and outputs, one with neither, and no remote."""
    folder = tmp_path / "project"
    (folder / "common" / "data").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    output = new_output("stream", name="stdout", text="0.5\n")
    marked = [
        new_markdown_cell("[badge]", id="b", metadata={"tags": ["badge"]}),
        new_markdown_cell("## Setup", id="s"),
        new_code_cell("pass", id="c", metadata={"tags": ["colab"]}, execution_count=1),
        new_code_cell("print(0.5)", id="p", execution_count=2, outputs=[output]),
    ]
    store(new_notebook(cells=marked), folder / "marked.ipynb")
    store(new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1")]), folder / "bare.ipynb")
    return folder


def test_cell_on_colab_fetches_the_project_and_may_run_twice(stub, empty, tmp_path):
    source = tmp_path / "steering"
    source.mkdir()
    shutil.copytree(ROOT / "common", source / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", source)
    git = ["git", "-C", str(source), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    cell = colab.colab_cell(source.as_uri())
    check = "import common.mechanisms; print(common.mechanisms.ROOT); print(sys.path.count(os.getcwd()))"
    # Everything is installed already; without an index pip cannot install anything else.
    result = run_python(f"{cell}\n{cell}\n{check}", empty, PYTHONPATH=stub, PIP_NO_INDEX="1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == [str(empty / "steering"), "1"]
    # After a restart of the kernel Python begins outside again, and the folder is there.
    assert run_python(f"{cell}\n{check}", empty, PYTHONPATH=stub, PIP_NO_INDEX="1").stdout == result.stdout


@pytest.mark.parametrize("flags", [(), ("-S",)], ids=["with other packages", "without a package `google`"])
def test_cell_does_nothing_elsewhere(empty, flags):
    result = run_python(colab.colab_cell("https://github.com/owner/name"), empty, *flags)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(empty.iterdir())


def test_cell_with_unknown_address_says_so_on_colab_only(stub, empty):
    cell = colab.colab_cell(colab.repository_url(colab.PLACEHOLDER))
    assert run_python(cell, empty).returncode == 0
    result = run_python(cell, empty, PYTHONPATH=stub)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: this copy does not know the address")


def test_cell_fits_in_a_notebook():
    assert len(colab.colab_cell("https://github.com/owner/name").splitlines()) <= 15


@pytest.mark.parametrize("name", [path.stem for path in notebook_paths()])
def test_notebooks_carry_badge_and_cell(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    repo = colab.stored_repository()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source == colab.badge(repo, name)
    assert code[0].source == colab.colab_cell(colab.repository_url(repo))
    assert code[0].metadata.tags == ["colab"] and not code[0].outputs


def test_write_fills_or_makes_badge_and_cell(project):
    before = nbformat.read(project / "marked.ipynb", as_version=4)
    assert len(colab.write("owner/name", project)) == 2
    assert colab.stored_repository(project) == "owner/name"
    for name, code in (("marked", 2), ("bare", 2)):
        cells = nbformat.read(project / f"{name}.ipynb", as_version=4).cells
        assert cells[0].source == colab.badge("owner/name", name)
        assert cells[code].source == colab.colab_cell("https://github.com/owner/name")
    after = nbformat.read(project / "marked.ipynb", as_version=4)
    for cell in (0, 2):
        after.cells[cell].source = before.cells[cell].source
    assert after == before  # ids, counts, outputs and all other cells


def test_write_again_changes_nothing_and_another_address_only_the_address(project):
    colab.write("owner/name", project)
    texts = {path: path.read_bytes() for path in project.glob("*.ipynb")}
    assert colab.write("owner/name", project) == []
    assert {path: path.read_bytes() for path in project.glob("*.ipynb")} == texts
    assert len(colab.write("someone/other", project)) == 2
    for path, text in texts.items():
        expected = text.replace(b"owner/name", b"someone/other").replace(b'\\"name\\"', b'\\"other\\"')
        assert path.read_bytes() == expected


@pytest.mark.parametrize(
    "address",
    ["owner/a.name", "https://github.com/owner/a.name", "https://github.com/owner/a.name.git/", "git@github.com:owner/a.name.git"],
)
def test_address_is_understood(address):
    assert colab.parse_repository(address) == "owner/a.name"


@pytest.mark.parametrize("address", ["name", "https://example.org/owner/name", "/a/local/path", ""])
def test_other_address_is_refused(address):
    with pytest.raises(ValueError, match="expected owner/name"):
        colab.parse_repository(address)


def test_default_address_is_that_of_origin(project, capsys):
    assert colab.main([], project) == 1
    assert "no remote `origin`" in capsys.readouterr().err
    remote = ["git", "-C", str(project), "remote"]
    subprocess.run([*remote, "add", "origin", "/a/local/path"], check=True)
    assert colab.main([], project) == 1
    assert "not on GitHub" in capsys.readouterr().err
    subprocess.run([*remote, "set-url", "origin", "git@github.com:owner/name.git"], check=True)
    assert colab.main([], project) == 0
    assert colab.stored_repository(project) == "owner/name"
