"""The first cell of every notebook, run as Colab runs it, and the command that writes it."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from repository import colab
from repository.mechanisms import ROOT
from repository.notebooks import KERNELSPEC, LANGUAGE, notebook_paths, store


def run_python(
    source: str, folder: Path, *flags: str, answers: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run Python in a folder, without the project on its path; it reads `answers` on stdin."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "STEERING_"))
    }
    return subprocess.run(
        [sys.executable, *flags, "-c", source],
        cwd=folder,
        env=clean | environment,
        input=answers,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """A folder that makes `google.colab` importable, beside what else of `google` is there."""
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
    (folder / "repository" / "data").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    output = new_output("stream", name="stdout", text="0.5\n")
    marked = [
        new_markdown_cell("[badge]", id="b", metadata={"tags": ["badge"]}),
        new_markdown_cell("## Setup", id="s"),
        new_code_cell("pass", id="c", metadata={"tags": ["colab"]}, execution_count=1),
        new_code_cell("print(0.5)", id="p", execution_count=2, outputs=[output]),
    ]
    store(new_notebook(cells=marked), folder / "marked.ipynb")
    store(
        new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1")]),
        folder / "bare.ipynb",
    )
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository that holds the beginning of the project."""
    source = tmp_path / "repositories" / "owner" / "steering"
    (source / "common").mkdir(parents=True)
    (source / "repository").mkdir()
    for name in (
        "common/__init__.py",
        "common/__init__.pyi",
        "repository/mechanisms.py",
        "requirements.txt",
    ):
        shutil.copy(ROOT / name, source / name)
    git = ["git", "-C", str(source), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return source


@pytest.fixture
def on_colab(stub: str, empty: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a cell as on Colab, with folders of the test for /content and for GitHub.

    All requirements are installed. pip needs seconds to see that, so a module that does nothing
    stands in for it.
    """
    (Path(stub) / "pip.py").touch()
    config = tmp_path / "gitconfig"
    config.write_text(
        f'[url "file://{tmp_path}/repositories/"]\n\tinsteadOf = https://github.com/\n'
    )
    settings = {"PYTHONPATH": stub, "GIT_CONFIG_GLOBAL": str(config)}

    def run(
        cell: str, check: str = "", folder: Path = empty, server: str = "", **others
    ) -> subprocess.CompletedProcess:
        cell = cell.replace("/content", str(empty))
        if server:
            cell = cell.replace("ask_colab()", f"ask_colab({server!r})")
        return run_python(f"{cell}\n{check}", folder, **settings, **others)

    return run


CHECK = (
    "import common; print(os.path.dirname(os.path.dirname(common.__file__)), os.getcwd(),"
    " sys.path.count(os.getcwd()), sep=chr(10))"
)
SENTENCE = "RuntimeError: no project here: os.chdir() to it, on Colab set STEERING_REPO"


def went_to(folder: Path) -> list[str]:
    """What `CHECK` prints where the cell went to a folder."""
    return [str(folder), str(folder), "1"]


@contextlib.contextmanager
def colab_server(answer: bytes, pause: float = 0) -> Iterator[str]:
    """The address of a server that answers as Colab does, byte by byte if there is a pause."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/sessions" else 404)
            self.end_headers()
            with contextlib.suppress(OSError):
                for start in range(len(answer)):
                    self.wfile.write(answer[start : start + 1])
                    time.sleep(pause)

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def session(path: str) -> bytes:
    """An answer of Colab's session API about one open notebook."""
    return json.dumps(
        [{"id": "1", "kernel": {"id": "2"}, "name": "x.ipynb", "path": path, "type": "notebook"}]
    ).encode()


@pytest.mark.parametrize(
    "form", ["{path}", "file://{path}", "owner/steering", "https://github.com/owner/steering"]
)
def test_cell_on_colab_clones_what_the_variable_says_and_may_run_twice(
    on_colab, empty, repository, form
):
    """The variable wins over the written address; the second run finds the folder."""
    cell, variable = colab.colab_cell("no/address"), {"STEERING_REPO": form.format(path=repository)}
    result = on_colab(cell + "\n" + cell, CHECK, **variable)
    assert (
        result.stderr.removeprefix(
            "warning: --depth is ignored in local clones; use file:// instead.\n"
        )
        == ""
    )
    assert result.stdout.splitlines() == went_to(empty / "steering")
    # After a restart of the kernel Python begins outside again.
    assert on_colab(cell, CHECK).stdout == result.stdout


def test_cell_on_colab_clones_the_written_address(on_colab, empty, repository):
    assert on_colab(colab.colab_cell("owner/steering"), CHECK).stdout.splitlines() == went_to(
        empty / "steering"
    )


@pytest.mark.parametrize("place", ["uploaded", "drive/MyDrive/steering"])
def test_cell_on_colab_takes_what_is_there(on_colab, empty, repository, place):
    """Uploaded or on Drive, without a question; the address is not used."""
    shutil.copytree(repository, empty / place)
    result = on_colab(colab.colab_cell("no/address"), CHECK)
    assert (result.stderr, result.stdout.splitlines()) == ("", went_to(empty / place))


@pytest.mark.parametrize(
    "path",
    [
        "fileId=https%3A//github.com/owner/steering/blob/main/pytorch_hooks.ipynb",
        "fileId=https%3A%2F%2Fgithub.com%2Fowner%2Fsteering%2Fblob%2Fmain%2Fpytorch_hooks.ipynb",
        "https://github.com/owner/steering/blob/main/pytorch_hooks.ipynb",
        "/github/owner/steering/blob/a/branch/pytorch_hooks.ipynb",
    ],
)
def test_cell_on_colab_asks_colab(on_colab, empty, repository, path):
    with colab_server(session(path)) as server:
        result = on_colab(colab.colab_cell(None), CHECK, server=server)
    assert (result.stderr, result.stdout.splitlines()) == ("", went_to(empty / "steering"))


NOTHING = {
    "on Drive": session("fileId=1a2b3c"),
    "uploaded": session("github.ipynb"),
    "a gist": session("https://gist.github.com/owner/0123abc"),
    "none": b"[]",
    "no answer": b"",
    "no JSON": b"<html>\xff\xfe\0 moved",
}


@pytest.mark.parametrize("answer", NOTHING)
def test_cell_on_colab_asks_the_reader_where_colab_does_not_know(
    on_colab, empty, repository, answer
):
    with colab_server(NOTHING[answer]) as server:
        result = on_colab(
            colab.colab_cell(None), CHECK, server=server, answers=" owner/steering \n"
        )
    assert result.stdout.removeprefix("Its GitHub owner/name: ").splitlines() == went_to(
        empty / "steering"
    ), result.stderr


@pytest.mark.parametrize("answers", ["", "\n", "  \n"], ids=["nobody there", "empty", "blank"])
def test_cell_on_colab_explains_in_one_sentence(on_colab, empty, answers):
    """Nothing found, no server, no answer: the error says what to do, and nothing was cloned."""
    result = on_colab(colab.colab_cell(None), server="127.0.0.1:9", answers=answers)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, SENTENCE)
    assert "fatal" not in result.stderr and not list(empty.iterdir())


