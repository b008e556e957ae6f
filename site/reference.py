"""Writes the reference of the public names, from `common/__init__.pyi` and the docstrings.

The sources are read, not imported: the site needs neither torch nor a model.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from sphinx.ext.napoleon import Config, GoogleDocstring

# What is indented below a line that is not: code, which rst would take for a quotation.
_CODE = re.compile(r"(^\S[^\n]*)\n\n( {4})", re.MULTILINE)
FIRST = ("loading", "places", "passes", "vectors", "texts", "measuring", "sweeping")
STYLE = Config(napoleon_use_rtype=False, napoleon_use_param=False, napoleon_use_ivar=True)


def public_names(package: Path) -> dict[str, dict[str, str]]:
    """Return the modules that define the public names, by the first part of their path.

    Args:
        package: the folder of a package whose `__init__.pyi` imports each name from its module.

    Returns:
        For each folder or module of the package, in the order of the stub: its names, each with the
        module that defines it, relative to the package.
    """
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse((package / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = found.setdefault(node.module.split(".")[0], {})
            names |= {alias.asname or alias.name: node.module for alias in node.names}
    return found


def write_reference(package: Path, folder: Path) -> list[Path]:
    """Write a page for each folder or module of a package that has public names, and their list.

    The list is `_pages.md`, which a page of the folder includes: a table, and the side bar's part.

    Args:
        package: the package's folder.
        folder: where the pages go; it is made.

    Returns:
        The pages, one rst file each, those that a reader needs `FIRST` before all others.

    Raises:
        ValueError: a public name, or a public method of a class, has no docstring.
    """
    loaded = griffe.load(package.name, search_paths=[package.parent])
    folder.mkdir(parents=True, exist_ok=True)
    found = public_names(package)
    parts = sorted(found, key=lambda part: FIRST.index(part) if part in FIRST else len(FIRST))
    longer = {  # as docstrings name what another module has: the page has it by its own name
        f"`{module.rsplit('.', 1)[-1]}.{name}`": f"`{name}`"
        for names in found.values()
        for name, module in names.items()
    }
    rows = ["| page | what it has |", "| --- | --- |"]
    for part in parts:
        title = f"{package.name}: {part}"
        lines = [title, "=" * len(title), "", *_docstring(loaded[part], "module"), ""]
        lines += [f".. py:currentmodule:: {package.name}", "", ".. highlight:: python", ""]
        for name, module in sorted(found[part].items(), key=lambda item: item[0].lower()):
            lines += _entry(loaded[f"{module}.{name}"], name)
        rows.append(f"| [{part}]({part}.rst) | {loaded[part].docstring.value.splitlines()[0]} |")
        text = "\n".join(lines) + "\n"
        for name, own in longer.items():
            text = text.replace(name, own)
        (folder / f"{part}.rst").write_text(text, encoding="utf-8")
    side_bar = ["", "```{toctree}", ":hidden:", "", *parts, "```"]
    (folder / "_pages.md").write_text("\n".join(rows + side_bar) + "\n", encoding="utf-8")
    return [folder / f"{part}.rst" for part in parts]


def _entry(item: griffe.Object, name: str) -> list[str]:
    """Give the directive of a function, a class with its members, or a type alias."""
    if item.is_attribute:
        text = _docstring(item, "object")
        return _directive("py:data", name, [f"   :value: {item.value}"], text)
    if item.is_function:
        return _directive("py:function", _signature(item, name), [], _docstring(item, "function"))
    error = any(str(base).endswith(("Error", "Exception")) for base in item.bases)
    body = _docstring(item, "class")
    for member in _members(item):
        body += _member(member)
    return _directive("py:exception" if error else "py:class", name + _init(item), [], body)


def _members(item: griffe.Class) -> Iterator[griffe.Object]:
    """Give the public methods and properties of a class, inherited ones of this package included.

    Fields stand in the docstring and the signature of their class.
    """
    for name, member in sorted(item.all_members.items()):
        public = not name.startswith("_")
        if public and (member.is_function or "property" in member.labels):
            yield member


def _member(member: griffe.Object) -> list[str]:
    body = _docstring(member, "method")
    if member.is_attribute:
        kind = [f"   :type: {member.annotation}"] if member.annotation else []
        return _directive("py:property", member.name, kind, body)
    own = [f"   :{label}:" for label in ("classmethod", "staticmethod") if label in member.labels]
    return _directive("py:method", _without_self(_signature(member)), own, body)


def _init(item: griffe.Class) -> str:
    """Give the arguments of a class as they are passed, or nothing if it takes none."""
    if init := item.all_members.get("__init__"):
        return _without_self(_signature(init, returns=False)).removeprefix("__init__")
    if any(str(base) == "NamedTuple" for base in item.bases):
        fields = [it for it in item.members.values() if it.is_attribute]
        return f"({', '.join(f'{field.name}: {field.annotation}' for field in fields)})"
    return ""


def _signature(function: griffe.Function, name: str | None = None, *, returns: bool = True) -> str:
    """Give a signature as a caller needs it: constants by their values, and what `with` takes."""
    for parameter in function.parameters:
        if re.fullmatch("[A-Z_]+", str(parameter.default)):
            path = function.module.resolve(str(parameter.default))
            parameter.default = function.modules_collection[path].value
    text = str(function.signature(name=name, return_type=returns))
    if any(str(it.value).endswith("contextmanager") for it in function.decorators):
        text = re.sub(r" -> Iterator\[(.*)\]$", r" -> AbstractContextManager[\1]", text)
    return text


def _without_self(signature: str) -> str:
    return re.sub(r"\((self|cls)(, |(?=\)))", "(", signature, count=1)


def _directive(kind: str, signature: str, options: list[str], body: list[str]) -> list[str]:
    indented = [f"   {line}" if line else "" for line in body]
    return ["", f".. {kind}:: {signature}", *options, "", *indented, ""]


def _docstring(item: griffe.Object, what: str) -> list[str]:
    """Give the docstring of something as lines of rst.

    Raises:
        ValueError: it has none.
    """
    if not item.docstring:
        raise ValueError(f"{item.path} has no docstring: expected one, it is public")
    marked = _CODE.sub(r"\1\n\n::\n\n\2", item.docstring.value)
    return str(_Docstring(marked, STYLE, what=what, name=item.path)).splitlines()


class _Docstring(GoogleDocstring):
    """A docstring whose signature has the types: what is returned has none before a colon."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list:
        lines = self._dedent(self._consume_to_next_section())
        return [("", "", type(self)(lines, self._config).lines())] if lines else []
