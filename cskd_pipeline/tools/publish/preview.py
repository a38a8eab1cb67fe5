"""A sample of a cache's views as a Parquet table, for the Hub's viewer and data frames."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.join import Join
from cskd_pipeline.distill.encodings import temperature_near
from cskd_pipeline.distill.targets import SampledTargets
from cskd_pipeline.errors import JoinError
from cskd_pipeline.tools.report.gallery import class_names, ground_truth, replay_views, with_images
from cskd_pipeline.tools.report.labels import read_labels, read_targets

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "preview.parquet"
PIXELS = 112  # of a thumbnail's longer side


@dataclass(frozen=True)
class Column:
    """A column of the preview.

    Args:
        type: Arrow type name, or ``image`` for the Hub's struct of bytes and path.
        meaning: description for the card and ``croissant.json``, one line.
    """

    name: str
    type: str
    meaning: str


COLUMNS = (
    Column("key", "string", "sample key in its tar"),
    Column("view", "int32", "view number"),
    Column("label", "int32", "class of the sample"),
    Column("class_name", "string", "name of the class, if known"),
    Column("share", "float32", "fraction of the view that shows the sample's own image"),
    Column("partner_label", "int32", "class of the mixed-in image; label if there is none"),
    Column("teacher_label", "int32", "top-1 class of the teacher's global logits"),
    Column("teacher_class_name", "string", "name of the teacher's class, if known"),
    Column("teacher_probability", "float32", "its softmax probability, if logits are stored"),
    Column("agreement", "float32", "fraction of locations whose teacher label at r = 1 is label"),
    Column("thumbnail", "image", f"the view, at most {PIXELS} pixels wide"),
)


def make_table(cache: Cache, rows: np.ndarray, found: Join | None = None) -> pa.Table:
    """Return the preview table of ``rows``: (n, 3) view, shard, offset, n > 0.

    Args:
        found: join with the user's images, to add thumbnails; views without images are dropped.
    """
    import pyarrow as pa

    thumbnails: list[bytes] = []
    if found is not None:
        rows, thumbnails = _thumbnails(found, rows)
    data = cache.manifest.dataset
    names = class_names(cache) if data.class_names else [None] * data.num_classes
    truth = ground_truth(cache, rows)
    labels, probabilities = _global(cache, rows)
    agreement = (read_labels(cache, rows).at(1.0) == truth.own[:, None, None]).mean(axis=(1, 2))
    values: dict[str, Any] = {
        "key": [cache.keys(shard)[offset] for _, shard, offset in rows.tolist()],
        "view": rows[:, 0],
        "label": truth.own,
        "class_name": [names[k] for k in truth.own],
        "share": truth.share,
        "partner_label": truth.partner,
        "teacher_label": labels,
        "teacher_class_name": [names[k] for k in labels],
        "teacher_probability": probabilities,
        "agreement": agreement,
    }
    if found is not None:
        values["thumbnail"] = [{"bytes": data, "path": None} for data in thumbnails]
    columns = [column for column in COLUMNS if column.name in values]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {c.name: image if c.type == "image" else pa.type_for_alias(c.type) for c in columns}
    features = {
        c.name: {"_type": "Image"} if c.type == "image" else {"dtype": c.type, "_type": "Value"}
        for c in columns
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(types.items()), metadata=metadata)
    arrays = [pa.array(values[name], type_, from_pandas=True) for name, type_ in types.items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def columns_of(table: pa.Table) -> list[Column]:
    """Return the preview's columns: thumbnails are optional."""
    return [column for column in COLUMNS if column.name in table.column_names]


def parquet(table: pa.Table) -> bytes:
    """Return the table as a Parquet file."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _global(cache: Cache, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's global labels, (n,) int64, and their probabilities, (n,), or NaN.

    Labels come from an exact encoding if the cache has one; from draws alone, they are the most
    frequent class.
    """
    hard, soft = cache.serving({"hard"}), cache.serving({"soft"}, None)
    labels, probabilities = None, torch.full((len(rows),), torch.nan)
    if hard:
        labels = torch.cat([t.hard_global() for t in read_targets(cache, hard[0], rows)])
    if soft:
        tau = temperature_near(cache.encodings[soft[0]])
        tops, start = list[Tensor](), 0
        for targets in read_targets(cache, soft[0], rows):
            if isinstance(targets, SampledTargets):
                top = targets.drawn_global(tau).mode(1).values
            else:
                logs = targets.global_log_probabilities(tau)
                top = logs.argmax(1)
                if tau == 1:
                    part = slice(start, start + len(top))
                    shown = top if labels is None else labels[part]
                    probabilities[part] = logs.gather(1, shown[:, None])[:, 0].exp()
            tops.append(top)
            start += len(top)
        labels = torch.cat(tops) if labels is None else labels
    assert labels is not None
    return labels.numpy(), probabilities.numpy()


def _thumbnails(found: Join, rows: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Return the views whose images are the cache's, and the bytes of their thumbnails."""
    rows = with_images(found, rows)
    views = replay_views(found, rows) if len(rows) else []
    if not any(view.same for view in views):
        raise JoinError(
            "no thumbnails: no view of the preview has its images in the shards",
            where=found.cache.path,
            found=f"{found.missing} of {found.samples.total} samples missing",
            action="pass the shards that the cache was made from, or leave out --thumbnails",
        )
    same = [view.same for view in views]
    return rows[same], [view.encode(PIXELS)[1] for view in views if view.same]
