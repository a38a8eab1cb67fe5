"""The ways of storing a teacher's response, by name: one file each, one interface (``base``).

``dense`` keeps the logits and serves every loss. ``envelope`` keeps exactly what hard CKF labels
need, at any ratio, in 1/400 of the space. For soft losses ``dense-q8`` comes close to it in 2/5 of
the space, ``topk`` approximates it in 1/45, and ``sampled`` holds unbiased draws of the soft
targets in 1/300 each. :func:`register_encoding` adds a user's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.distill.encodings.dense import Dense
from cskd_pipeline.distill.encodings.dense_q8 import DenseQ8
from cskd_pipeline.distill.encodings.envelope import Envelope
from cskd_pipeline.distill.encodings.sampled import Sampled
from cskd_pipeline.distill.encodings.topk import TopK
from cskd_pipeline.errors import UsageError

_BUILT_IN: tuple[Encoding, ...] = (Dense(), DenseQ8(), TopK(), Envelope(), Sampled())
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _BUILT_IN}

RESERVED = ("auto", "digest", "key", "label", "seed", "top1")
"""Arrays of every cache, which no encoding may be called as, and the word for a choice of one."""

__all__ = [
    "ENCODINGS",
    "ArraySpec",
    "Encoding",
    "ResponseShape",
    "Rows",
    "Sampled",
    "register_encoding",
]


def temperature_near(encoding: Encoding, wanted: float = 1.0) -> float:
    """Return the temperature nearest to ``wanted`` that the encoding's soft losses may have."""
    lowest, highest = encoding.temperatures
    return min(max(wanted, lowest), highest)


def register_encoding(encoding: Encoding) -> None:
    """Let this process write and read caches with ``encoding``, under ``encoding.name``.

    A cache records the name only: whoever opens it registers the same encoding first. Loader
    processes get it from the process that starts them, so it must be picklable: an instance of a
    class at the top of a module.

    Args:
        encoding: see :class:`cskd_pipeline.distill.encodings.base.Encoding`; its arrays are named
            ``NAME/...``.

    Raises:
        UsageError: the name is a built-in encoding's or reserved, or not lower-case letters, digits
            and hyphens.
    """
    name = encoding.name
    taken = name in RESERVED or ENCODINGS.get(name) in _BUILT_IN
    if taken or not re.fullmatch("[a-z][a-z0-9-]{0,39}", name):
        raise UsageError(
            "an encoding cannot be registered under this name",
            found=name,
            expected="lower-case letters, digits and hyphens, 40 at most, and none of "
            + ", ".join((*(known.name for known in _BUILT_IN), *RESERVED)),
        )
    ENCODINGS[name] = encoding


def registered(names: Iterable[str]) -> list[Encoding]:
    """Return the encodings of these names that are not built in: another process needs them."""
    return [ENCODINGS[name] for name in names if ENCODINGS[name] not in _BUILT_IN]
