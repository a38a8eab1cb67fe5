"""The folders of recipes (``stages/``) and documents (``manifests/``), in a checkout or a wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    inside = _PACKAGE / name  # a wheel has the folder inside the package
    return inside if inside.is_dir() else _PACKAGE.parent / name


def stages() -> Path:
    """Return the folder of recipes: ``dump_teacher/*.toml``, ``train/*.toml``, ``study/*.toml``."""
    return _folder("stages")


def manifests() -> Path:
    """Return the folder of JSON Schemas and of the cache format's specification."""
    return _folder("manifests")
