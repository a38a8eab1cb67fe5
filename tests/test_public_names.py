"""The public names: one table, one stub, one page, imported only when used.

``python -m tests.test_public_names`` renews ``docs/api.md`` from their docstrings.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cskd_pipeline


def test_table_stub_and_all_agree() -> None:
    stub = ast.parse(Path(cskd_pipeline.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    stated = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stated == cskd_pipeline.PUBLIC
    listed = next(
        ast.literal_eval(node.value)
        for node in stub.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert sorted(listed) == sorted(cskd_pipeline.__all__) == sorted({*stated, "__version__"})


@pytest.mark.parametrize("name", cskd_pipeline.PUBLIC)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(cskd_pipeline, name)
    assert value is getattr(importlib.import_module(cskd_pipeline.PUBLIC[name]), name)
    assert value.__module__ == cskd_pipeline.PUBLIC[name]  # defined there, not passed on
    assert inspect.getdoc(value)
    assert name in dir(cskd_pipeline)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_cash'"):
        cskd_pipeline.open_cash  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import cskd_pipeline; "
        "heavy = {'torch', 'numpy', 'PIL', 'zarr'} & (set(sys.modules) - before); "
        "ours = [n for n in sys.modules if n.startswith('cskd_pipeline.')]; "
        "assert not heavy and not ours, (heavy, ours)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the page -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs/api.md"
INTRODUCTION = """# The package as a library

Made from the docstrings by `python -m tests.test_public_names`. Everything here is imported as
`from cskd_pipeline import ...`, typed, and loaded when it is first used: `import cskd_pipeline`
alone imports neither torch nor anything else. [The examples](examples) use it, each run by a test.
"""
SECTIONS = {
    "Args:": "Arguments",
    "Returns:": "Returns",
    "Raises:": "Raises",
    "Attributes:": "Fields",
}


def page() -> str:
    """The text of docs/api.md."""
    parts = [INTRODUCTION]
    for name in sorted(cskd_pipeline.PUBLIC, key=str.lower):
        parts += entry(f"## {name}", name, getattr(cskd_pipeline, name))
    return "\n".join(parts)


def entry(title: str, name: str, value: Any) -> Iterator[str]:
    """Title, signature, docstring; then a class's own public methods."""
    yield f"{title}\n"
    if isinstance(value, property):
        value = value.fget
        yield f"```python\n{name}: {inspect.signature(value).return_annotation}\n```\n"
    elif not inspect.isclass(value) or "__init__" in vars(value):
        yield f"```python\n{call(name, signature_of(value))}\n```\n"
    yield markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not issubclass(value, Exception):
        for own in (own for own in vars(value) if not own.startswith("_")):
            member = inspect.getattr_static(value, own)
            if callable(member) or isinstance(member, property | classmethod | staticmethod):
                member = member if isinstance(member, property) else getattr(value, own)
                yield from entry(f"### {name}.{own}", own, member)


def signature_of(value: Any) -> inspect.Signature:
    """A recipe's section is given its own signature only when the first recipe is read."""
    if not dataclasses.is_dataclass(value) or not hasattr(value, "__pydantic_fields__"):
        return inspect.signature(value)
    fields = [(f.name, f.type, getattr(f.default, "default", f.default)) for f in
              dataclasses.fields(value)]  # fmt: skip
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, default=d, annotation=t) for n, t, d in fields]
    return inspect.Signature(parameters, return_annotation="None")


def call(name: str, signature: inspect.Signature) -> str:
    """One line, or one argument a line, without ``self`` and with defaults by their value."""
    parameters = [
        p.replace(annotation=annotated(p.annotation), default=shown(p.default))
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    returns = Named(signature.return_annotation)
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=returns)}"
    if len(line) <= 92:
        return line
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    lines = [f"    {p}," for p in parameters]
    if star is not None:
        lines.insert(star, "    *,")
    return "\n".join([f"{name}(", *lines, f") -> {returns}"])


class Named:
    """A default value or annotation that is shown by a name."""

    def __init__(self, name: object) -> None:
        self.name = str(name)

    def __repr__(self) -> str:
        return self.name


def annotated(annotation: Any) -> Any:
    """An annotation as it is written."""
    return annotation if annotation is inspect.Parameter.empty else Named(annotation)


def shown(default: Any) -> Any:
    """A default value; a long one by its type."""
    long = len(repr(default)) > 30 and default is not inspect.Parameter.empty
    return Named(f"{type(default).__name__}()") if long else default


def markdown(doc: str) -> str:
    """A docstring as Markdown: sections become lists, roles and double backticks become code."""
    lines: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line.strip() in SECTIONS and not line.startswith(" "):
            inside = True
            lines += [f"**{line.strip()}**", ""]
        elif inside and line.strip():
            # An entry stands at four spaces; what goes on from it stands deeper.
            deeper = line.startswith("     ") or (
                lines[-1] and not re.match(r"    [\w, *]+:", line)
            )
            lines.append(f"  {line.strip()}" if deeper else f"- {line.strip()}")
        else:
            lines.append(line)
    text = re.sub(
        r":\w+:`~?([^`]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", "\n".join(lines)
    )
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n") + "\n"


def test_the_page_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.test_public_names renews it"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
