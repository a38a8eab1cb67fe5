"""Cumulative knowledge fusion (CKF): schedules, hard labels, and the labels' upper envelope.

Symbols: B samples, K classes, a teacher grid of h x w locations; the teacher's response is
``spatial`` d (B, K, h, w) and ``global_`` g (B, K), both float16.

CKF (arXiv 2307.08500, "Cumulative Knowledge Fusion") fuses ``r * d + (1 - r) * g`` with a ratio r
that falls from 1 to 0 during training. At one location, class k is thus a straight line in r from
g_k (r = 0) to d_k (r = 1), and the hard label is the class of the highest line. Ties go to the
larger g, then the larger d, then the lower index, so a label changes just after a crossing.

Exactness: a finite float16 is an integer multiple of 2**-24 below 2**16 in magnitude, and r is
rounded to a multiple t/N, N = 65535. In units of 2**-24, ``t * d + (N - t) * g`` is an integer
below 2**57, so labels and crossings are computed in int64 without rounding: a live teacher, a dense
cache and an envelope cache give the same label on every device at every r. Rounding r, by at most
1/(2N), changes a label only if a crossing lies between r and t/N, and never at r = 0 or r = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from cskd_pipeline.errors import RecipeError, TeacherError
from cskd_pipeline.runtime.device import all_finite

QUANTUM = 65535
"""N: crossings and r are multiples of 1/N."""
UNUSED = 65535
"""Fill value of unused planes; no class index and no crossing reaches it."""

_UNITS_PER_ONE = 2.0**24  # the smallest float16 step is 2**-24
_LOWEST = -(1 << 62)  # below every tie-breaking value, as int64 and as float32
_SLACK = 1.0 + 2.0**-20  # exceeds the combined error of seven float32 roundings
_CHUNK = 1 << 22  # logits per chunk: keeps scratch memory below 300 MB

Schedule = str | Callable[[float], float]
"""A name in :data:`SCHEDULES`, or a function from progress t to ratio r."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "x2": lambda t: (1.0 - t) ** 2,
    "cos": lambda t: math.cos(math.pi / 2.0 * t),
    "spatial": lambda t: 1.0,
    "global": lambda t: 0.0,
}
"""CKF ratio r as a function of progress t: the paper's three decay functions, and two constants for
ablations: the spatial response alone (r = 1) and the global response alone (r = 0).
"""


