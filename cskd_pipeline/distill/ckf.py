"""Cumulative knowledge fusion (CKF): its schedules, its hard labels, and their upper envelope.

Legend: B samples, K classes, h x w the teacher's grid; ``spatial`` d (B, K, h, w) and ``global_``
g (B, K), both float16: the teacher's response.

CKF fuses ``r * d + (1 - r) * g`` with r falling from 1 to 0. At one location class k is thus a line
in r from g_k to d_k, and the hard label is the line on top. Among several lines on top the larger g
wins, then the larger d, then the lower index: the class that is on top before a crossing keeps it.

Exactness. A float16 is an integer multiple of 2**-24 below 2**16, and r is rounded to a multiple t
of 1/N, N = 65535. Then ``t * d + (N - t) * g`` is an integer below 2**57 in these units: labels and
crossings are computed in int64 without any rounding, so that a live teacher, a dense cache and an
envelope cache give the same label on every device at every r. The label at r itself can differ from
it only where a crossing lies between r and that multiple, at most half of 1/N away, and never at
r = 0 and r = 1.
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
"""N: crossings and r are known to 1/N."""
UNUSED = 65535
"""Fills planes that a location has no line for; neither a class nor a crossing can reach it."""

_UNITS_PER_ONE = 2.0**24  # the smallest float16 step is 2**-24
_LOWEST = -(1 << 62)  # below every key, as int64 and as float32
_SLACK = 1.0 + 2.0**-20  # more than the seven float32 roundings that it covers
_CHUNK = 1 << 22  # logits handled at once: scratch memory stays below 300 MB

Schedule = str | Callable[[float], float]
"""A name of :data:`SCHEDULES`, or a function of one's own: progress t -> ratio r."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "x2": lambda t: (1.0 - t) ** 2,
    "cos": lambda t: math.cos(math.pi / 2.0 * t),
    "spatial": lambda t: 1.0,
    "global": lambda t: 0.0,
}
"""The CKF ratio r by progress t: the paper's three decay functions (arXiv 2307.08500), and its two
ends for ablations, the spatial response alone and the global one alone, at every location.
"""


