"""Draws from the soft target: correct frequencies, reproducible from seeds, small on disk."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.distill import ckf
from cskd_pipeline.distill.encodings import ResponseShape, Sampled, TopK, temperature_near
from cskd_pipeline.distill.encodings.sampled import LINES, gumbel_noise, noisy_envelopes
from cskd_pipeline.distill.losses import DistillationLoss
from cskd_pipeline.distill.targets import LogitTargets, SampledTargets
from cskd_pipeline.errors import CacheError, ManifestError, UsageError
from cskd_pipeline.models.student import Heads
from cskd_pipeline.tools.bench.responses import Responses, encode, store
from cskd_pipeline.views.bits import derive_seed
from tests.cache.factories import COUNTS, dataset, make, manifest, teacher
from tests.pipeline import world

RATIOS = (1.0, 0.8, 0.5, 0.2, 0.0)
MASK = 2**64 - 1


def logits(samples: int = 1, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, K, 2, 3) and (B, K) float16: one response repeated."""
    generator = torch.Generator().manual_seed(1)
    spatial = 1.5 * torch.randn(1, classes, 2, 3, generator=generator)
    global_ = 1.5 * torch.randn(1, classes, generator=generator)
    return spatial.half().expand(samples, -1, -1, -1), global_.half().expand(samples, -1)


def drawn(
    samples: int, draws: int, tau: float, classes: int = 6
) -> tuple[SampledTargets, LogitTargets]:
    spatial, global_ = logits(samples, classes)
    encoding = Sampled(draws, tau)
    found = encoding.targets(encoding.encode(spatial, global_, np.arange(samples, dtype=np.uint64)))
    assert isinstance(found, SampledTargets)
    return found, LogitTargets(spatial[:1], global_[:1])


