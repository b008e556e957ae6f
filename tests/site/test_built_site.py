"""The built site as a browser gets it, read without one; `make site` runs this.

It needs nothing but pytest, so it does without the fixtures of the other tests.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site/_build/html"
PAGES = [
    path
    for path in sorted(SITE.rglob("*.html"))
    if "_static" not in path.parts and path.parent.name != "playground"
]
NAMES = [str(page.relative_to(SITE)) for page in PAGES]


class Page(HTMLParser):
    """What a page points at, loads, shows as pictures, and can be pointed at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.pictures: list[dict] = []
        self.ids: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(found["href"])
        if tag == "img":
            self.pictures.append(found)


@cache
def read(path: Path) -> Page:
    return Page(path)


def inside(page: Path, addresses: list[str]) -> Iterator[tuple[str, Path, str]]:
    """Give the addresses within the site, each with its file and the place in it."""
    for address in addresses:
        parts = urlsplit(address)
        if not parts.scheme and not parts.netloc:
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            yield address, path, unquote(parts.fragment)


def test_the_site_has_the_pages_it_is_for():
    wanted = {"index.html", "search.html", "genindex.html", "pytorch_hooks.html", "comparison.html"}
    wanted |= {"guides/failures.html", "docs/glossary.html", "embedded_model/README.html"}
    assert wanted <= set(NAMES)


def test_the_front_page_says_what_it_is_where_it_is_linked():
    """Search engines and chats show this line under the title."""
    [told] = re.findall(
        r'<meta content="([^"]*)" name="description"', read(SITE / "index.html").text
    )
    assert 60 < len(told) < 160


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """To a file of the site, and to a place that is on its page."""
    page = SITE / name
    for address, path, place in inside(page, read(page).links):
        assert path.exists(), address
        if place and path.suffix == ".html":
            assert place in read(path).ids, address


@pytest.mark.parametrize("name", NAMES)
def test_a_page_loads_nothing_from_elsewhere(name):
    """Scripts, styles and pictures lie beside it, MathJax included: it works without a network."""
    page = SITE / name
    loaded = read(page).loaded
    assert len(loaded) > 3
    assert [it for it in loaded if urlsplit(it).netloc or it.startswith("http")] == []
    assert [it for it, path, _ in inside(page, loaded) if not path.is_file()] == []


def test_some_page_has_formulas():
    """So the test above has seen MathJax."""
    assert any("tex-svg.js" in it for it in read(SITE / "bias_editing.html").loaded)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_texts(name):
    """Whole ones, not the address of the picture, which Sphinx takes where there is none."""
    for picture in read(SITE / name).pictures:
        assert picture.get("alt") and picture["alt"] not in picture["src"], picture
        assert " " in picture["alt"], picture


def test_a_page_offers_a_source_only_where_there_is_one():
    """To download, or on GitHub: the front page and the reference are no files of the tree."""
    offered = {
        address.split("_sources/")[1]
        for name in NAMES
        for address in read(SITE / name).links
        if "_sources/" in address
    }
    assert {"baukit.ipynb", "guides/methods.ipynb", "docs/scaling.md", "CHANGELOG.md"} <= offered
    assert [it for it in offered if not (ROOT / it).is_file()] == []
    on_github = [it for name in NAMES for it in read(SITE / name).links if "?plain=1" in it]
    branch = os.environ.get("GITHUB_REF_NAME", "main")
    paths = [urlsplit(it).path.split(f"/blob/{branch}/")[1] for it in on_github]
    assert [it for it in paths if not (ROOT / it).is_file()] == []


def test_what_notebooks_printed_and_drew_is_shown():
    """Nothing is executed: the outputs are those that are stored."""
    paths = [*ROOT.glob("*.ipynb"), *ROOT.glob("guides/*.ipynb")]
    assert len(paths) > 10
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        told = [cell for cell in cells if cell.get("outputs")]
        drawn = [it for cell in told for it in cell["outputs"] if "image/png" in it.get("data", {})]
        page = read((SITE / path.relative_to(ROOT)).with_suffix(".html"))
        assert len(re.findall(r'class="cell_output', page.text)) == len(told), path
        assert len([it for it in page.pictures if "_images/" in it["src"]]) == len(drawn), path


