"""Builds the site: gathers pages, notebooks and the reference in a folder, which Sphinx reads.

`make site` calls it in the environment of requirements-site.txt. Nothing is executed: notebooks
come with the outputs that are stored in them. What is gathered is the tree's own files, with two
things added to each notebook: the cell that finds the project on Colab is folded, and pictures get
the alternative texts of alt_texts.toml.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What the site shows, and what its pages lead to.
SHOWN = (
    "*.md",
    "*.ipynb",
    "guides/*.ipynb",
    "docs/*.md",
    "embedded_model/README.md",
    "pictures/*.png",
    "benchmarks/results/*",
    "LICENSE",
    "CITATION.cff",
)
ALT_TEXTS = HERE / "alt_texts.toml"
EVERYWHERE = "shared"  # in alt_texts.toml: cells that several notebooks have
PLAYGROUND = HERE / "playground" / "index.html"  # `make playground` writes it
MATHJAX = "tex-svg.js"  # one file: it draws, so it needs no fonts
# What the theme and Sphinx write so that a screen reader cannot make sense of it.
MENDED = {
    "<summary><span": '<summary aria-label="its pages"><span',
    # lists of arguments, which define nothing
    "<dl>\n<dd>": '<dl role="presentation">\n<dd role="presentation">',
}


def pictures(notebook: dict) -> list[str]:
    """Return the ids of the cells of a notebook that show a picture."""
    return [
        cell["id"]
        for cell in notebook["cells"]
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    ]


def alt_text(texts: dict[str, dict[str, str]], notebook: str, cell: str) -> str:
    """Return what stands for the picture of a cell, or nothing if no one has written it.

    Args:
        texts: alt_texts.toml: by notebook, or under `shared` for all, a text by cell id.
        notebook: its name.
        cell: its id.
    """
    own, shared = texts.get(notebook, {}), texts.get(EVERYWHERE, {})
    return own.get(cell) or shared.get(cell, "")


def for_the_site(notebook: dict, name: str, texts: dict[str, dict[str, str]]) -> dict:
    """Return a copy of a notebook with its Colab cell folded and a text for every picture.

    Raises:
        ValueError: pictures have no text; it names all of them.
    """
    copy = json.loads(json.dumps(notebook))
    shown = {cell: alt_text(texts, name, cell) for cell in pictures(copy)}
    if missing := [cell for cell, text in shown.items() if not text]:
        lines = "".join(f'\n{cell} = "what it shows"' for cell in missing)
        raise ValueError(
            f"pictures of {name}.ipynb have no alternative text: expected one for each in"
            f" {ALT_TEXTS.relative_to(ROOT)}, in words and without figures:\n[{name}]{lines}"
        )
    for cell in copy["cells"]:
        metadata = cell["metadata"]
        if "colab" in metadata.get("tags", []):
            metadata["tags"].append("hide-cell")
        if cell.get("id") in shown:
            metadata["mystnb"] = {"image": {"alt": shown[cell["id"]]}}
    return copy


def gather(folder: Path) -> None:
    """Write everything that Sphinx reads into a folder, which is emptied before.

    Raises:
        ValueError: pictures of notebooks have no text, a public name no docstring, or there is no
            playground.
    """
    from reference import write_reference  # the tests of this module do without griffe

    if not PLAYGROUND.is_file():
        raise ValueError(f"there is no {PLAYGROUND}: `make playground` writes it")

    shutil.rmtree(folder, ignore_errors=True)
    texts = tomllib.loads(ALT_TEXTS.read_text(encoding="utf-8"))
    missing = []
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            notebook = json.loads(path.read_text(encoding="utf-8"))
            try:
                shown = for_the_site(notebook, path.stem, texts)
            except ValueError as error:
                missing.append(str(error))
            else:
                copy.write_text(json.dumps(shown), encoding="utf-8")
        else:
            shutil.copy(path, copy)
    if missing:
        raise ValueError("\n\n".join(missing))
    shutil.copytree(HERE / "pages", folder, dirs_exist_ok=True)
    write_reference(ROOT / "common", folder / "reference")
    part = folder / "_playground.md"
    size = f"{PLAYGROUND.stat().st_size / 1e6:.0f}"
    part.write_text(part.read_text(encoding="utf-8").replace("SIZE", size), encoding="utf-8")


def add_files(site: Path) -> None:
    """Put what the pages load beside them: the playground, and MathJax for readers offline."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    shutil.copy(Path(package.origin).parent / "static/mathjax" / MATHJAX, site / "_static")
    (site / "playground").mkdir()
    shutil.copy(PLAYGROUND, site / "playground")


def mend(site: Path) -> None:
    """Write into the pages what screen readers miss in them."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for written, mended in MENDED.items():
            text = text.replace(written, mended)
        page.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site; a warning of Sphinx is an error."""
    parser = argparse.ArgumentParser(prog="site/build.py", description=main.__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "_build",
        help="where the site goes, in html/ (default: site/_build)",
    )
    options = parser.parse_args(arguments)
    from sphinx.cmd.build import main as sphinx

    source, site = options.out / "source", options.out / "html"
    shutil.rmtree(site, ignore_errors=True)  # a page that is gone must not stay
    try:
        gather(source)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    checks = ["--fail-on-warning", "--keep-going", "--nitpicky"]
    places = [
        "--conf-dir",
        str(HERE),
        "--doctree-dir",
        str(options.out / "doctrees"),
        str(source),
        str(site),
    ]
    if failed := sphinx(["--quiet", "--fresh-env", *checks, *places]):
        return failed
    mend(site)
    add_files(site)
    print("Site:", site / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