def test_cell_on_colab_explains_where_the_address_is_wrong(on_colab, empty):
    """Git says what is wrong with it, and the last line is the sentence."""
    result = on_colab(colab.colab_cell("no/address"))
    assert "no/address" in result.stderr and result.stderr.splitlines()[-1] == SENTENCE


def test_cell_waits_for_colab_for_a_second(on_colab):
    """Also where the answer comes byte by byte: the second is for the whole of it."""
    with colab_server(b" " * 1000, pause=0.05) as server:
        before = time.monotonic()
        result = on_colab(colab.colab_cell(None), server=server)
        assert result.stderr.splitlines()[-1] == SENTENCE and time.monotonic() - before < 8


@pytest.mark.parametrize(
    "flags", [(), ("-S",)], ids=["with other packages", "without a package `google`"]
)
@pytest.mark.parametrize("where", [".", "tests", "common/embedded"])
def test_cell_elsewhere_goes_to_the_root_above(flags, where):
    """It prints nothing, installs nothing, and in the root it changes nothing."""
    cell = colab.colab_cell("owner/name")
    check = (
        "print(os.getcwd(), os.path.isfile('repository/colab.py'), 'common' in sys.modules,"
        " sep=chr(10))"
    )
    result = run_python(f"{cell}\n{cell}\n{check}", ROOT / where, *flags)
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (
        0,
        [str(ROOT), "True", "False"],
        "",
    )


