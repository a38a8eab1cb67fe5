"""The public names: table, stub and page agree, and names are imported on first use.

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
from cskd_pipeline import errors
from cskd_pipeline.distill.ckf import SCHEDULES


def test_table_stub_and_all_agree() -> None:
    stub = ast.parse(Path(cskd_pipeline.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    stubbed = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stubbed == cskd_pipeline.PUBLIC
    listed = next(
        ast.literal_eval(node.value)
        for node in stub.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert sorted(listed) == sorted(cskd_pipeline.__all__) == sorted({*stubbed, "__version__"})


@pytest.mark.parametrize("name", cskd_pipeline.PUBLIC)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(cskd_pipeline, name)
    assert value is getattr(importlib.import_module(cskd_pipeline.PUBLIC[name]), name)
    assert value.__module__ == cskd_pipeline.PUBLIC[name]  # not re-exported
    assert inspect.getdoc(value)
    assert name in dir(cskd_pipeline)


def test_unknown_names_are_refused() -> None:
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
INTRODUCTION = """# Library

Generated from the docstrings by `python -m tests.test_public_names`. Import every name with
`from cskd_pipeline import ...`; names are typed and loaded on first use, so `import cskd_pipeline`
alone imports nothing else, not even torch. [The examples](examples) use them, each run by a test.
Messages and warnings go to `logging` (logger `cskd_pipeline`); progress goes to the listener given
to `cskd_pipeline.runtime.progress.listen`.

## A training loop

```python
views = open_views("shards/train-*.tar", "cache")
loader, loss = CachedLoader(views, batch_size=256), DistillationLoss()
for epoch in range(epochs):
    for batch in loader:
        heads = dense_logits(model, batch.images, views.grid)  # a timm ViT
        parts = loss(heads, batch.labels, batch.targets, r=ckf_ratio("linear", epoch / epochs))
        step(optimizer, parts.total)  # zero_grad, backward, step: yours
```

[plain_loop.py](examples/plain_loop.py) is a complete program.
"""
CHAPTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Train from a cache": (
        "After a break out of `for batch in loader`, the next `for` resumes the epoch at the next "
        "batch; after a\ncomplete epoch, it starts the next one.",
        ("open_views", "TrainingViews", "CachedLoader", "CachedBatch", "replay_view"),
    ),
    "Losses and schedules": (
        "`train` and `evaluate` predict with the mean of all trained heads' logits, the dense ones "
        "averaged over locations:\n`inference_logits(heads, tuple(heads.logits()))` after `cskd`.",
        (
            "dense_logits",
            "Heads",
            "DistillationLoss",
            "LossParts",
            "ckf_ratio",
            "inference_logits",
            "Targets",
            "LogitTargets",
        ),
    ),
    "Read a cache": ("", ("open_cache", "Cache")),
    "Write a cache": (
        "See [your own teacher](own-teacher.md).",
        (
            "write_cache",
            "CacheSection",
            "TeacherInfo",
            "ViewPolicy",
            "UnitWriter",
            "TeacherViews",
            "Loading",
            "WriteOptions",
        ),
    ),
    "Extend": (
        "Add encodings and view policies; see also [optimizers](running.md#your-own-optimizer).",
        ("register_encoding", "Encoding", "register_policy"),
    ),
    "Errors": ("", ("CskdError",)),
}
"""Chapter -> its introduction and names, in order of use."""
SPECIAL = ("__call__", "__len__", "__iter__")
SECTIONS = {
    "Args:": "Arguments",
    "Returns:": "Returns",
    "Raises:": "Raises",
    "Attributes:": "Fields",
}


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [INTRODUCTION]
    for chapter, (introduction, names) in CHAPTERS.items():
        parts += [f"## {chapter}\n", *([f"{introduction}\n"] if introduction else [])]
        for name in names:
            parts += entry(f"### {name}", name, getattr(cskd_pipeline, name))
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    parts.append("Its subclasses, in `cskd_pipeline.errors`:\n")
    parts += [
        f"- `{kind.__name__}`: {markdown((inspect.getdoc(kind) or '').splitlines()[0]).strip()}"
        for kind in kinds
        if issubclass(kind, errors.CskdError) and kind is not errors.CskdError
    ]
    return "\n".join(parts) + "\n"


def entry(title: str, name: str, value: Any) -> Iterator[str]:
    """Yield title, signature and docstring, then those of a class's public methods."""
    yield f"{title}\n"
    if isinstance(value, property):
        value = value.fget
        yield f"```python\n{name}: {inspect.signature(value).return_annotation}\n```\n"
    elif has_public_signature(value):
        yield f"```python\n{call(name, signature_of(value))}\n```\n"
    yield markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not issubclass(value, Exception):
        for own in vars(value):
            member = inspect.getattr_static(value, own)
            if own.startswith("_") and (own not in SPECIAL or not inspect.getdoc(member)):
                continue
            if callable(member) or isinstance(member, property | classmethod | staticmethod):
                member = member if isinstance(member, property) else getattr(value, own)
                yield from entry(f"#### {name}.{own}", own, member)


