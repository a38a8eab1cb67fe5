"""``bench encodings``: size, speed and distortion of every encoding.

Notation: d spatial and g global logits; r the CKF ratio; tau the temperature of soft targets.

- ``bytes_per_view``: file sizes of a real cache with these views, file indices included.
- ``encode_ms``: from logits to rows, on the device. ``decode_ms``: from files to a loss's targets
  at one r, on the CPU, in batches. Medians per view; CPU work runs on one core.
- ``hard_agreement``: share of locations whose label equals the logits', over 21 values of r.
- ``kl``: divergence in nats from softmax((r d + (1 - r) g) / tau) to its approximation, over
  all locations and 21 values of r: mean and 99th percentile, for each tau.
- ``gradient_cosine``: cosine between the gradients of the spatial loss from this encoding and from
  the logits, for an untrained student (equal logits), over 5 values of r.
- ``soft_bias_and_variance``: cosine with the soft loss's exact gradient at r = 1, 1/2 and 0, summed
  over a batch of 32 views and their locations, like the gradient of the head's bias: for ``one``
  batch, lowered by bias and variance, and for the ``mean`` over 32 independent sets of draws,
  lowered by bias and hardly by variance. Both are equal without draws; for an encoding of hard
  labels the hard gradient is compared.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.distill.encodings import Encoding, Rows, Sampled, temperature_near
from cskd_pipeline.distill.losses import DistillationLoss
from cskd_pipeline.distill.targets import LogitTargets, Targets, labels_draws_or_logs
from cskd_pipeline.models.student import Heads
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.bench.responses import BATCH, SEED, Responses, encode, store
from cskd_pipeline.tools.bench.timing import one_thread
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import Plot
from cskd_pipeline.tools.tables import Printed, Table
from cskd_pipeline.views.bits import BitStream

RATIOS = [i / 20 for i in range(21)]
FEW_RATIOS = RATIOS[::5]
TEMPERATURES = (1.0, 4.0)
_FLOOR = 1e-5  # nats; smaller values are plotted as exact
_DRAW_SETS = 32
_REPEATS = 5


@one_thread()
def bench_encodings(
    responses: Responses, *, device: torch.device, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure ``names``, or every encoding, on ``responses``.

    Returns:
        ``source``, ``views``, ``classes``, ``grid`` and, per encoding, the measures listed above;
        None for what an encoding does not support.
    """
    rows: dict[str, Rows] = {}
    encodings = responses.encodings(names)
    found: dict[str, dict[str, Any]] = {name: {} for name in encodings}
    with progress(len(found), "encodings", "measuring") as meter:
        for name, encoding in encodings.items():
            rows[name], found[name]["encode_ms"] = encode(encoding, responses, device)
        with tempfile.TemporaryDirectory(prefix="cskd-bench-") as folder:
            path = Path(folder) / "cache"
            store(path, responses, rows)
            sizes = describe(open_cache(path))["bytes_per_view"]
            for name, measured in found.items():
                measured["bytes_per_view"] = sizes[name]
                measured["decode_ms"] = 1e3 * _decode_seconds(path, name, len(responses))
                measured |= _distortion(encodings[name], rows[name], responses)
                meter.advance()
    return {
        "source": responses.source,
        "views": len(responses),
        "classes": responses.spatial.shape[1],
        "grid": list(responses.spatial.shape[2:]),
        "device": str(device),
        "encodings": found,
    }


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the report as tables, and the meaning of their figures."""
    rows = []
    for name, m in report["encodings"].items():
        losses = [(m["kl"] or {}).get(f"{tau:g}", {}) for tau in TEMPERATURES]
        rows.append(
            (
                *(name, round(m["bytes_per_view"])),
                *(round(m[key], 3) for key in ("encode_ms", "decode_ms")),
                _share(m["hard_agreement"]),
                *(loss.get(key) for loss in losses for key in ("mean", "p99")),
                *(_share(m["gradient_cosine"][kind]) for kind in ("hard", "soft")),
            )
        )
    yield Table(
        f"{report['source']}: {_title(report)}",
        (
            *("encoding", "bytes/view", "encode ms", "decode ms", "hard agreement"),
            *(f"{what} tau={tau:g}" for tau in TEMPERATURES for what in ("KL", "p99")),
            *("cosine hard", "cosine soft"),
        ),
        rows,
    )
    yield "KL in nats over 21 values of r: mean and 99th percentile; -: not supported"
    columns = [(r, kind) for r in ("1", "0.5", "0") for kind in ("one", "mean")]
    yield Table(
        f"cosine with the exact soft gradient: one batch, and mean of {_DRAW_SETS} sets of draws",
        ("encoding", *(f"{kind} r={r}" for r, kind in columns)),
        [
            (name, *(_share(m["soft_bias_and_variance"][r][kind]) for r, kind in columns))
            for name, m in report["encodings"].items()
        ],
    )
    yield "shortfall from 1: bias for the mean, bias and variance for one batch"


def encodings_plot(report: Mapping[str, Any]) -> Plot:
    """Plot mean KL against bytes per view, both logarithmic.

    Lossless encodings are at the bottom. For encodings of hard labels only, the y-axis is the share
    of labels that differ; draws have neither and are left out.
    """
    points: dict[str, list[tuple[float, float]]] = {}  # by kind of loss
    labels: dict[str, tuple[str, float, float]] = {}
    for name, measured in report["encodings"].items():
        losses: dict[str, float] = {}
        if measured["kl"] is not None:
            losses = {f"KL at temperature {t}": loss["mean"] for t, loss in measured["kl"].items()}
        elif measured["hard_agreement"] is not None:
            losses = {"hard labels": 1 - measured["hard_agreement"]}
        for kind, loss in losses.items():
            points.setdefault(kind, []).append((measured["bytes_per_view"], loss))
            labels.setdefault(name, (name, measured["bytes_per_view"], loss))
    figure = plots.scatter(
        [
            plots.Series(kind, [x for x, _ in found], [y for _, y in found], style)
            for style, (kind, found) in enumerate(points.items())
        ],
        x_label="bytes per view",
        y_label="mean KL, nats",
        floor=_FLOOR,
        labels=list(labels.values()),
    )
    return Plot("encodings", _title(report), figure)


def _title(report: Mapping[str, Any]) -> str:
    height, width = report["grid"]
    return f"{report['views']} views, {report['classes']} classes, {height}x{width} locations"


def _share(value: float | None) -> str | None:
    """Format with four decimals, and 1 only if exact."""
    if value is None:
        return None
    return "1" if value > 1 - 1e-9 else f"{min(value, 0.9999):.4f}"


def _decode_seconds(path: Path, name: str, count: int) -> float:
    """Return the median seconds per view, with a new reader each time, from files to targets."""
    index = np.zeros((count, 3), np.int64)
    index[:, 2] = np.arange(count)[::-1]
    seconds = []
    for _ in range(_REPEATS):
        reader = open_cache(path)
        encoding = reader.encodings[name]
        tau = temperature_near(encoding)
        started = time.perf_counter()
        for start in range(0, count, BATCH):
            rows = reader.gather(name, index[start : start + BATCH])
            labels_draws_or_logs(encoding.targets(_tensors(rows)), encoding.serves, tau, [0.5])
        seconds.append((time.perf_counter() - started) / count)
    return statistics.median(seconds)


def _distortion(encoding: Encoding, rows: Rows, responses: Responses) -> dict[str, Any]:
    agreeing: list[float] = []
    tau = temperature_near(encoding)
    divergences: dict[float, list[Tensor]] = {tau: [] for tau in TEMPERATURES}
    cosines: dict[str, list[float]] = {kind: [] for kind in encoding.serves}
    soft = "soft" in encoding.serves
    drawn = isinstance(encoding, Sampled)  # has neither a top class nor probabilities
    for start in range(0, len(responses), BATCH):
        part = slice(start, start + BATCH)
        exact = LogitTargets(responses.spatial[part], responses.global_[part])
        found = encoding.targets(_tensors({name: v[part] for name, v in rows.items()}))
        for r in () if drawn else RATIOS:
            same = found.hard_spatial(r) == exact.hard_spatial(r)
            agreeing += same.flatten(1).float().mean(1).tolist()
            for at in TEMPERATURES if soft else ():
                divergences[at].append(_divergence(exact, found, r, at))
        for kind, values in cosines.items():
            for r in FEW_RATIOS:
                a, b = (_gradient(kind, t, exact.spatial.shape, r, tau) for t in (exact, found))
                values.append(float(cosine_similarity(a, b, dim=0)))
    return {
        "hard_agreement": None if drawn else statistics.fmean(agreeing),
        "kl": {f"{at:g}": _summary(torch.cat(v)) for at, v in divergences.items()}
        if soft and not drawn
        else None,
        "gradient_cosine": {
            kind: statistics.fmean(cosines[kind]) if kind in cosines else None
            for kind in ("hard", "soft")
        },
        "soft_bias_and_variance": _bias_and_variance(encoding, responses),
    }


def _bias_and_variance(encoding: Encoding, responses: Responses) -> dict[str, dict[str, float]]:
    """Return the cosines of a single batch's gradient and of the mean gradient, by r."""
    part = slice(0, BATCH)
    logits, tau = (responses.spatial[part], responses.global_[part]), temperature_near(encoding)
    kind, shape = "soft" if "soft" in encoding.serves else "hard", logits[0].shape
    stream = BitStream(SEED + 1)
    sets = [
        encoding.targets(encoding.encode(*logits, stream.raw(len(logits[0]))))
        for _ in range(_DRAW_SETS if isinstance(encoding, Sampled) else 1)
    ]

    def gradient(kind: str, targets: Targets, r: float) -> Tensor:
        return _gradient(kind, targets, shape, r, tau).view(shape).sum((0, 2, 3))

    found = {}
    for r in (1.0, 0.5, 0.0):
        exact = gradient("soft", LogitTargets(*logits), r)
        each = [gradient(kind, targets, r) for targets in sets]
        mean = torch.stack(each).mean(0)
        one = statistics.fmean(float(cosine_similarity(exact, g, dim=0)) for g in each)
        found[f"{r:g}"] = {"one": one, "mean": float(cosine_similarity(exact, mean, dim=0))}
    return found


def _divergence(exact: Targets, found: Targets, r: float, tau: float) -> Tensor:
    """Return the KL of every location of a batch, flat."""
    p, q = (targets.spatial_log_probabilities(r, tau) for targets in (exact, found))
    return (p.exp() * (p - q)).sum(1).flatten()


def _summary(divergences: Tensor) -> dict[str, float]:
    ordered = divergences.sort().values
    return {
        "mean": float(divergences.double().mean()),
        "p99": float(ordered[int(0.99 * (len(ordered) - 1))]),
    }


def _gradient(kind: str, targets: Targets, shape: Sequence[int], r: float, tau: float) -> Tensor:
    """Return the spatial loss's gradient for an untrained student's logits (B, K, h, w), flat."""
    loss = DistillationLoss("cskd", kind, kind, temperature=tau)
    labels = torch.full(shape[:2], 1.0 / shape[1])
    dense = torch.zeros(shape, requires_grad=True)
    heads = Heads(torch.zeros(shape[:2]), torch.zeros(shape[:2]), dense)
    total = loss(heads, labels, targets, r).total
    return torch.autograd.grad(total, dense)[0].flatten().double()


def _tensors(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in rows.items()}
