"""The public names: one table, one stub, imported only when used."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

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