def ckf_ratio(schedule: Schedule, progress: float) -> float:
    """Return r, the share of the spatial response, in [0, 1].

    Args:
        schedule: ``linear`` (1 - t), ``x2`` ((1 - t)^2), ``cos`` (cos(pi t / 2)), ``spatial`` (1),
            ``global`` (0), or a function of t.
        progress: t = epoch / epochs (or update / updates), in [0, 1].

    Raises:
        RecipeError: an unknown schedule, progress or a function's ratio outside [0, 1].
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise RecipeError(
            "unknown CKF schedule",
            where="distill.schedule",
            found=schedule,
            expected=f"{', '.join(SCHEDULES)}, or in Python a function of progress",
        )
    _require_share(progress, "the training's progress", "epoch / epochs, or update / updates")
    r = SCHEDULES[schedule](progress) if isinstance(schedule, str) else schedule(progress)
    _require_share(r, "the ratio that a CKF schedule returns", f"schedule({progress:g})")
    return float(r)


def _require_share(value: float, name: str, where: str) -> None:
    if not 0.0 <= value <= 1.0:  # NaN is not, either
        raise RecipeError(f"{name} is out of range", where=where, found=value, expected="0 to 1")


def fuse(spatial: Tensor, global_: Tensor, r: float) -> Tensor:
    """Return ``r * d + (1 - r) * g`` in float32, (B, K, h, w): the target of the soft loss.

    Raises:
        RecipeError: r outside [0, 1].
    """
    _require_share(r, "the CKF ratio", "r")
    return r * spatial.float() + (1.0 - r) * global_.float()[:, :, None, None]


def hard_global_labels(global_: Tensor) -> Tensor:
    """Return the class of the largest global logit, the lowest index among equals, (B,) int64."""
    return global_.argmax(dim=1)


def hard_labels(spatial: Tensor, global_: Tensor, r: float) -> Tensor:
    """Return the class on top at the multiple of 1/N nearest to r, by the tie rule; no host sync.

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
    """Return :func:`hard_labels` by :func:`upper_envelope`'s planes, at any r; no host sync.

    Args:
        planes: (B, P, h, w) uint16, P odd; trailing planes that are all unused may be left out.

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
    """Return every class that is on top at some multiple of 1/N, and where the next takes over.

    From the label at r = 0 the march goes to the nearest crossing with a steeper line, which lies
    at ``floor(N * a / (a + b))`` for lines a apart at r = 0 and, the other way, b apart at r = 1.
    At the next multiple of 1/N the new label is found as :func:`hard_labels` finds it; so a class
    whose two crossings share a quantum is never listed, and the last class is the label at r = 1.
    On one CPU core a view takes about 1 % of a ResNet-50's forward pass (K = 1000, 7x7).

    Args:
        spatial: (B, K, h, w) float16, K <= 65535.
        global_: (B, K) float16.

    Returns:
        planes (B, P, h, w) uint16: ``c0, q1, c1, q2, c2, ...`` where class ``c1`` takes over from
        ``c0`` at ``r = (q1 + 0.5) / N`` and so on, ``q`` rising in 0..65534; the rest of the P
        planes holds 65535. P = 2 * (most lines at any location of this batch) - 1.

    Raises:
        TeacherError: a logit is NaN or infinite.
    """
    height, width = spatial.shape[2:]
    pieces = logit_lines(spatial, global_, torch.float32)
    return envelope_of_lines(((d, g.expand_as(d)) for d, g in pieces), height, width)


def logit_lines(
    spatial: Tensor, global_: Tensor, dtype: torch.dtype, chunk: int = _CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield about ``chunk`` logits at a time: d (b, l, K) and g (b, 1, K) of ``dtype``.

    Raises:
        TeacherError: a logit is NaN or infinite.
    """
    samples, classes = global_.shape
    assert spatial.dtype == global_.dtype == torch.float16, (spatial.dtype, global_.dtype)
    assert spatial.shape[:2] == (samples, classes), (spatial.shape, global_.shape)
    assert 0 < classes <= UNUSED, classes
    if not all_finite(spatial, global_):
        raise TeacherError("the teacher's response holds NaN or infinite logits")
    for d, g in _pieces(spatial, global_, chunk):
        d = d.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format)
        yield d.flatten(1, 2), g.to(dtype)[:, None]


def envelope_of_lines(pieces: Iterable[tuple[Tensor, Tensor]], height: int, width: int) -> Tensor:
    """Return the planes of :func:`upper_envelope` for any lines, a piece of the batch at a time.

    Args:
        pieces: each the values at r = 1 and at r = 0, (b, height * width, K), multiples of 2**-24
            below 2**17 that their type, float32 or float64, holds exactly.
        height, width: of the grid.
    """
    found = [_march(d, g) for d, g in pieces]
    count = max(piece.shape[1] for piece in found)
    padded = [pad(piece, (0, count - piece.shape[1]), value=UNUSED) for piece in found]
    planes = torch.cat(padded).reshape(-1, height, width, count)
    return planes.permute(0, 3, 1, 2).contiguous().to(torch.uint16)