def has_public_signature(value: Any) -> bool:
    """Return whether ``value`` is a function or a class, not a protocol, with a constructor."""
    protocol = getattr(value, "_is_protocol", False)
    return not inspect.isclass(value) or (
        not protocol and ("__init__" in vars(value) or hasattr(value, "_fields"))
    )


def signature_of(value: Any) -> inspect.Signature:
    """Return the signature; a recipe section gets its own only when a recipe is first read."""
    if not dataclasses.is_dataclass(value) or not hasattr(value, "__pydantic_fields__"):
        return inspect.signature(value)
    fields = [(f.name, f.type, getattr(f.default, "default", f.default)) for f in
              dataclasses.fields(value)]  # fmt: skip
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, default=d, annotation=t) for n, t, d in fields]
    return inspect.Signature(parameters, return_annotation="None")


def call(name: str, signature: inspect.Signature) -> str:
    """Format a call without ``self``, on one line or with one argument a line."""
    parameters = [
        p.replace(annotation=annotation_of(p.annotation), default=default_of(p.default))
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    returns = annotation_of(signature.return_annotation)
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=returns)}"
    if len(line) <= 92:
        return line
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    lines = [f"    {p}," for p in parameters]
    if star is not None:
        lines.insert(star, "    *,")
    arrow = "" if returns is inspect.Parameter.empty else f" -> {returns}"
    return "\n".join([f"{name}(", *lines, f"){arrow}"])


class Literal:
    """A default value or annotation whose repr is the given text."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def annotation_of(annotation: Any) -> Any:
    """Return an annotation as it is written in the source."""
    if annotation is inspect.Parameter.empty:
        return annotation
    return Literal(getattr(annotation, "__forward_arg__", annotation))  # of a named tuple


def default_of(default: Any) -> Any:
    """Return a default value, or its type if the value is long."""
    long = len(repr(default)) > 30 and default is not inspect.Parameter.empty
    return Literal(f"{type(default).__name__}()") if long else default


def markdown(doc: str) -> str:
    """Convert a docstring to Markdown: sections to lists, roles and double backticks to code."""
    lines: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line.strip() in SECTIONS and not line.startswith(" "):
            inside = True
            lines += [f"**{line.strip()}**", ""]
        elif inside and line.strip():
            # An entry is indented by four spaces, its continuation by more.
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


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.test_public_names"


def test_every_public_name_is_on_the_page_once() -> None:
    listed = [name for _, names in CHAPTERS.values() for name in names]
    assert sorted(listed) == sorted(cskd_pipeline.PUBLIC)


def test_the_first_loop_uses_only_public_names() -> None:
    block = INTRODUCTION.partition("```python\n")[2].partition("```")[0]
    called = {n.func.id for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call)
              and isinstance(n.func, ast.Name)}  # fmt: skip
    assert called - {"range", "loss", "step"} <= set(cskd_pipeline.PUBLIC)


def test_signatures_fields_and_schedules_are_on_the_page() -> None:
    text = page()
    assert "_empty" not in text
    assert "*args" not in text
    for words in ("__call__(", "-> LossParts", "Heads(cls: Tensor", "LossParts(total: Tensor"):
        assert words in text, words
    for words in ("CachedBatch(", "#### CachedLoader.__len__", "#### CachedLoader.__iter__"):
        assert words in text, words
    schedule = text.partition("### ckf_ratio")[2].partition("### ")[0]
    assert all(f"`{name}`" in schedule for name in SCHEDULES)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