def splitmix64(state: int, i: int) -> int:
    """Return word i of SplitMix64 as specified in the module docstring, in Python integers."""
    z = (state + (i + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_the_noise_follows_the_specification() -> None:
    seeds = np.array([0, 1, 2**63 + 5, 2**64 - 1], np.uint64)
    found = gumbel_noise(seeds, 7, 500, 2.0, "cpu")
    for b, seed in enumerate(seeds.tolist()):
        state = derive_seed("sampled", seed)
        for i in range(500):
            u = (2 * (splitmix64(state, 7 + i) >> 12) + 1) / 2**53
            expected = round(2.0 * -math.log(-math.log(u)) * 2**16) / 2**16
            assert found[b, i] == expected


def test_the_noise_is_pinned() -> None:
    """SplitMix64's published first words for state 0, and this project's own noise."""
    assert [hex(splitmix64(0, i)) for i in range(2)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    units = gumbel_noise(np.array([42], np.uint64), 0, 6, 1.0, "cpu")[0] * 65536
    assert units.tolist() == PINNED


PINNED = [-27456, 126495, 211996, 63289, 29303, 82062]


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_draws_have_the_soft_targets_frequencies(tau: float) -> None:
    """Pearson's chi-squared test of each location at each r and of the global target."""
    samples, draws = 4000, 2
    found, exact = drawn(samples, draws, tau)
    for r in RATIOS:
        counts = torch.zeros(6, 2, 3, dtype=torch.int64)
        labels = found.drawn_spatial(r, tau)
        for k in range(6):
            counts[k] = (labels == k).sum((0, 1))
        expected = exact.spatial_log_probabilities(r, tau)[0].double().exp() * samples * draws
        assert_fits(counts, expected)
    counts = torch.bincount(found.drawn_global(tau).flatten(), minlength=6)
    expected = exact.global_log_probabilities(tau)[0].double().exp() * samples * draws * 6
    assert_fits(counts[:, None], expected[:, None])


def assert_fits(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Require chi squared below its 99.9 % quantile (Wilson-Hilferty approximation)."""
    assert expected.min() > 20
    freedom = (len(counts) - 1) * counts[0].numel()
    found = float(((counts - expected) ** 2 / expected).sum())
    third = 2 / (9 * freedom)
    assert found < freedom * (1 - third + NormalDist().inv_cdf(0.999) * third**0.5) ** 3


def test_locations_and_draws_are_independent() -> None:
    """For equal logits two draws agree as often as by chance."""
    spatial, global_ = torch.zeros(500, 4, 2, 3).half(), torch.zeros(500, 4).half()
    found = Sampled(3).targets(Sampled(3).encode(spatial, global_, np.arange(500, dtype=np.uint64)))
    assert isinstance(found, SampledTargets)
    labels = found.drawn_spatial(1.0, 1.0).flatten(1)  # (500, 18)
    for a in range(18):
        for b in range(a):
            same = float((labels[:, a] == labels[:, b]).double().mean())
            assert abs(same - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 500), (a, b)


def test_the_first_draws_do_not_depend_on_their_number() -> None:
    spatial, global_ = logits(3)
    seeds = np.arange(3, dtype=np.uint64)
    one, three = (noisy_envelopes(spatial, global_, seeds, n, 1.0) for n in (1, 3))
    for r in RATIOS:
        assert torch.equal(ckf.envelope_labels(three, r)[:, :2], ckf.envelope_labels(one, r))


def test_a_draw_is_the_class_of_the_highest_noisy_line() -> None:
    """At 16 ratios, against a direct computation in Python."""
    spatial, global_ = logits(2, classes=5)
    seeds = np.array([3, 2**64 - 2], np.uint64)
    planes = noisy_envelopes(spatial, global_, seeds, 2, 1.5)
    for r in (i / 15 for i in range(16)):  # multiples of 1/65535
        found = ckf.envelope_labels(planes, r).view(2, 2, 2, 3)
        t = round(r * ckf.QUANTUM)
        for b, n, row, column in np.ndindex(2, 2, 2, 3):
            at = n * 6 + row * 3 + column
            noise = gumbel_noise(seeds[b : b + 1], at * 5, 5, 1.5, "cpu")[0].tolist()
            best = max(
                range(5),
                key=lambda k: (
                    t * (float(spatial[b, k, row, column]) + noise[k])
                    + (ckf.QUANTUM - t) * (float(global_[b, k]) + noise[k])
                ),
            )
            assert found[b, n, row, column] == best


@pytest.mark.parametrize("scaling", ["reference", "mean"])
@pytest.mark.parametrize("r", [1.0, 0.4, 0.0])
def test_the_expected_gradient_equals_that_of_the_soft_loss(scaling: str, r: float) -> None:
    """Both terms, within Monte Carlo error; the value is larger by the targets' entropy."""
    tau, samples = 2.0, 2000
    found, exact = drawn(samples, 4, tau)
    loss = DistillationLoss("cskd", "soft", "soft", temperature=tau, scaling=scaling)
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(1, 6, 2, 3, generator=generator)
    dist = torch.randn(1, 6, generator=generator)

    def gradients(targets: LogitTargets | SampledTargets, count: int) -> tuple[torch.Tensor, ...]:
        """Return the gradient of each copy's own loss, (count, ...), and both terms' values."""
        heads = Heads(
            torch.zeros(count, 6),
            dist.repeat(count, 1).requires_grad_(),
            dense.repeat(count, 1, 1, 1).requires_grad_(),
        )
        parts = loss(heads, torch.full((count, 6), 1 / 6), targets, r)
        assert heads.dist is not None
        assert heads.dense is not None
        g, d = torch.autograd.grad(parts.total, [heads.dist, heads.dense])
        return g.double() * count, d.double() * count, parts.global_, parts.spatial

    *many, global_value, spatial_value = gradients(found, samples)
    *one, global_kl, spatial_kl = gradients(exact, 1)
    for sampled, soft in zip(many, one, strict=True):
        error = sampled.std(0) / math.sqrt(samples)
        assert ((sampled.mean(0) - soft[0]).abs() < 5 * error + 1e-7).all()
    spatial_p = exact.spatial_log_probabilities(r, tau)
    global_p = exact.global_log_probabilities(tau)
    scale = tau**2 / (6 if scaling == "mean" else 1)
    entropy = float(-(spatial_p.exp() * spatial_p).sum()) * scale
    assert float(spatial_value - spatial_kl) == pytest.approx(entropy, rel=0.03)
    scale = tau**2 / (1 if scaling == "mean" else 6)
    entropy = float(-(global_p.exp() * global_p).sum()) * scale
    assert float(global_value - global_kl) == pytest.approx(entropy, rel=0.03)


def test_the_loss_is_the_mean_cross_entropy_with_the_draws() -> None:
    found, _ = drawn(3, 2, 1.0)
    dense = torch.randn(3, 6, 2, 3, generator=torch.Generator().manual_seed(2))
    loss = DistillationLoss("cskd", "soft", "soft", scaling="mean")
    parts = loss(
        Heads(torch.zeros(3, 6), torch.zeros(3, 6), dense), torch.full((3, 6), 1 / 6), found, 0.3
    )
    labels = found.drawn_spatial(0.3, 1.0)
    each = [torch.nn.functional.cross_entropy(dense, labels[:, n]) for n in range(2)]
    assert float(parts.spatial) == pytest.approx(float(sum(each)) / 2, rel=1e-6)
    assert float(parts.global_) == pytest.approx(math.log(6), rel=1e-6)


def test_unsupported_targets_are_refused() -> None:
    found, _ = drawn(1, 1, 1 / 3)
    for call in (
        found.hard_global,
        lambda: found.hard_spatial(0.5),
        lambda: found.global_log_probabilities(2.0),
        lambda: found.spatial_log_probabilities(0.5, 2.0),
    ):
        with pytest.raises(CacheError, match="encoding sampled does not support") as caught:
            call()
        assert "distill.global_kind and distill.spatial_kind to soft" in str(caught.value.action)
    with pytest.raises(CacheError, match="does not support this temperature") as caught:
        found.drawn_spatial(0.5, 1.0)
    assert f"distill.temperature to {1 / 3}," in str(caught.value)


def test_the_manifest_states_draws_and_temperature(tmp_path: Path) -> None:
    made = manifest(encodings=("sampled",), sampled=Sampled(3, 4))
    document = made.to_json()
    assert document["sampled"] == {"draws": 3, "temperature": 4.0}
    assert CacheManifest.from_json(document) == made
    assert "sampled" not in manifest(encodings=("dense",)).to_json()
    other = manifest(encodings=("sampled",), sampled=Sampled(3, 2))
    assert made.lineage() != other.lineage()
    assert made.conflicts(other) == [("sampled.temperature", 4.0, 2.0)]
    for bad, expected in (
        ({"sampled": {"draws": 9, "temperature": 1.0}}, "$.sampled.draws"),
        ({"sampled": {"draws": 1, "temperature": 0}}, "$.sampled.temperature"),
        ({"encodings": ["dense"]}, "$.sampled: found draws, expected none"),
    ):
        with pytest.raises(ManifestError) as caught:
            CacheManifest.from_json({**document, **bad})
        assert expected in str(caught.value)
    del document["sampled"]
    with pytest.raises(ManifestError, match=r"\$.sampled"):
        CacheManifest.from_json(document)


def test_a_cache_converted_from_dense_has_the_draws_of_its_seeds(tmp_path: Path) -> None:
    from cskd_pipeline.cache.convert import Conversion, convert

    make(tmp_path / "dense", encodings=("dense",))
    sampled = Sampled(2, 3.0)
    conversion = Conversion(["sampled"], sampled_draws=2, sampled_temperature=3.0)
    convert(tmp_path / "dense", tmp_path / "c", conversion)
    old, new = open_cache(tmp_path / "dense"), open_cache(tmp_path / "c")
    assert new.encodings == {"sampled": sampled}
    assert new.serving(["soft"], 3.0) == ["sampled"]
    assert new.serving(["soft"], 1.0) == new.serving(["hard"]) == []
    for view in range(old.views):
        for shard, count in enumerate(COUNTS):
            arrays = [
                torch.from_numpy(a) for a in old.rows("dense", view, shard, range(count)).values()
            ]
            live = sampled.encode(*arrays, old.seeds(view, shard))[LINES].numpy()
            assert np.array_equal(new.rows("sampled", view, shard, range(count))[LINES], live)
    with pytest.raises(CacheError, match="cannot be converted to sampled"):
        convert(tmp_path / "c", tmp_path / "d", Conversion(sampled_draws=1))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), Sampled(2, 3.0)),
        (("--sampled-draws", "4"), Sampled(4, 3.0)),
        (("--sampled-temperature", "1.5"), Sampled(2, 1.5)),
    ],
)
def test_convert_keeps_the_draws_and_temperature_that_are_not_given(
    tmp_path: Path, flags: tuple[str, ...], expected: Sampled
) -> None:
    make(tmp_path / "dense", encodings=("dense",))
    words = ("cache", "convert", tmp_path / "dense", tmp_path / "a", "--encoding", "dense")
    draws = ("--sampled-draws", 2, "--sampled-temperature", 3)
    assert world.cli(*words, "--encoding", "sampled", *draws) == 0
    words = ("cache", "convert", tmp_path / "a", tmp_path / "b", "--encoding", "sampled")
    assert world.cli(*words, *flags) == 0
    assert open_cache(tmp_path / "b").encodings == {"sampled": expected}