def _pieces(
    spatial: Tensor, global_: Tensor, chunk: int = _CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in pieces of about ``chunk`` logits."""
    rows = max(1, chunk // spatial[0].numel())
    return zip(spatial.split(rows), global_.split(rows), strict=True)


def _march(d: Tensor, g: Tensor) -> Tensor:
    """The planes (n, P) int32 of n = b * l locations; d and g (b, l, K) float32 or float64."""
    lines = _candidates(d, g)
    shape = (lines.shape[1], 2 * lines.shape[2] - 1)
    planes = torch.full(shape, UNUSED, dtype=torch.int32, device=d.device)
    planes[:, 0] = lines[0, :, 0]
    rows, top, step = torch.arange(len(planes), device=d.device), lines[:, :, 0], 0
    while True:
        # only locations whose label still changes
        active = (lines[1] > top[1][:, None]).any(dim=1).nonzero().squeeze(1)
        if not len(active):
            return planes[:, : 2 * step + 1]
        rows, lines, top = rows[active], lines[:, active], top[:, active]
        crossing, line = _next_line(*lines[1:], *top[1:])
        top = lines.gather(2, line.expand(3, -1)[..., None]).squeeze(2)
        step += 1
        planes[rows, 2 * step - 1] = crossing.int()
        planes[rows, 2 * step] = top[0].int()


def _candidates(d: Tensor, g: Tensor) -> Tensor:
    """The lines that may be on top: class, d and g in units, packed (3, n, C) int64.

    Of 1,000 lines at a location a handful is left, so that the march, which looks at all of them in
    each of its steps, costs little. C is one more than the most at any location; the label at r = 0
    comes first and fills the unused columns too.

    Which lines are left: the label at r = 0 (``start``) and the one at r = 1 (``end``) are on top
    somewhere, so another line must rise above both. The maximum of the two is convex and bends only
    where they cross, so another straight line rises above it at that crossing or nowhere. There
    ``r = (g_start - g_end) / ((g_start - g_end) + (d_end - d_start))``; line k is on or above, at
    that r, if and only if its point (g_k, d_k) is on or above the chord from (g_start, d_start) to
    (g_end, d_end)::

        (g_start - g_k) * (d_end - d_start) <= (d_k - d_start) * (g_start - g_end)

    A line too many does no harm: the march decides in exact integers. float32 may not leave one
    out, so the right side is enlarged by ``_SLACK``, more than all roundings of the two sides.
    """
    start = _first_of_largest(g, d, dim=-1)[..., None]  # (b, l, 1)
    end = d.argmax(dim=-1, keepdim=True)
    d_start, g_start, d_end, g_end = (x.gather(-1, k) for k in (start, end) for x in (d, g))
    rise = d - d_start
    above = (g_start - g) * (d_end - d_start) <= rise * ((g_start - g_end) * _SLACK)
    above &= rise > 0  # a line that is not steeper than ``start`` never overtakes it
    # Pack what is left of each location to the left, behind column 0: an entry's column is its
    # number among all entries, less the number of those that belong to the locations before.
    place = above.nonzero(as_tuple=True)  # sample, location, class of each entry
    row = place[0] * d.shape[1] + place[1]
    count = above.sum(dim=-1).flatten()  # (n,) entries of each location
    before = count.cumsum(0) - count
    column = 1 + torch.arange(len(row), device=d.device) - before[row]
    first = torch.stack([start, _units(d_start), _units(g_start)]).flatten(1, 2)
    lines = first.repeat(1, 1, 1 + int(count.max()))
    lines[:, row, column] = torch.stack([place[2], _units(d[place]), _units(g[place])])
    return lines


def _next_line(d: Tensor, g: Tensor, d_top: Tensor, g_top: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the label changes next, and to which column of d and g (m, C): both (m,)."""
    rise = d - d_top[:, None]
    steeper = rise > 0
    fall = (g_top[:, None] - g).where(steeper, 1)
    crossing = fall * QUANTUM // (fall + rise.where(steeper, 0))  # N for lines that never overtake
    first = crossing.amin(dim=1, keepdim=True)
    t = first + 1
    return first.squeeze(1), _first_of_largest(t * d + (QUANTUM - t) * g, g, dim=1)


def _nearest_multiple(r: float) -> int:
    """t, where t/N is the multiple of 1/N nearest to r, the lower one of two."""
    _require_share(r, "the CKF ratio", "r")
    return math.ceil(Fraction(r) * QUANTUM - Fraction(1, 2))


def _units(logits: Tensor) -> Tensor:
    """Multiples of 2**-24, as integers, int64: what float16 can hold, or lines in float64."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return (exact * _UNITS_PER_ONE).long()


def _first_of_largest(key: Tensor, *ties: Tensor, dim: int) -> Tensor:
    """The index of the largest ``key`` along ``dim``; ties by ``ties`` in turn, then the lowest."""
    on_top = key == key.amax(dim, keepdim=True)
    for tie in ties:
        tie = tie.where(on_top, _LOWEST)
        on_top = on_top & (tie == tie.amax(dim, keepdim=True))
    return on_top.to(torch.uint8).argmax(dim)
