"""The notebooks as files: what is stored, how they are built, and that nbval compares it."""

import ast
import base64
import contextlib
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from benchmarks.ability_matrix import load_matrix
from repository import agreement, notebooks, shared
from repository.mechanisms import MECHANISMS, ROOT
from repository.notebooks import IGNORED, WIDGET, notebook_paths, problems, store

OURS = ("common", "repository")
# these say everything in sentences
READ = [*MECHANISMS, "comparison", "failures", "conditional_steering", "methods"]
NAMES = [path.stem for path in notebook_paths()]
HEADINGS = [
    "Setup",
    "The idea in five lines",
    "1 Read activations",
    "2 Build the steering vector",
    "3 Add it during the forward pass",
    "4 Generate",
    "5 Check",
    "Pitfalls",
    "Recap and references",
]

MOST_CELLS = {
    "failures": 64,
    "training_vectors": 36,
    "activation_additions": 40,
    "nnsight_additions": 40,
    "measuring": 41,
    "conditional_steering": 40,
    "methods": 40,
}


def read(name: str) -> NotebookNode:
    return nbformat.read(notebook_paths([name])[0], as_version=4)


def code_lines(notebook: NotebookNode) -> list[int]:
    """Count the lines of every code cell, blank ones between two functions left out."""
    return [
        sum(map(bool, cell.source.splitlines()))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def small_notebook(sources: tuple[str, ...] = ()) -> NotebookNode:
    """A notebook without problems: a cell that loads, then cells that print, with outputs."""
    sources = sources or tuple(f"print({number})" for number in range(notebooks.FEWEST_COMPARED))
    cells = [
        new_code_cell(
            "load_model = print; load_model('loaded')", id="load", metadata={"tags": [IGNORED]}
        )
    ]
    cells += [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    for number, cell in enumerate(cells, 1):
        cell.execution_count = number
        cell.outputs = [
            new_output("stream", name="stdout", text=f"{number - 2 if number > 1 else 'loaded'}\n")
        ]
    notebook = new_notebook(cells=cells)
    notebooks.normalise(notebook)
    return notebook


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_has_no_problem(name):
    assert problems(read(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_is_normalised(name):
    notebook = read(name)
    notebooks.normalise(notebook)
    assert nbformat.writes(notebook) + "\n" == (notebook_paths([name])[0]).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", NAMES)
def test_code_cells_are_short_and_introduced(name):
    notebook = read(name)
    assert max(code_lines(notebook)) <= 20
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown" and before.source.strip(), (
                f"nothing introduces:\n{cell.source}"
            )


@pytest.mark.parametrize(("name", "most"), MOST_CELLS.items())
def test_guides_are_short(name, most):
    assert len(read(name).cells) <= most


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_notebooks_are_built_alike(name):
    notebook = read(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADINGS
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    assert 25 <= len(notebook.cells) <= 35
    # without the cell that goes to the project
    # bias_editing has to say for each architecture what it may edit
    most = 16 if name == "bias_editing" else 11
    assert 4 <= statistics.median(code_lines(notebook)[1:]) <= most


@pytest.mark.parametrize("name", NAMES)
def test_lines_fit_a_narrow_window(name):
    """Code has at most 88 columns, what is printed at most 100."""
    assert notebooks.too_wide(read(name)) == []


@pytest.mark.parametrize("name", READ)
def test_no_output_is_a_bare_truth_value(name):
    """A result is a number, or a sentence with the number."""
    for cell in read(name).cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            if not text.lstrip().startswith("def "):
                assert not re.search(r"\b(True|False)\s*$", text, flags=re.MULTILINE), text


def test_wide_lines_are_found():
    notebook = small_notebook(("x = 1  " + "#" * 90, "print('-' * 101)", "y = 2", "z = 3"))
    notebook.cells[2].outputs = [new_output("stream", name="stdout", text="-" * 101 + "\n")]
    table = {"text/plain": "-" * 101, "text/html": "<table></table>"}  # only the second is seen
    notebook.cells[3].outputs = [
        new_output("display_data", table),
        new_output("display_data", {"text/plain": "-" * 102}),
    ]
    assert [line.split(":")[0] for line in notebooks.too_wide(notebook)] == [
        "cell 2 has 97 columns of code",
        "cell 3 prints 101 columns",
        "cell 4 prints 102 columns",
    ]


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_idea_is_five_bare_lines(name):
    """At most five statements, no helper of this project, and the text that was made by hand."""
    notebook = read(name)
    (idea,) = (cell for cell in notebook.cells if "idea" in cell.metadata.get("tags", []))
    tree = ast.parse(idea.source)
    helpers = {
        alias.asname or alias.name
        for cell in notebook.cells
        if "mechanism" in cell.metadata.get("tags", [])
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS
        for alias in node.names
    } - {"Trace"}
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 5
    assert not helpers & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    (by_hand,) = (cell for cell in notebook.cells if cell.id == "idea-code")
    unsteered, steered = (line.split(maxsplit=1) for line in by_hand.outputs[0].text.splitlines())
    assert (unsteered[0], steered[0]) == ("unsteered:", "steered:") and unsteered[1] != steered[1]
    assert steered[1].strip() == idea.outputs[0].text.strip()


# --- The cells that the six share ---

SHARED = [path.name for path in sorted(shared.FOLDER.glob("*.[mp][dy]"))]


@pytest.mark.parametrize("name", MECHANISMS)
def test_shared_cells_are_those_of_the_source(name):
    """Every shared cell is there once and as it is written there; the message says which is not."""
    notebook = read(name)
    differing = shared.differing_cells(notebook, name)
    assert not differing, f"{name}.ipynb differs in {differing}: `make notebooks NAMES={name}`"
    there = [
        f"{shared.shared_name(cell)}.{'py' if cell.cell_type == 'code' else 'md'}"
        for cell in notebook.cells
        if shared.shared_name(cell)
    ]
    assert sorted(there) == SHARED
    first = read(MECHANISMS[0])
    order = [shared.shared_name(cell) for cell in first.cells if shared.shared_name(cell)]
    assert [Path(file).stem for file in there] == order


def printed(name: str, cell_id: str) -> str:
    """What a cell of a notebook printed."""
    (cell,) = (cell for cell in read(name).cells if cell.id == cell_id)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize("cell_id", ["idea-code", "generate-code"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_six_write_the_same(name, cell_id):
    """Greedy texts, and the tones of sampled ones."""
    assert printed(name, cell_id) == printed(agreement.REFERENCE, cell_id) != ""


def test_the_answer_is_what_was_measured():
    """Love minus Hate turns the tone both ways, far more than a random direction does."""
    text = shared.shared_source("published", "markdown", agreement.REFERENCE)
    assert text.startswith("The answer: the two along Love − Hate, each its own way.")
    rows = re.findall(
        r"^ +(.+?) +(\d+)% positive +(\d+)% negative +(\d+)% neither$",
        printed(agreement.REFERENCE, "generate-code"),
        flags=re.MULTILINE,
    )
    found = {label: (int(positive), int(negative)) for label, positive, negative, _ in rows}
    assert list(found) == ["unsteered", "+ to Love", "− to Hate", "random"]
    plain, love, hate, control = (positive - negative for positive, negative in found.values())
    assert love - plain > 30 and plain - hate > 30
    assert abs(control - plain) < min(love - plain, plain - hate) / 2


def test_prompts_stand_in_one_place(monkeypatch):
    """Those of `make run`, whatever their signs; the notebooks open with the last of them."""
    prompts = ['I said "no" to ', "A \\ and\n", "Où"]
    monkeypatch.setattr(agreement, "PROMPTS", prompts)

    def texts(cell: str) -> list[str]:
        tree = ast.parse(shared.shared_source(cell, "code", "seventh"))
        return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]

    assert [text for text in texts("moved") if text in prompts] == prompts
    assert [text for text in texts("idea") if text in prompts] == prompts[-1:]


@pytest.mark.parametrize("name", MECHANISMS)
def test_writing_shared_cells_changes_nothing(name):
    notebook = read(name)
    assert shared.write_shared(notebook, name) == [] and notebook == read(name)


def test_a_changed_shared_cell_is_named_and_written_again():
    notebook = read("baukit")
    (cell,) = (cell for cell in notebook.cells if cell.id == "vector-code")
    cell.source += "\n# mine"
    assert shared.differing_cells(notebook, "baukit") == ["vector (code)"]
    assert shared.write_shared(notebook, "baukit") == ["vector (code)"]
    assert notebook == read("baukit")


def test_a_new_notebook_gets_the_shared_cells():
    """Without a word in differences.toml and without measured abilities."""
    assert shared.shared_source("check", "code", "pytorch_hooks") != shared.shared_source(
        "check", "code", "seventh"
    )
    for file in SHARED:
        kind = "code" if file.endswith(".py") else "markdown"
        text = shared.shared_source(Path(file).stem, kind, "seventh")
        assert "<<" not in text
    assert "not measured yet" in shared.shared_source("ending", "markdown", "seventh")


def test_what_a_shared_cell_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no shared cell 'telepathy.md': expected one of check"):
        shared.shared_source("telepathy", "markdown", "baukit")
    (tmp_path / "differences.toml").write_text("[default]\n")
    (tmp_path / "one.md").write_text("<<other>>")
    with pytest.raises(ValueError, match="one.md asks for <<other>>"):
        shared.shared_source("one", "markdown", "baukit", tmp_path)


def test_a_run_writes_the_shared_cells(tmp_path):
    path, notebook = tmp_path / "small.ipynb", small_notebook()
    notebook.cells.insert(0, new_markdown_cell("old", id="s", metadata={"tags": ["shared-setup"]}))
    store(notebook, path)
    assert run_notebooks(tmp_path) == 0
    assert nbformat.read(path, as_version=4).cells[0].source.startswith("## Setup")


@pytest.mark.parametrize("name", load_matrix()["mechanism"].unique())
def test_limits_are_the_stored_ones(name):
    """The sentence holds the number and every name of what a mechanism lacks, each in its place."""
    text, cells = shared.limits(name), load_matrix().query("mechanism == @name")
    assert f"Of the {len(cells)} abilities" in text
    assert f"it has {(cells['outcome'] == 'yes').sum()};" in text
    told = dict(
        re.findall(r"(few more lines|or fail|something else)\W*: ([^.]*(?:\.\w[^.]*)*)\.", text)
    )
    for outcome, words in {
        "few lines": "few more lines",
        "error": "or fail",
        "silently no": "something else",
    }.items():
        wanted = cells[cells["outcome"] == outcome]["ability"].tolist()
        assert told.get(words, "").split("; ") == (wanted or [""])


# --- Pictures ---


@pytest.mark.parametrize("name", NAMES)
def test_stored_pictures_are_the_known_ones(name):
    """Each PNG can be decoded, has size and content as noted, and shows something."""
    noted = json.loads(notebooks.PICTURES.read_text(encoding="utf-8")).get(name, {})
    found = notebooks.known_pictures(read(name))
    assert found == noted, f"`make notebooks NAMES={name}` draws and notes the pictures again"
    for picture in found.values():
        assert picture["colours"] >= notebooks.FEWEST_COLOURS
        assert min(picture["size"]) >= 100 and max(picture["size"]) <= 2000


def png(colour: str = "white") -> str:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def test_a_replaced_picture_is_noticed(tmp_path):
    """Another one, a blank one and a broken one are told from the one that was noted."""
    notebook, path, table = small_notebook(), tmp_path / "small.ipynb", tmp_path / "pictures.json"
    picture = new_output("display_data", data={"image/png": png("red")})
    notebook.cells[1].outputs = [picture]
    store(notebook, path)
    notebooks.note_pictures([path], table)
    noted = json.loads(table.read_text())["small"]
    assert noted == notebooks.known_pictures(notebook)
    assert noted["cell-0, 1"]["size"] == [300, 200] and noted["cell-0, 1"]["colours"] == 1
    picture.data["image/png"] = png("blue")
    assert notebooks.known_pictures(notebook) != noted
    picture.data["image/png"] = base64.b64encode(b"no picture").decode()
    with pytest.raises(OSError, match="cannot identify image"):
        notebooks.known_pictures(notebook)


# --- Problems of a stored notebook ---


def test_small_notebook_has_no_problem():
    assert problems(small_notebook()) == []


BREAKS = {
    "the counts are": lambda notebook: notebook.cells[2].update(execution_count=9),
    "None": lambda notebook: notebook.cells[2].update(execution_count=None),
    "writes to stderr": (
        lambda notebook: notebook.cells[1].outputs.append(
            new_output("stream", name="stderr", text="oh")
        )
    ),
    "ends in KeyError": (
        lambda notebook: notebook.cells[1].outputs.append(
            new_output("error", ename="KeyError", evalue="k")
        )
    ),
    "shows a widget": (
        lambda notebook: notebook.cells[1].outputs.append(
            new_output("display_data", data={WIDGET: {}})
        )
    ),
    "state of a widget": lambda notebook: notebook.metadata.update(widgets={}),
    "the kernelspec is 'other'": lambda notebook: notebook.metadata.update(
        kernelspec={"name": "other"}
    ),
    "4 cells have outputs": lambda notebook: notebook.cells[3].update(outputs=[]),
    "expected on the one cell": lambda notebook: notebook.cells[3].metadata.update(tags=[IGNORED]),
    "tagged nbval-skip": lambda notebook: notebook.cells[3].metadata.update(tags=["nbval-skip"]),
    "comment marker": (
        lambda notebook: notebook.cells[3].update(source="# NBVAL_IGNORE_OUTPUT\nprint(2)")
    ),
}


@pytest.mark.parametrize("complaint", BREAKS)
def test_problem_is_found(complaint):
    notebook = small_notebook()
    BREAKS[complaint](notebook)
    assert any(complaint in problem for problem in problems(notebook)), problems(notebook)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("path", "saved in /home/somebody/model"),
        ("path", r"saved in C:\Users\somebody"),
        ("device", "tensor on cuda:0"),
        ("device", "float32 on cpu"),
        ("time", "took 1.25 s"),
        ("time", "took 12 ms"),
        ("time", "at 2026-01-31"),
        ("version", "torch 2.13.0"),
        ("address", "<object at 0x7f3a12345678>"),
    ],
)
@pytest.mark.parametrize("output_type", ["stream", "execute_result"])
def test_private_text_is_found(kind, text, output_type):
    notebook = small_notebook()
    content = (
        {"name": "stdout", "text": text}
        if output_type == "stream"
        else {"data": {"text/html": f"<b>{text}</b>"}}
    )
    notebook.cells[2].outputs = [new_output(output_type, **content)]
    assert any(
        problem.startswith(f"cell 3 prints a{'n' * (kind == 'address')} {kind}")
        for problem in problems(notebook)
    )
    notebook.cells[2].outputs = []
    notebook.cells[0].outputs = [
        new_output(output_type, **content)
    ]  # the ignored cell may name a device, not a path
    assert any("prints" in problem for problem in problems(notebook)) == (kind == "path")


@pytest.mark.parametrize(
    "text",
    ["norm 100.23, cosine 0.1", "in the 1990s", "https://example.org/home/post", "[3, 12, 64]"],
)
def test_ordinary_text_is_no_problem(text):
    notebook = small_notebook()
    notebook.cells[2].outputs = [new_output("stream", name="stdout", text=text)]
    assert problems(notebook) == []


def run_notebooks(folder: Path) -> int:
    return notebooks.main([], folder)


def test_run_stores_outputs_and_a_second_run_changes_nothing(tmp_path):
    path, notebook = tmp_path / "small.ipynb", small_notebook()
    for cell in notebook.cells:
        cell.update(execution_count=None, outputs=[])
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-31T12:00:00Z"}
    notebook.metadata.update(kernelspec={"name": "python3", "display_name": "mine"}, widgets={})
    store(notebook, path)
    assert run_notebooks(tmp_path) == 0
    assert nbformat.read(path, as_version=4) == small_notebook()
    stored = path.read_bytes()
    assert run_notebooks(tmp_path) == 0
    assert path.read_bytes() == stored
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "source",
    [
        "raise KeyError('missing')",
        "import sys; print('oh', file=sys.stderr)",
        f"display({{{WIDGET!r}: {{}}}}, raw=True)",
        "import os; os._exit(1)",
    ],
    ids=["error", "stderr", "widget", "dead kernel"],
)
def test_run_that_must_not_be_stored_leaves_the_file(tmp_path, source):
    path = tmp_path / "broken.ipynb"
    store(small_notebook((source,)), path)
    before = path.read_bytes()
    assert run_notebooks(tmp_path) == 1
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_run_does_not_depend_on_the_readers_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERING_MODEL", "gpt2-xl")
    store(
        small_notebook(("import os; print(os.environ.get('STEERING_MODEL'))",)),
        tmp_path / "small.ipynb",
    )
    assert notebooks.execute(tmp_path / "small.ipynb").cells[1].outputs[0].text == "None\n"


def test_unknown_notebook_is_named(tmp_path, capsys):
    assert notebooks.main(["missing"], tmp_path) == 1
    assert "no notebook 'missing'" in capsys.readouterr().err


def test_nbval_sees_a_changed_number(tmp_path):
    """A stored notebook passes plain nbval outside the project; with another number it fails."""
    as_it_is, changed = tmp_path / "as_it_is.ipynb", tmp_path / "changed.ipynb"
    cells = [new_code_cell("x = 1.25"), new_code_cell("print(f'{x:.2f}')")]
    store(new_notebook(cells=cells), as_it_is)
    notebook = notebooks.execute(as_it_is)
    store(notebook, as_it_is)
    notebook.cells[-1].outputs[0].text = "1.26\n"
    store(notebook, changed)
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, as_it_is.name, changed.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert "1 failed, 3 passed" in result.stdout
    assert "FAILED changed.ipynb::Cell 1" in result.stdout


# --- JupyterLab ---


def test_stored_is_what_jupyterlab_writes():
    """JupyterLab writes the kernel's display name and language; the version is ours."""
    assert notebooks.KERNELSPEC["display_name"] == get_kernel_spec("python3").display_name
    assert IPythonKernel.language_info | {"version": ""} == notebooks.LANGUAGE | {"version": ""}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab that `make lab` started with arguments, and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    installed = folder / ".installed"
    installed.touch()  # nothing is installed then
    arguments = (
        f"--no-browser --port=0 --IdentityProvider.token=secret --ServerApp.root_dir={folder}"
    )
    python = shlex.quote(
        sys.executable
    )  # `make` hands it to a shell, and the clone may stand in a folder with a space
    command = [
        "make",
        "-C",
        str(ROOT),
        "lab",
        f"RUN={python} -m",
        f"STAMP={installed}",
        f"ARGS={arguments}",
    ]
    home = {
        name: str(folder / ".home")
        for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    server = subprocess.Popen(
        command,
        env=os.environ | home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert found, "".join(lines)
        for _ in range(100):  # the line comes a little before the server listens
            with contextlib.suppress(urllib.error.URLError):
                fetch(f"{found[0]}/api")
                break
            time.sleep(0.1)
        yield found[0], folder
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def fetch(url: str, data: bytes | None = None) -> str:
    headers = {"Authorization": "token secret", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method="PUT" if data else "GET")
    return urllib.request.urlopen(request, timeout=30).read().decode()


def test_lab_asks_no_question_about_news(lab):
    page = fetch(f"{lab[0]}/lab")
    config = json.loads(
        re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, flags=re.DOTALL)[1]
    )
    assert "@jupyterlab/apputils-extension:announcements" in config["disabledExtensions"]


def test_lab_with_another_python_writes_what_was_stored(lab):
    """Another version of Python and an output that a bar left change no byte of the file."""
    url, folder = lab
    notebook = small_notebook()
    store(notebook, folder / "small.ipynb")
    before = (folder / "small.ipynb").read_bytes()

    def save() -> dict:
        content = {"type": "notebook", "format": "json", "content": notebook}
        fetch(f"{url}/api/contents/small.ipynb", json.dumps(content).encode())
        return nbformat.read(folder / "small.ipynb", as_version=4)

    notebook.metadata.language_info.version = "3.99.0"
    notebook.cells[2].outputs.append(new_output("display_data"))
    save()
    assert (folder / "small.ipynb").read_bytes() == before
    notebook.cells[2].source = "changed"
    assert save().cells[2].source == "changed"
    notebook.metadata.language_info.update(
        name="R", version="4.4"
    )  # the reader's own choice is kept
    assert save().metadata.language_info.version == "4.4"


def test_what_is_saved_beside_notebooks_or_over_one_without_a_version(tmp_path):
    """Another file stays as it is; a version that was not stored comes from who saves."""
    folder, text = SimpleNamespace(root_dir=tmp_path), {"type": "file", "content": "x = 1"}
    notebooks.before_saving(text, "a.py", folder)
    assert text == {"type": "file", "content": "x = 1"}
    notebook = small_notebook()
    del notebook.metadata.language_info["version"]
    (tmp_path / "a.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
    notebook.metadata.language_info.version = "3.99.0"
    notebooks.before_saving({"type": "notebook", "content": notebook}, "a.ipynb", folder)
    assert notebook.metadata.language_info.version == "3.99.0"


def test_bars_leave_nothing_in_a_notebook(tmp_path, monkeypatch):
    """A bar shows while it runs, also one in another; nothing is left on stderr, and no widget."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(notebooks, "clean_environment", lambda environment: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = """
from tqdm import tqdm
from common import progress
progress.DELAY = 0
with progress.progress_bar(2, "outer", "row", show=True) as bar:
    for _ in range(2):
        for _ in tqdm(range(3), mininterval=0, **progress.bar_options()):
            pass
        bar.update()
print("done")
"""
    path, shown = tmp_path / "bars.ipynb", []
    store(new_notebook(cells=[new_code_cell(source)]), path)
    cell = notebooks.execute(path, lambda cell, **_: shown.extend(cell.outputs)).cells[0]
    assert [output.output_type for output in shown] == ["display_data"] * 3 + ["stream"]
    assert [output.get("data") for output in shown[:3]] == [{}] * 3
    assert [(output.name, output.text) for output in cell.outputs] == [("stdout", "done\n")]