def test_the_colab_cell_is_folded():
    for name in ("pytorch_hooks.html", "guides/measuring.html"):
        text = read(SITE / name).text
        folded = re.findall(r"<details class=\"[^\"]*hide.*?</details>", text, re.DOTALL)
        assert len(folded) == 1 and "on_colab" in folded[0]


def test_every_public_name_is_in_the_reference():
    """Under its own name, on one page, with a text."""
    stub = ast.parse((ROOT / "common/__init__.pyi").read_text(encoding="utf-8"))
    names = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    places = [it for page in SITE.glob("reference/*.html") for it in read(page).ids]
    assert len(names) > 100
    assert {name: places.count(f"common.{name}") for name in names} == dict.fromkeys(names, 1)


def test_methods_and_arguments_are_in_the_reference():
    """Every public method of a public class, and each argument that a docstring explains."""
    stub = ast.parse((ROOT / "common/__init__.pyi").read_text(encoding="utf-8"))
    pages = "".join(read(page).text for page in SITE.glob("reference/*.html"))
    checked = 0
    for line in (it for it in stub.body if isinstance(it, ast.ImportFrom)):
        path = ROOT / "common" / line.module.replace(".", "/")
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if getattr(node, "name", "") not in [alias.name for alias in line.names]:
                continue
            members = node.body if isinstance(node, ast.ClassDef) else []
            methods = [it for it in members if isinstance(it, ast.FunctionDef)]
            methods = [it for it in methods if not it.name.startswith("_")]
            for name in (f"common.{node.name}.{it.name}" for it in methods):
                assert f'id="{name}"' in pages, name
            for it in (node, *methods):
                told = (ast.get_docstring(it) or "").partition("Args:\n")[2].split("\n\n")[0]
                for argument in re.findall(r"^    \*{0,2}(\w+):", told, re.MULTILINE):
                    assert f"<strong>{argument}</strong>" in pages, (node.name, argument)
                    checked += 1
    assert checked > 300


def test_what_the_reference_has_is_a_link():
    """Also where a docstring names it with its module."""
    stub = ast.parse((ROOT / "common/__init__.pyi").read_text(encoding="utf-8"))
    names = {
        f"{node.module.rsplit('.', 1)[-1]}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    shown = {
        text
        for page in SITE.glob("reference/*.html")
        for text in re.findall(
            r'<code[^>]*><span class="pre">([\w.]+)</span></code>', read(page).text
        )
    }
    assert "hidden_states" in shown and names & shown == set()


def test_no_docstring_sends_a_reader_away():
    """To what is not in the reference; "See `f`." is enough where it is."""
    pages = "".join(read(page).text for page in SITE.glob("reference/*.html"))
    assert "<p>See <a" in pages and "<p>See <code" not in pages


def test_signatures_say_what_a_caller_needs():
    """The value of a default and not the name of a constant; that a block is opened by `with`."""
    pages = "".join(read(page).text for page in SITE.glob("reference/*.html"))
    values = re.findall(r'<span class="default_value">(.*?)</span></em>', pages, re.DOTALL)
    shown = {re.sub("<[^>]*>", "", value) for value in values}
    assert {"None", "2**30"} <= shown
    assert [value for value in shown if re.fullmatch("[A-Z_]+", value)] == []
    assert "AbstractContextManager" in pages and "Iterator[None]" not in re.sub(
        "<[^>]*>", "", pages
    )


def test_what_is_returned_is_a_sentence():
    """Napoleon takes what stands before a colon for a type."""
    text = "".join(page.read_text("utf-8") for page in (SITE / "reference").glob("*.html"))
    returned = re.findall(r"Returns<span.*?<dd[^>]*>\s*(.*?)</dd>", text, re.DOTALL)
    assert len(returned) > 40 and [one for one in returned if one.startswith("<p><em>")] == []


def test_code_in_docstrings_is_shown_as_code():
    """Indented lines are shown as the code that they are."""
    assert "<blockquote" not in "".join(read(page).text for page in SITE.glob("reference/*.html"))


def test_the_search_knows_every_page():
    """And has read it: words of its text lead to it."""
    index = (SITE / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    places = [it if isinstance(it, list) else [it] for it in index["terms"].values()]
    found = {f"{index['docnames'][number]}.html" for numbers in places for number in numbers}
    assert set(NAMES) - {"search.html", "genindex.html"} == found
