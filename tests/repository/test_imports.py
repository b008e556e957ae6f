"""The import contract of pyproject.toml notices an import that runs the wrong way."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from repository.mechanisms import ROOT

FOLDERS = ("common", "embedded_model", "repository", "benchmarks")
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LINT, "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The modules of the tree, and its contract."""
    folder = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        for path in sorted((ROOT / name).rglob("*.py")):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_contract_is_kept(sources):
    found = lint_imports(sources)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("common/progress.py", "from repository import mechanisms"),  # a tool of the repository
        ("common/plots.py", "from embedded_model import grammar"),  # the recipe
        ("embedded_model/grammar.py", "import repository.mechanisms"),
        ("repository/mechanisms.py", "from benchmarks import timing"),
        ("common/places/blocks.py", "from common.texts.generation import logits"),  # upwards
        ("common/vectors/operators.py", "def later():\n    from common.texts import completions"),
        ("common/a_new_one.py", ""),  # a module that has no floor
    ],
)
def test_a_planted_import_breaks_the_contract(sources, module, planted):
    """Also inside a function; the complaint names the module."""
    path = sources / module
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{planted}\n", encoding="utf-8")
    try:
        found = lint_imports(sources)
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert found.returncode == 1
    assert ".".join(Path(module).with_suffix("").parts) in found.stdout


def test_inside_the_library_nothing_takes_the_public_door():
    """The contract does not see `from common import …`, which would run in circles there."""
    graph = grimp.build_graph("common", cache_dir=None)
    assert graph.find_modules_that_directly_import("common") == set()


def test_nothing_imports_the_tests():
    """Where pytest runs they can be imported, and elsewhere they cannot."""
    graph = grimp.build_graph(*FOLDERS, include_external_packages=True, cache_dir=None)
    tests = {"tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    assert tests & graph.modules == set()


def test_a_public_name_means_one_thing():
    """No module calls something else by it: the reference would link to the wrong one."""
    stub = ast.parse((ROOT / "common/__init__.pyi").read_text(encoding="utf-8"))
    homes = {
        alias.name: ROOT / "common" / node.module.replace(".", "/")
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = [
        (name, path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "common").rglob("*.py"))
        for name in names_of(ast.parse(path.read_text(encoding="utf-8")))
        if name in homes and homes[name] not in (path.parent, path.with_suffix(""))
    ]
    assert len(homes) > 100 and defined == []


def names_of(module: ast.Module) -> list[str]:
    """What a module defines: its functions, classes and constants."""
    names = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names