def test_cell_on_colab_installs_the_requirements(stub, empty, repository):
    """Where that fails, pip's error is not passed over."""
    (repository / "requirements.txt").write_text("nbformat==0.0.1\n")
    result = run_python(colab.colab_cell(None), repository, PYTHONPATH=stub, PIP_NO_INDEX="1")
    assert (
        result.returncode == 1
        and "nbformat==0.0.1" in result.stderr
        and "CalledProcessError" in result.stderr
    )


def test_cell_elsewhere_takes_the_project_on_the_path(empty):
    result = run_python(f"{colab.colab_cell(None)}\n{CHECK}", empty, PYTHONPATH=str(ROOT))
    assert (result.stdout.splitlines(), result.stderr) == (went_to(ROOT), "")


@pytest.mark.parametrize("repo", [None, "owner/name"])
def test_cell_elsewhere_says_what_to_do(empty, repo):
    """With the kernel in a folder outside the project: no question, no clone, one sentence."""
    result = run_python(colab.colab_cell(repo), empty, STEERING_REPO="owner/name")
    assert (result.returncode, result.stdout, result.stderr.splitlines()[-1]) == (1, "", SENTENCE)
    assert not list(empty.iterdir())


def test_cell_fits_in_a_notebook():
    lines = colab.colab_cell("owner/name").splitlines()
    assert sum(map(bool, lines)) <= 20 and max(map(len, lines)) <= 88


@pytest.mark.parametrize("name", [path.stem for path in notebook_paths()])
def test_notebooks_begin_as_the_tool_writes_them(name):
    """The tool would change nothing: badge (none while the address is unknown), cell, metadata."""
    notebook, text = (
        nbformat.read(notebook_paths([name])[0], as_version=4),
        (notebook_paths([name])[0]).read_text(encoding="utf-8"),
    )
    repo = colab.stored_repository()
    colab.mark(notebook, name, repo)
    assert nbformat.writes(notebook) + "\n" == text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (
        code[0].source == colab.colab_cell(repo)
        and code[0].metadata.tags == ["colab"]
        and not code[0].outputs
    )
    assert ("colab-badge" in text) == (repo is not None) and "OWNER/NAME" not in text


def test_write_fills_or_makes_badge_and_cell(project):
    before = nbformat.read(project / "marked.ipynb", as_version=4)
    assert len(colab.write("owner/name", project)) == 2
    assert colab.stored_repository(project) == "owner/name"
    for name, code in (("marked", 2), ("bare", 2)):
        cells = nbformat.read(project / f"{name}.ipynb", as_version=4).cells
        assert cells[0].source == colab.badge("owner/name", f"{name}.ipynb")
        assert cells[code].source == colab.colab_cell("owner/name")
    after = nbformat.read(project / "marked.ipynb", as_version=4)
    for cell in (0, 2):
        after.cells[cell].source = before.cells[cell].source
    assert after.cells == before.cells  # ids, counts, outputs and all other cells
    assert after.metadata == {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}


def test_write_without_an_address_takes_the_badge_away(project):
    before = nbformat.read(project / "marked.ipynb", as_version=4)
    colab.write(None, project)
    assert colab.stored_repository(project) is None
    for name in ("marked", "bare"):
        assert "badge" not in (project / f"{name}.ipynb").read_text()
    after = nbformat.read(project / "marked.ipynb", as_version=4)
    assert after.cells[1].source == colab.colab_cell(None)
    assert [cell.id for cell in after.cells] == ["s", "c", "p"] and after.cells[2] == before.cells[
        3
    ]


