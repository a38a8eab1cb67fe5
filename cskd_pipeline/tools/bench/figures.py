"""The reports of ``bench all`` as lines of one Markdown table, ready for a README."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cskd_pipeline.tools.bench.timing import Spread


class Figure(NamedTuple):
    """Hold a measured figure; ``goal`` is empty where there is none, then ``reached`` is None."""

    what: str
    found: str
    goal: str = ""
    reached: bool | None = None


COLUMNS = ("measured", "found", "goal", "reached")


def of_teacher(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how many values differ that must not."""
    texts = {
        "companions": "logits that change with the other views of a batch",
        "cache": "hard labels of a cache that are not the live teacher's",
    }
    for name, text in texts.items():
        found = report[name]
        counts = f"{found['differ']:,} of {found['compared']:,}"
        what = f"{text}: {report['teacher']}, {report['precision']}"
        yield Figure(what, counts, "0", found["differ"] == 0)


def of_step(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield a student's step from a cache against a plain one, and against a live teacher's."""
    amp, goals = report["amp"], report["goal"]
    for student, found in report["students"].items():
        about = f"{student}, {amp}, batches of {report['batch_size']}"
        rates, ratios = found["images_per_second"], found["ratio"]
        yield _ratio(
            f"{about}: step from a cache / plain step", ratios["cskd"], at_most=goals["cskd"]
        )
        if "live" in ratios:
            what = f"{about}: step with {report['teacher']} run live / step from a cache"
            yield _ratio(what, ratios["live"], at_least=goals["live"].get(student))
        each = ", ".join(f"{name} {rate['median']:,.0f}" for name, rate in rates.items())
        yield Figure(f"{about}: images a second", each)


def of_dump(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the dump against the bare teacher, and which side is its limit."""
    about = f"{report['teacher']}, {report['precision']}, {report['workers']} loader processes"
    ratios, goals, rates = report["ratio"], report["goal"], report["views_per_second"]
    yield _ratio(
        f"{about}: dump / bare teacher",
        ratios["dump_to_teacher"],
        at_least=goals["dump_to_teacher"],
    )
    yield _ratio(
        "loader, one core: 10 views a block / 1 view", ratios["blocks"], at_least=goals["blocks"]
    )
    names = {"dump": "dump", "teacher": "bare teacher", "loader": "loader"}
    each = ", ".join(f"{label} {rates[name]['median']:,.0f}" for name, label in names.items())
    yield Figure(f"{about}: views a second", f"{each}; the limit is the {report['limit']}")


def of_loader(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the loader against timm's on one core, and its rate on all."""
    for name, found in report["ratio"].items():
        views = name.removeprefix("repeats_")
        rate = report["images_per_second_per_core"][name]["median"]
        what = f"loader / timm's, one core, {views} views a decoded image, {report['size']} px"
        figure = _ratio(what, found, at_least=report["goal"][name])
        yield figure._replace(found=f"{figure.found}; {rate:,.0f} images/s")
    for name, rate in report["all_cores"].items():
        views = name.removeprefix("repeats_")
        what = f"loader, {report['cores']} cores, {views} views a decoded image: images a second"
        yield Figure(what, f"{rate:,.0f}")


def _ratio(
    what: str, found: Spread, *, at_most: float | None = None, at_least: float | None = None
) -> Figure:
    median, low, high = found.values()
    assert median is not None
    text = f"{median:.3g} ({low:.3g} to {high:.3g})"
    if at_most is not None:
        return Figure(what, text, f"≤ {at_most:g}", median <= at_most)
    if at_least is not None:
        return Figure(what, text, f"≥ {at_least:g}", median >= at_least)
    return Figure(what, text)


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Return the cells of :data:`COLUMNS`."""
    marks = {True: "yes", False: "no", None: ""}
    return [(*figure[:3], marks[figure.reached]) for figure in figures]
