"""Encodings of a teacher's response by name: one module each, one interface (``base``).

``dense`` stores the logits and supports every loss. ``envelope`` stores the exact hard CKF labels
at every ratio in 1/400 of the space of ``dense``. For soft losses, ``dense-q8`` is a close
approximation in 2/5 of the space, ``topk`` a coarser one in 1/45, and ``sampled`` stores unbiased
draws from the soft targets in 1/300 each. :func:`register_encoding` adds a user's encoding.
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
"""Names that no encoding may have: arrays of every cache, and ``auto``, which selects one."""

__all__ = [
    "ENCODINGS",
    "ArraySpec",
    "Encoding",
    "ResponseShape",
    "Rows",
    "Sampled",
    "register_encoding",
]


def temperature_near(encoding: Encoding, requested: float = 1.0) -> float:
    """Return the temperature nearest to ``requested`` that the encoding supports in soft losses."""
    lowest, highest = encoding.temperatures
    return min(max(requested, lowest), highest)


def register_encoding(encoding: Encoding) -> None:
    """Register ``encoding`` under ``encoding.name``, to write and read caches with it.

    A cache records the name only: register the same encoding before opening it. Loader processes
    receive it by pickling, so its class must be defined at the top level of a module.

    Args:
        encoding: see :class:`cskd_pipeline.distill.encodings.base.Encoding`; its arrays are named
            ``NAME/...``.

    Raises:
        UsageError: the name is built in, reserved, or not of lower-case letters, digits and
            hyphens.
    """
    name = encoding.name
    taken = name in RESERVED or ENCODINGS.get(name) in _BUILT_IN
    if taken or not re.fullmatch("[a-z][a-z0-9-]{0,39}", name):
        raise UsageError(
            "an encoding cannot be registered under this name",
            found=name,
            expected="at most 40 lower-case letters, digits and hyphens, and none of "
            + ", ".join((*(known.name for known in _BUILT_IN), *RESERVED)),
        )
    ENCODINGS[name] = encoding


def registered(names: Iterable[str]) -> list[Encoding]:
    """Return the user's encodings among ``names``, which a new process must register too."""
    return [ENCODINGS[name] for name in names if ENCODINGS[name] not in _BUILT_IN]
