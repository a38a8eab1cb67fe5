"""The samples of a cache that a run trains on, and what it writes down of those it leaves out.

``left_out.csv`` in the run's folder lists them; ``join.json`` keeps what was found by reading every
image, so that a resumed run need not read them again.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from cskd_pipeline import documents
from cskd_pipeline.errors import ManifestError
from cskd_pipeline.files import write_json, write_text
from cskd_pipeline.loading.join import Join, LeftOut, find_differing
from cskd_pipeline.loading.replay import cache_of, renderer_of, replay, spread_views
from cskd_pipeline.ranks import Ranks
from cskd_pipeline.recipe import TrainRecipe
from cskd_pipeline.terminal import Terminal

RECORD = "join.json"
LIST = "left_out.csv"

Differing = dict[int, list[int]]
"""Shard -> offsets of samples whose image is not the cache's."""


def settle(
    recipe: TrainRecipe, found: Join, encoding: str, terminal: Terminal, ranks: Ranks
) -> Join:
    """Leave out of a join what the recipe says, tell it, and check a sample of what is left.

    With ``data.drift = "skip"`` every image is read once, each rank its share of the tars; a run
    that is resumed has the outcome in its folder.

    Raises:
        JoinError: no image is the cache's.
        ViewDriftError, CacheError: see :func:`check_sample`.
    """
    data = recipe.data
    if data.drift == "skip":
        found = found.without(_differing(recipe, found, terminal, ranks))
    left_out = found.missing + found.differing
    if left_out:
        listed = f"; {Path(recipe.run.out) / LIST} lists them" if recipe.run.out else ""
        terminal.warn(
            f"training without {left_out} samples of the cache's {found.samples.total}: "
            f"{found.missing} are not in the shards, {found.differing} have other images{listed}"
        )
    if found.unused:
        terminal.line(f"{found.unused} samples of the shards are not in the cache, and not used")
    if ranks.first:
        check_sample(found, data.check, data.drift, encoding, terminal)
    return found


def check_sample(found: Join, count: int, drift: str, encoding: str, terminal: Terminal) -> None:
    """Make ``count`` views again, as training will, and read what the teacher said of them.

    Every view is compared while training, too; here a misfit is told before anything is spent.

    Args:
        drift: as in the recipe; ``warn`` tells of what is unlike the cache, and goes on.

    Raises:
        ViewDriftError, JoinError: a view, or its image, is not the one the teacher saw.
        CacheError: what the teacher said is damaged, or not all there.
    """
    rows = spread_views(found, count)
    if not len(rows):
        return
    cache_of(found).gather(encoding, rows)  # raises where it is damaged
    replayed = replay(found, rows, terminal.progress)
    exact, same = int(replayed.exact.sum()), int(replayed.same_image.sum())
    wrong = rows[~replayed.exact]
    if len(wrong) and drift != "warn":
        renderer_of(found, strict=True).render(wrong)  # refuses them
    told = f"checked {len(rows)} views of the cache: {exact} come out bit for bit"
    if exact == len(rows):
        terminal.line(told)
    else:
        terminal.warn(
            f"{told}, {same - exact} differ by rounding, {len(rows) - same} are of other images"
        )


def write_join(found: Join, recipe: TrainRecipe) -> None:
    """What the run leaves out, in its folder."""
    out = Path(recipe.run.out)
    left_out = list(found.left_out())
    if left_out:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerows([LeftOut._fields, *left_out])
        write_text(out / LIST, text.getvalue())
    if recipe.data.drift == "skip":
        differing: Differing = {}
        for sample in left_out:
            if sample.reason == "other image":
                differing.setdefault(sample.shard, []).append(sample.offset)
        write_json(out / RECORD, _identity(found) | {"differing": differing})


def _differing(recipe: TrainRecipe, found: Join, terminal: Terminal, ranks: Ranks) -> Differing:
    """Known from the run's folder, or found by reading every image, every rank its share."""
    known = _known(recipe, found, terminal) if ranks.first and recipe.run.out else None
    known = ranks.gather(known)[0]
    if known is not None:
        return known
    mine = find_differing(found, part=ranks.rank, parts=ranks.world, progress=terminal.progress)
    differing: Differing = {}
    for part in ranks.gather(mine):
        for shard, offsets in part.items():
            differing[shard] = sorted([*differing.get(shard, ()), *offsets])
    return differing


def _known(recipe: TrainRecipe, found: Join, terminal: Terminal) -> Differing | None:
    """What an earlier start of this run found, if it was about this cache and these tars."""
    path = Path(recipe.run.out) / RECORD
    if not path.exists():
        return None
    record = documents.read(path)
    identity = _identity(found)
    if not isinstance(record, dict) or any(record.get(n) != v for n, v in identity.items()):
        terminal.line(f"{path} is about another cache or other shards: reading the images again")
        return None
    return _checked(record.get("differing"), found, path)


def _identity(found: Join) -> dict[str, Any]:
    """Of the cache, and of the tars by keys and length: a copy of them elsewhere is the same.

    Tars altered without becoming longer or shorter are not noticed here, but when their images are
    read for training.
    """
    cache = found.images.cache
    assert cache is not None
    tars = [[tar.keys_sha256, tar.path.stat().st_size] for tar in found.images.shards]
    return {"cache": cache.lineage, "shards": documents.sha256(tars)}


def _checked(differing: Any, found: Join, path: Path) -> Differing:
    counts = found.samples.counts
    here = {str(shard): count for shard, count in enumerate(counts)}
    fits = isinstance(differing, dict) and all(
        shard in here
        and isinstance(offsets, list)
        and all(type(n) is int and 0 <= n < here[shard] for n in offsets)
        and len(set(offsets)) == len(offsets)
        for shard, offsets in differing.items()
    )
    if not fits:
        raise ManifestError(
            path,
            ["$.differing: expected lists of offsets in the cache's shards"],
            action="delete the file: the images are read again then",
        )
    return {int(shard): offsets for shard, offsets in differing.items()}
