"""What the site adds to notebooks and README, as far as it can be seen without building it."""

import importlib.util
import json
import re
import tomllib
from fnmatch import fnmatch
from types import ModuleType

import pytest

from repository.mechanisms import ROOT
from repository.notebooks import notebook_paths

FRONT_PAGE = (ROOT / "site/pages/index.md").read_text(encoding="utf-8")
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in notebook_paths()}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The module `site/build.py`; its folder has the name of a module of Python."""
    spec = importlib.util.spec_from_file_location("build_of_the_site", ROOT / "site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(build) -> dict:
    return tomllib.loads(build.ALT_TEXTS.read_text(encoding="utf-8"))


def without_metadata(notebook: dict) -> list[dict]:
    return [
        {key: part for key, part in cell.items() if key != "metadata"} for cell in notebook["cells"]
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_shown_as_it_is(build, texts, name):
    """But for the metadata of cells; the Colab cell is folded, and every picture has its text."""
    notebook, before = NOTEBOOKS[name], json.dumps(NOTEBOOKS[name])
    shown = build.for_the_site(notebook, name, texts)
    assert json.dumps(notebook) == before
    assert without_metadata(shown) == without_metadata(notebook)
    folded = [cell for cell in shown["cells"] if "hide-cell" in cell["metadata"].get("tags", [])]
    assert [cell["metadata"]["tags"] for cell in folded] == [["colab", "hide-cell"]]
    told = [cell["id"] for cell in shown["cells"] if "mystnb" in cell["metadata"]]
    assert told == build.pictures(notebook)


@pytest.mark.parametrize("told", [0, 1])
def test_pictures_without_a_text_are_named(build, told):
    """All of a notebook and no other, as the lines that the file of texts lacks."""
    notebook = NOTEBOOKS["pytorch_hooks"]
    shown = build.pictures(notebook)
    texts = {"baukit": dict.fromkeys(shown, "a"), "pytorch_hooks": dict.fromkeys(shown[:told], "a")}
    lines = "\n".join(["[pytorch_hooks]", *(f'{cell} = "what it shows"' for cell in shown[told:])])
    assert len(shown) > 1
    with pytest.raises(ValueError, match=rf"alt_texts\.toml.*\n{re.escape(lines)}$"):
        build.for_the_site(notebook, "pytorch_hooks", texts)


def test_every_text_belongs_to_a_picture(build, texts):
    """None is left from a picture that went; one that is shared stands for at least two."""
    shown = {name: build.pictures(notebook) for name, notebook in NOTEBOOKS.items()}
    for part, by_cell in texts.items():
        for cell, text in by_cell.items():
            places = [name for name in shown if cell in shown[name]]
            assert part in places if part != build.EVERYWHERE else len(places) > 1, (part, cell)
            assert 40 < len(text) < 300 and not re.search(
                r"\d", text.replace("GPT2", "GPT").replace("GPT-2", "")
            ), text


def test_the_front_page_finds_its_lines_in_the_readme():
    """Each mark between which it shows the README stands there once."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = re.findall(r':(?:start-after|end-before): "(.*)"', FRONT_PAGE)
    assert len(marks) >= 2
    assert {mark: readme.count(mark) for mark in marks} == dict.fromkeys(marks, 1)


def test_every_notebook_and_page_is_in_the_side_bar():
    lists = re.findall(r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", FRONT_PAGE, re.DOTALL)
    entries = [
        re.sub(r".*<(.*)>", r"\1", line) for part in lists for line in part.strip().splitlines()
    ]
    pages = [*notebook_paths(), *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]
    wanted = [path.relative_to(ROOT).with_suffix("").as_posix() for path in pages]
    assert len(lists) >= 5
    assert [it for it in wanted if not any(fnmatch(it, entry) for entry in entries)] == []


def test_the_site_has_exact_versions_of_all_that_it_asks_for():
    """And none without a version."""
    asked = re.findall(r"^([\w-]+)", (ROOT / "requirements-site.txt").read_text(), re.MULTILINE)
    lines = (ROOT / "constraints-site.txt").read_text().splitlines()
    exact = [line.split("==")[0].lower() for line in lines if not line.startswith("#")]
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert {name.replace("_", "-") for name in asked} <= {it.replace("_", "-") for it in exact}
