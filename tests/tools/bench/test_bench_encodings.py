"""``bench encodings`` agrees with numpy on the same logits, and with the sizes of files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.errors import CacheError
from cskd_pipeline.tools.bench import bench_encodings as bench
from cskd_pipeline.tools.bench.responses import Responses, encode, from_cache, from_teacher, store
from tests.cache.factories import CLASSES, COUNTS, HEIGHT, VIEWS, WIDTH, fill, make, manifest, tree
from tests.pipeline import world
from tests.pipeline.conftest import World

CPU = torch.device("cpu")
RATIOS = np.arange(21) / 20


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Responses:
    """Responses of 40 views with random logits, spread enough for a peaked softmax."""
    path = tmp_path_factory.mktemp("bench") / "cache"
    make(path, encodings=("dense",))
    drawn = from_cache(path, 40)
    return Responses(drawn.spatial * 3, drawn.global_ * 3, drawn.manifest, "toy")


@pytest.fixture(scope="module")
def report(responses: Responses) -> dict[str, Any]:
    threads = torch.get_num_threads()
    report = bench.bench_encodings(responses, device=CPU)
    assert torch.get_num_threads() == threads
    return report


def distribution(d: np.ndarray, g: np.ndarray, r: float, tau: float) -> np.ndarray:
    values = np.exp((r * d + (1 - r) * g[:, :, None, None]) / tau)
    return values / values.sum(1, keepdims=True)


def restored_q8(responses: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Return logits after rounding, as defined on the format's page."""

    def rounded(x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        flat = centred.reshape(len(x), -1)
        step = np.maximum((flat.max(1) - flat.min(1)) / 254, 1 / 8)
        step = step.reshape(-1, *[1] * (x.ndim - 1))
        low = flat.min(1).reshape(step.shape)
        return np.asarray(np.round((centred - low) / step) * step)

    d, g = responses.spatial.float().numpy(), responses.global_.float().numpy()
    return rounded(d).astype(np.float64), rounded(g).astype(np.float64)


def test_divergences_match_numpy(responses: Responses, report: dict[str, Any]) -> None:
    d, g = responses.spatial.double().numpy(), responses.global_.double().numpy()
    near = restored_q8(responses)
    for tau in (1.0, 4.0):
        divergences = []
        for r in RATIOS:
            p, q = distribution(d, g, r, tau), distribution(*near, r, tau)
            divergences.append((p * np.log(p / q)).sum(1).ravel())
        values = np.concatenate(divergences)
        kl = report["encodings"]["dense-q8"]["kl"][f"{tau:g}"]
        assert kl["mean"] == pytest.approx(values.mean(), rel=0.01, abs=1e-7)
        assert kl["p99"] == pytest.approx(np.quantile(values, 0.99), rel=0.03)
        assert kl["p99"] > 1.5 * kl["mean"]


def test_the_divergence_is_from_the_logits_to_the_approximation() -> None:
    """The reverse divergence differs if the two are far apart."""
    generator = torch.Generator().manual_seed(0)
    d, near = (torch.randn(1, 5, 1, 1, generator=generator).half() * 3 for _ in range(2))
    exact, approximate = LogitTargets(d, d[..., 0, 0]), LogitTargets(near, near[..., 0, 0])
    p, q = (
        distribution(x.double().numpy(), x[..., 0, 0].double().numpy(), 0.5, 2.0) for x in (d, near)
    )
    expected, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert abs(expected - reverse) > 0.01
    kl = float(bench._divergence(exact, approximate, 0.5, 2.0))
    assert kl == pytest.approx(expected, rel=1e-4)


def test_agreement_matches_numpy(responses: Responses, report: dict[str, Any]) -> None:
    d, g = responses.spatial.double().numpy(), responses.global_.double().numpy()
    near = restored_q8(responses)
    same = [
        (distribution(d, g, r, 1.0).argmax(1) == distribution(*near, r, 1.0).argmax(1)).mean()
        for r in RATIOS
    ]
    agreement = report["encodings"]["dense-q8"]["hard_agreement"]
    assert agreement == pytest.approx(np.mean(same), abs=0.003)  # ties may be resolved differently
    assert agreement < 1


def test_the_cosine_of_gradients_matches_their_closed_form(
    responses: Responses, report: dict[str, Any]
) -> None:
    """The gradient of the soft loss of equal logits is proportional to 1/K - p."""
    d, g = responses.spatial.double().numpy(), responses.global_.double().numpy()
    near = restored_q8(responses)
    cosines = []
    for r in RATIOS[::5]:
        for start in range(0, len(responses), 32):
            part = slice(start, start + 32)
            a = (1 / CLASSES - distribution(d[part], g[part], r, 1.0)).ravel()
            b = (1 / CLASSES - distribution(near[0][part], near[1][part], r, 1.0)).ravel()
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    cosine = report["encodings"]["dense-q8"]["gradient_cosine"]
    assert cosine["soft"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert cosine["soft"] < 1 - 1e-6
    assert cosine["hard"] is None


def test_exact_encodings_lose_nothing(report: dict[str, Any]) -> None:
    dense, envelope = (report["encodings"][name] for name in ("dense", "envelope"))
    assert dense["hard_agreement"] == envelope["hard_agreement"] == 1.0
    assert [dense["kl"][tau] for tau in ("1", "4")] == [{"mean": 0.0, "p99": 0.0}] * 2
    assert envelope["kl"] is None
    assert dense["gradient_cosine"] == pytest.approx({"hard": 1.0, "soft": 1.0}, abs=1e-12)
    assert envelope["gradient_cosine"]["hard"] == pytest.approx(1.0, abs=1e-12)
    assert envelope["gradient_cosine"]["soft"] is None


def test_bias_and_variance_are_separated(report: dict[str, Any]) -> None:
    """Draws vary around the correct mean; hard labels do not vary, and are biased."""
    of = {name: m["soft_bias_and_variance"] for name, m in report["encodings"].items()}
    for r in ("1", "0.5", "0"):
        assert of["dense"][r] == pytest.approx({"one": 1.0, "mean": 1.0}, abs=1e-9)
        assert of["sampled"][r]["one"] < of["sampled"][r]["mean"]
        loss = {name: 1 / of["sampled"][r][name] ** 2 - 1 for name in ("one", "mean")}
        assert loss["mean"] < loss["one"] / 8  # without bias, loss["one"] / 32
        assert of["envelope"][r]["one"] == of["envelope"][r]["mean"] < of["sampled"][r]["mean"]
    assert report["encodings"]["sampled"]["kl"] is None
    assert report["encodings"]["sampled"]["hard_agreement"] is None


def test_bytes_per_view_are_the_sizes_of_files(
    responses: Responses, report: dict[str, Any], tmp_path: Path
) -> None:
    rows = {name: encode(ENCODINGS[name], responses, CPU)[0] for name in ENCODINGS}
    assert store(tmp_path / "c", responses, rows) == len(responses)
    files = tree(tmp_path / "c")
    for name in ENCODINGS:
        size = sum(
            len(data) for key, data in files.items() if key.startswith(f"{name}/") and "/c/" in key
        )
        entry = report["encodings"][name]
        assert entry["bytes_per_view"] == pytest.approx(size / len(responses), abs=0.01)
        assert entry["encode_ms"] > 0
        assert entry["decode_ms"] > 0
    assert report["views"] == 40
    assert report["grid"] == [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("length", "block", "used"), [(None, 1, 40), (10, 3, 30), (13, 1, 39), (50, 4, 40)]
)
def test_responses_are_stored_in_shards_of_the_given_length(
    responses: Responses, tmp_path: Path, length: int | None, block: int, used: int
) -> None:
    rows = {"envelope": encode(ENCODINGS["envelope"], responses, CPU)[0]}
    path = tmp_path / "c"
    assert store(path, responses, rows, shard_length=length, view_block=block) == used
    reader = open_cache(path)
    assert reader.views * sum(reader.counts) == used
    assert set(reader.counts) == {min(length or 40, 40)}
    first = reader.rows("envelope", 0, 0, range(reader.counts[0]))["envelope/global_label"]
    assert np.array_equal(first, rows["envelope"]["envelope/global_label"][: len(first)])


def test_responses_from_a_cache_are_rows_of_its_finished_units(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    fill(writer, writer.todo(shards=[2], views=range(2, 4)))
    reader = open_cache(tmp_path / "c")
    finished = {
        row.tobytes()
        for view in (2, 3)
        for row in reader.rows("dense", view, 2, range(COUNTS[2]))["dense/spatial"]
    }
    drawn, again = (from_cache(tmp_path / "c", 30).spatial for _ in range(2))
    assert torch.equal(drawn, again)
    assert {row.tobytes() for row in drawn.numpy()} == finished


def test_a_cache_without_logits_or_units_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", encodings=("envelope",))
    with pytest.raises(CacheError, match="has no logits to compare") as caught:
        from_cache(tmp_path / "a", 3)
    assert "--encoding dense" in str(caught.value)
    CacheWriter.create(tmp_path / "b", manifest(views=VIEWS))
    with pytest.raises(CacheError, match="no finished unit"):
        from_cache(tmp_path / "b", 3)


def test_responses_from_a_teacher_equal_its_dump(small: World, tmp_path: Path) -> None:
    """Without mixing, a view depends only on its own seed, not on the length of its shard."""
    from cskd_pipeline.pipeline.dump import dump_teacher

    recipe = world.dump_recipe(small.shards, tmp_path / "c", ["views.mix=0.0"], views=2)
    dump_teacher(recipe)
    responses = from_teacher(recipe, 24)
    assert responses.spatial.shape == (24, 4, 4, 4)
    reader = open_cache(tmp_path / "c")
    dumped = {
        row.tobytes()
        for shard, count in enumerate(reader.counts)
        for row in reader.rows("dense", 0, shard, range(count))["dense/spatial"]
    }
    assert {row.tobytes() for row in responses.spatial.numpy()} <= dumped
    assert len(from_teacher(recipe, 150)) == 150  # two views of 96 samples


# --- plot and command -----------------------------------------------------------------------------


def test_the_plot_shows_loss_against_bytes(report: dict[str, Any], tmp_path: Path) -> None:
    plot = bench.encodings_plot(report)
    plot.figure.draw_without_rendering()
    [axes] = plot.figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "symlog")
    e = report["encodings"]
    kl, hard = [n for n in e if e[n]["kl"]], [n for n in e if e[n]["kl"] is None]
    points = [
        dict(zip(names, axes.transData.transform(curve.get_xydata()), strict=True))
        for curve, names in zip(axes.lines, (kl, kl, [n for n in hard if n != "sampled"]),
                                strict=True)
    ]  # fmt: skip
    one, four, labels = points  # tau = 1, tau = 4, hard labels
    across = {name: x for name, (x, _) in (one | labels).items()}
    assert sorted(across, key=across.__getitem__) == sorted(
        across, key=lambda name: e[name]["bytes_per_view"]
    )
    for name in kl:
        assert four[name][0] == one[name][0]
    assert one["dense-q8"][1] > four["dense-q8"][1]  # more loss at tau = 1
    assert one["topk"][1] > four["topk"][1]
    lossy = min(curve["dense-q8"][1] for curve in (one, four))
    assert one["dense"][1] == four["dense"][1] == labels["envelope"][1] < lossy
    plot.write(tmp_path / "t.svg")
    text = list(ET.parse(tmp_path / "t.svg").getroot().itertext())
    shown = [name for name in ENCODINGS if name != "sampled"]  # which has neither labels nor a KL
    for name in (*shown, "exact", "hard labels", "KL at temperature 1", "KL at temperature 4"):
        assert text.count(name) == 1, name


@pytest.mark.parametrize("names", [["sampled"], ["topk"], ["dense"]])
def test_a_single_encoding_is_plotted(
    report: dict[str, Any], tmp_path: Path, names: list[str]
) -> None:
    some = {**report, "encodings": {name: report["encodings"][name] for name in names}}
    bench.encodings_plot(some).write(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_names_in_the_plot_are_escaped(report: dict[str, Any]) -> None:
    entry = report["encodings"]["dense"]
    drawn = bench.encodings_plot({**report, "encodings": {"<script>&$x^2$": entry}}).svg()
    assert "<script>" not in drawn
    assert "<script>&$x^2$" in list(ET.fromstring(drawn).itertext())


def test_the_command_prints_json_or_a_table(
    small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg, png = tmp_path / "p.svg", tmp_path / "p.png"
    words = ("bench", "encodings", small.cache, "--views", 20, "--device", "cpu")
    assert world.cli(*words, "--plot", svg, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["encodings"]) == list(ENCODINGS)
    assert (report["views"], report["classes"], report["grid"]) == (20, 4, [4, 4])
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert world.cli(*words, "--encoding", "topk", "--plot", png, "--quiet") == 0
    with Image.open(png) as image:
        assert (image.format, image.getpixel((0, 0))[:3]) == ("PNG", (255, 255, 255))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line][1:] == [
        "encoding", "topk", "cosine", "encoding", "topk",
    ]  # fmt: skip


def test_a_cache_may_be_given_with_a_pinned_digest(
    small: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--views", 4, "--device", "cpu", "--encoding", "topk", "--json")
    pinned = f"{small.cache}@sha256:{open_cache(small.cache).digest()}"
    assert world.cli("bench", "encodings", pinned, *words) == 0
    assert json.loads(capsys.readouterr().out)["views"] == 4
    assert world.cli("bench", "encodings", f"{small.cache}@sha256:{'0' * 64}", *words) == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("CACHE", "--plot", "p.pdf"), 2, "ends in .svg or .png"),
        (("resnet10t",), 2, "--shards SHARDS (or a cache's folder)"),
        (("CACHE", "--encoding", "topp"), 1, "--encoding topk"),
        (("no_such_net", "--shards", "SHARDS"), 1, "no_such_net"),
    ],
)
def test_invalid_arguments_are_refused(
    small: World,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    paths = {"CACHE": small.cache, "SHARDS": small.shards}
    assert world.cli("bench", "encodings", *(paths.get(w, w) for w in words)) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