def test_write_again_changes_nothing_and_another_address_only_the_address(project):
    colab.write("owner/name", project)
    texts = {path: path.read_bytes() for path in project.glob("*.ipynb")}
    assert colab.write("owner/name", project) == []
    assert {path: path.read_bytes() for path in project.glob("*.ipynb")} == texts
    assert len(colab.write("someone/other", project)) == 2
    for path, text in texts.items():
        assert path.read_bytes() == text.replace(b'owner/name\\"', b'someone/other\\"').replace(
            b"/owner/name/", b"/someone/other/"
        )
    colab.write(None, project)
    without = {path: path.read_bytes() for path in texts}
    assert (
        colab.write(None, project) == [] and {path: path.read_bytes() for path in texts} == without
    )


@pytest.mark.parametrize(
    "address",
    [
        "owner/a.name",
        "https://github.com/owner/a.name",
        "https://github.com/owner/a.name.git/",
        "git@github.com:owner/a.name.git",
    ],
)
def test_address_is_understood(address):
    assert colab.parse_repository(address) == "owner/a.name"


@pytest.mark.parametrize("address", ["name", "https://example.org/owner/name", "/a/local/path", ""])
def test_other_address_is_refused(address):
    with pytest.raises(ValueError, match="expected owner/name"):
        colab.parse_repository(address)


def test_default_address_is_that_of_origin(project, capsys):
    """Without one on GitHub the stored address stays; where none is stored there is no badge."""
    (project / colab.STORED).write_text('{"repo": null}')
    assert colab.main([], project) == 0
    out, err = capsys.readouterr()
    assert (
        "no remote `origin`" in err
        and "no badge" in out
        and colab.stored_repository(project) is None
    )
    remote = ["git", "-C", str(project), "remote"]
    subprocess.run([*remote, "add", "origin", "git@github.com:owner/name.git"], check=True)
    assert colab.main([], project) == 0
    assert colab.stored_repository(project) == "owner/name"
    subprocess.run([*remote, "set-url", "origin", "/a/local/path"], check=True)
    assert colab.main([], project) == 0
    assert (
        "not on GitHub" in capsys.readouterr().err
        and colab.stored_repository(project) == "owner/name"
    )
    before = (project / "bare.ipynb").read_bytes()
    assert colab.main(["no address"], project) == 1
    assert (project / "bare.ipynb").read_bytes() == before


def test_workflow_commits_badge_and_cell_once(repository, tmp_path):
    """Its commands, run for real: one commit on the first push, none on the second."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/colab.yml").read_text())
    assert workflow["permissions"] == {"contents": "write"}
    bare, clone = tmp_path / "bare.git", tmp_path / "clone"
    shutil.copytree(ROOT / "repository", repository / "repository", dirs_exist_ok=True)
    shutil.copy(ROOT / "baukit.ipynb", repository)
    git = [
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-C",
        str(repository),
    ]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "notebook"], check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", repository, bare], check=True)
    subprocess.run(["git", "clone", "--quiet", bare, clone], check=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {
        "GITHUB_REPOSITORY": "someone/a.name",
        "PATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for _ in range(2):
        script = workflow["jobs"]["write"]["steps"][-1]["run"]
        # As GitHub runs a step.
        subprocess.run(
            ["bash", "-e", "-c", script], cwd=clone, env=settings, check=True, capture_output=True
        )
        log = subprocess.run(
            ["git", "-C", bare, "log", "--format=%s"], check=True, capture_output=True, text=True
        )
        assert log.stdout.splitlines() == [
            "Colab: badge and first cell for someone/a.name",
            "notebook",
            "all",
        ]
    source = (clone / "baukit.ipynb").read_text()
    assert (
        colab.badge("someone/a.name", "baukit.ipynb") in source
        and 'or \\"someone/a.name\\"' in source
    )