def ckf_ratio(schedule: Schedule, progress: float) -> float:
    """Return the CKF ratio r, the weight of the spatial response, in [0, 1].

    Args:
        schedule: ``linear`` (1 - t), ``x2`` ((1 - t)^2), ``cos`` (cos(pi t / 2)), ``spatial`` (1),
            ``global`` (0), or a function of t.
        progress: t = epoch / epochs (or update / updates), in [0, 1].

    Raises:
        RecipeError: an unknown schedule; progress, or the ratio returned by a function, outside
            [0, 1].
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise RecipeError(
            "unknown CKF schedule",
            where="distill.schedule",
            found=schedule,
            expected=f"{', '.join(SCHEDULES)}, or (in Python) a function of progress",
        )
    _require_share(progress, "the training progress", "epoch / epochs, or update / updates")
    r = SCHEDULES[schedule](progress) if isinstance(schedule, str) else schedule(progress)
    _require_share(r, "the ratio returned by the CKF schedule", f"schedule({progress:g})")
    return float(r)


def _require_share(value: float, name: str, where: str) -> None:
    if not 0.0 <= value <= 1.0:  # rejects NaN too
        raise RecipeError(f"{name} is out of range", where=where, found=value, expected="0 to 1")


def fuse(spatial: Tensor, global_: Tensor, r: float) -> Tensor:
    """Return ``r * d + (1 - r) * g``, (B, K, h, w) float32: the logits of the soft target.

    Raises:
        RecipeError: r outside [0, 1].
    """
    _require_share(r, "the CKF ratio", "r")
    return r * spatial.float() + (1.0 - r) * global_.float()[:, :, None, None]


def hard_global_labels(global_: Tensor) -> Tensor:
    """Return the class of the largest global logit, (B,) int64; ties go to the lowest index."""
    return global_.argmax(dim=1)


def hard_labels(spatial: Tensor, global_: Tensor, r: float) -> Tensor:
    """Return the class of the highest line at the multiple of 1/N nearest to r; no host sync.

    Returns:
        (B, h, w) int64.

    Raises:
        RecipeError: r outside [0, 1].
    """
    t = _nearest_multiple(r)
    labels = []
    for d, g in _pieces(spatial, global_):
        d = _units(d)
        g = _units(g)[:, :, None, None].expand_as(d)
        labels.append(_first_of_largest(t * d + (QUANTUM - t) * g, g, d, dim=1))
    return torch.cat(labels)


def envelope_labels(planes: Tensor, r: float) -> Tensor:
    """Return :func:`hard_labels` at any r from :func:`upper_envelope`'s planes; no host sync.

    Args:
        planes: (B, P, h, w) uint16, P odd; trailing planes that are entirely unused are optional.

    Returns:
        (B, h, w) int64.

    Raises:
        RecipeError: r outside [0, 1].
    """
    assert planes.shape[1] % 2 == 1, planes.shape
    passed = planes[:, 1::2].to(torch.int32) < _nearest_multiple(r)
    line = passed.sum(dim=1, keepdim=True)
    return planes[:, 0::2].to(torch.int64).gather(1, line).squeeze(1)


def upper_envelope(spatial: Tensor, global_: Tensor) -> Tensor:
    """Return each class that is a hard label at some multiple of 1/N, and its successor's crossing.

    A gift-wrapping (Jarvis) march starts at the label of r = 0. Line k overtakes the current line c
    after ``r = a / (a + b)``, with ``a = g_c - g_k > 0`` and ``b = d_k - d_c > 0``. The next class
    is the hard label at ``(q + 1) / N`` for the smallest ``q = floor(N * a / (a + b))``; the last
    is the label at r = 1. A class that leads only between two multiples of 1/N is never listed. On
    one CPU core a view takes about 1 % of a ResNet-50's forward pass (K = 1000, 7x7).

    Args:
        spatial: (B, K, h, w) float16, K <= 65535.
        global_: (B, K) float16.

    Returns:
        planes (B, P, h, w) uint16: ``c0, q1, c1, q2, c2, ...``. Class ``c1`` replaces ``c0`` above
        ``r = (q1 + 0.5) / N``, and so on, with q strictly increasing in 0..65534; unused planes are
        65535. P = 2 * L - 1 for L, the largest number of classes at any location of the batch.

    Raises:
        TeacherError: a logit is NaN or infinite.
    """
    height, width = spatial.shape[2:]
    pieces = logit_lines(spatial, global_, torch.float32)
    return envelope_of_lines(((d, g.expand_as(d)) for d, g in pieces), height, width)


def logit_lines(
    spatial: Tensor, global_: Tensor, dtype: torch.dtype, chunk: int = _CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield d (b, l, K) and g (b, 1, K) as ``dtype``, l = h * w, about ``chunk`` logits at a time.

    Raises:
        TeacherError: a logit is NaN or infinite.
    """
    samples, classes = global_.shape
    assert spatial.dtype == global_.dtype == torch.float16, (spatial.dtype, global_.dtype)
    assert spatial.shape[:2] == (samples, classes), (spatial.shape, global_.shape)
    assert 0 < classes <= UNUSED, classes
    if not all_finite(spatial, global_):
        raise TeacherError("the teacher's response contains NaN or infinite logits")
    for d, g in _pieces(spatial, global_, chunk):
        d = d.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format)
        yield d.flatten(1, 2), g.to(dtype)[:, None]


def envelope_of_lines(pieces: Iterable[tuple[Tensor, Tensor]], height: int, width: int) -> Tensor:
    """Return the planes of :func:`upper_envelope` for lines given in pieces of the batch.

    Args:
        pieces: the lines' values at r = 1 and at r = 0, each (b, height * width, K), float32 or
            float64, exact multiples of 2**-24 below 2**17 in magnitude.
        height, width: grid size.
    """
    found = [_march(d, g) for d, g in pieces]
    count = max(piece.shape[1] for piece in found)
    padded = [pad(piece, (0, count - piece.shape[1]), value=UNUSED) for piece in found]
    planes = torch.cat(padded).reshape(-1, height, width, count)
    return planes.permute(0, 3, 1, 2).contiguous().to(torch.uint16)