def test_the_noise_has_its_mean_and_spread() -> None:
    noise = gumbel_noise(np.arange(50, dtype=np.uint64), 0, 4000, 1.0, "cpu")
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    counts = Counter((noise * 65536 % 2).long().flatten().tolist())
    assert abs(counts[0] - counts[1]) < 5 * math.sqrt(noise.numel())


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(CacheError, match="the sampled encoding does not support so many"):
        Sampled().arrays(ResponseShape(70_000, 7, 7))


@pytest.mark.parametrize(("draws", "temperature"), [(0, 1.0), (9, 1.0), (1, 0.0), (1, math.nan)])
def test_draws_out_of_range_are_refused(draws: int, temperature: float) -> None:
    with pytest.raises(UsageError, match=f"{draws} draws at temperature {temperature}"):
        Sampled(draws, temperature)


def test_the_nearest_temperature_is_a_supported_one() -> None:
    assert [temperature_near(Sampled(1, tau)) for tau in (0.5, 1.0, 4.0)] == [0.5, 1.0, 4.0]
    assert [temperature_near(TopK(), tau) for tau in (0.5, 1.0, 4.0)] == [1.0, 1.0, 4.0]


def test_a_draw_takes_at_most_300_bytes(tmp_path: Path) -> None:
    """With 1,000 classes and 7 x 7 locations, not counting the file's shared index of 2 kB.

    Shared and regional logits have exponential tails: a location has 2.05 lines, 0.21 of them agree
    with the global label, and a draw takes 291 bytes. EfficientNet-Lite0 on 32 views of ImageNet's
    images had 2.10 and 2.16 lines, 0.21, and 289 and 304 bytes.
    """
    views, generator = 32, torch.Generator().manual_seed(0)
    shared, regions = torch.empty(views, 1000, 1, 1), torch.empty(views, 1000, 3, 3)
    shared.exponential_(1 / 1.1, generator=generator)
    regions.exponential_(1 / 1.2, generator=generator)
    spatial = shared + torch.nn.functional.interpolate(regions, size=(7, 7))
    spatial += torch.randn(views, 1000, 7, 7, generator=generator)
    made = manifest(
        dataset=replace(dataset((views,)), num_classes=1000, class_names=None),
        teacher=teacher(num_classes=1000, grid=(7, 7)),
    )
    responses = Responses(spatial.half(), spatial.mean((2, 3)).half(), made, "synthetic")
    rows, _ = encode(Sampled(), responses, torch.device("cpu"))
    store(tmp_path / "c", responses, {"sampled": rows})
    (file,) = [path for path in (tmp_path / "c" / LINES / "c").rglob("*") if path.is_file()]
    index = 1000 // 8 * 16 + 4
    assert 2.0 < (rows[LINES][:, :, 0] != ckf.UNUSED).sum(1).mean() < 2.2
    assert 250 < (file.stat().st_size - index) / views <= 300
