"""What docstrings name exists: the reference shows a name that is gone as code, without a word."""

import ast
import re

from repository.mechanisms import ROOT

# What others call so; the library does not.
FOREIGN = {
    *("__init__.pyi", "pyproject.toml", "lsreft.py", "datasets", "generate_batch", "runtime_env"),
    *("GPUModelRunner", "SchedulerOutput", "VllmConfig", "init_worker", "max_num_seqs"),
    *("gpu_memory_utilization", "parse_special", "common_control_vector_load"),
    *("TopPLogitsWarper", "assistant_early_exit", "name_column"),
}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def test_what_a_docstring_names_is_in_the_code():
    """As a name, an argument or a word of a text, anywhere in the library."""
    known: set[str] = set()
    named: dict[str, str] = {}
    for path in sorted((ROOT / "common").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {ast.get_docstring(it, clean=False) for it in documented(tree)} - {None}
        known |= set(path.relative_to(ROOT).with_suffix("").parts) | words(tree, texts)
        for name in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)", "\n".join(texts)):
            named[name] = path.name
    assert len(named) > 300
    gone = {name for name in named if not set(name.split(".")) <= known}
    assert {name: named[name] for name in gone - FOREIGN} == {}
    assert FOREIGN - gone == set()  # none is left of those that went


def documented(tree: ast.Module) -> list[ast.Module | ast.ClassDef | ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]


def words(tree: ast.Module, docstrings: set[str]) -> set[str]:
    """All names in a module, and the words of its texts other than docstrings."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for kind in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(name := getattr(node, kind, None), str):
                found |= set(name.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set() if node.value in docstrings else set(re.findall(r"\w+", node.value))
    return found