def _pieces(
    spatial: Tensor, global_: Tensor, chunk: int = _CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the batch into pieces of about ``chunk`` logits."""
    rows = max(1, chunk // spatial[0].numel())
    return zip(spatial.split(rows), global_.split(rows), strict=True)


def _march(d: Tensor, g: Tensor) -> Tensor:
    """Return the planes (n, P) int32 of n = b * l locations from d and g (b, l, K)."""
    lines = _candidates(d, g)  # (3, n, C): class, d, g
    shape = (lines.shape[1], 2 * lines.shape[2] - 1)
    planes = torch.full(shape, UNUSED, dtype=torch.int32, device=d.device)
    planes[:, 0] = lines[0, :, 0]
    # From here on only the m locations whose label still changes, by their rows in ``planes``.
    rows, top, step = torch.arange(len(planes), device=d.device), lines[:, :, 0], 0
    while True:
        active = (lines[1] > top[1][:, None]).any(dim=1).nonzero().squeeze(1)  # a larger d remains
        if not len(active):
            return planes[:, : 2 * step + 1]
        rows, lines, top = rows[active], lines[:, active], top[:, active]
        crossing, column = _next_line(*lines[1:], *top[1:])
        top = lines.gather(2, column.expand(3, -1)[..., None]).squeeze(2)  # (3, m)
        step += 1
        planes[rows, 2 * step - 1] = crossing.int()
        planes[rows, 2 * step] = top[0].int()


def _candidates(d: Tensor, g: Tensor) -> Tensor:
    """Return a superset of the envelope's lines, (3, n, C) int64: class, d and g in units.

    Column 0 is the label at r = 0, which also pads unused columns. Of 1,000 lines a few remain per
    location, so the march, which compares all C columns at every step, is cheap.

    Let ``start`` be the label at r = 0 and ``end`` a class of the largest d. A line k is on the
    envelope only if it reaches ``max(start, end)``, which it does not exceed at r = 0 or r = 1. The
    maximum is convex and bends only where ``start`` and ``end`` cross, at
    ``r = (g_start - g_end) / ((g_start - g_end) + (d_end - d_start))``, so k reaches it there or
    nowhere. Multiplied out::

        (g_start - g_k) * (d_end - d_start) <= (d_k - d_start) * (g_start - g_end)

    Rounding may not drop a line, so ``_SLACK`` enlarges the right-hand side beyond all rounding
    errors of both. A superfluous line does no harm: the march compares exact integers.
    """
    start = _first_of_largest(g, d, dim=-1)[..., None]  # (b, l, 1) class indices, as ``end``
    end = d.argmax(dim=-1, keepdim=True)
    d_start, g_start, d_end, g_end = (x.gather(-1, k) for k in (start, end) for x in (d, g))
    rise = d - d_start
    kept = (g_start - g) * (d_end - d_start) <= rise * ((g_start - g_end) * _SLACK)
    kept &= rise > 0  # a line with no larger d than ``start`` never overtakes it
    # Pack each location's kept lines into columns 1, 2, ...: a line's column is its rank among all
    # kept lines minus the number of kept lines at earlier locations.
    index = kept.nonzero(as_tuple=True)  # sample, location and class of each kept line, in order
    row = index[0] * d.shape[1] + index[1]
    count = kept.sum(dim=-1).flatten()  # (n,) kept lines per location
    earlier = count.cumsum(0) - count
    column = 1 + torch.arange(len(row), device=d.device) - earlier[row]
    first = torch.stack([start, _units(d_start), _units(g_start)]).flatten(1, 2)  # (3, n, 1)
    lines = first.repeat(1, 1, 1 + int(count.max()))
    lines[:, row, column] = torch.stack([index[2], _units(d[index]), _units(g[index])])
    return lines


def _next_line(d: Tensor, g: Tensor, d_top: Tensor, g_top: Tensor) -> tuple[Tensor, Tensor]:
    """Return q of the next label change and the new line's column in d and g (m, C), both (m,)."""
    rise = d - d_top[:, None]
    steeper = rise > 0
    fall = (g_top[:, None] - g).where(steeper, 1)
    crossing = fall * QUANTUM // (fall + rise.where(steeper, 0))  # N for lines that never overtake
    q = crossing.amin(dim=1, keepdim=True)
    t = q + 1
    return q.squeeze(1), _first_of_largest(t * d + (QUANTUM - t) * g, g, dim=1)


def _nearest_multiple(r: float) -> int:
    """Return t such that t/N is the multiple of 1/N nearest to r, the lower one if tied."""
    _require_share(r, "the CKF ratio", "r")
    return math.ceil(Fraction(r) * QUANTUM - Fraction(1, 2))


def _units(logits: Tensor) -> Tensor:
    """Return multiples of 2**-24 (any float16, or exact float64 lines) as int64 counts."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return (exact * _UNITS_PER_ONE).long()


def _first_of_largest(key: Tensor, *ties: Tensor, dim: int) -> Tensor:
    """Return argmax of ``key`` along ``dim``; break ties by ``ties`` in turn, then lowest index."""
    largest = key == key.amax(dim, keepdim=True)
    for tie in ties:
        tie = tie.where(largest, _LOWEST)
        largest = largest & (tie == tie.amax(dim, keepdim=True))
    return largest.to(torch.uint8).argmax(dim)
