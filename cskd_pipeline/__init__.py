"""Cumulative Spatial Knowledge Distillation in two stages that share a cache of teacher logits.

CSKD (ICCV 2023, arXiv 2307.08500) supervises each patch token of a ViT with a CNN's response at the
same location, fused with the CNN's global response, whose weight grows during training (CKF).
Here the CNN runs once, in ``dump-teacher``; ``train`` reads its cached logits and never loads it.
The subpackages, in import order (each imports only those above it):

1. **errors** -- one exception tree: location, found, expected, what to do.
2. **runtime** -- services for any long job: atomic writes, signals, devices, distributed ranks,
   console and progress, JSON documents checked against schemas, classes compared by name.
3. **views** -- network inputs. ``draw(seed, policy, width, height)`` returns parameters,
   ``render(image, params, policy)`` returns uint8 pixels, ``mixing`` pairs neighbours. A view is a
   pure function of image bytes, seed and policy, and of its partner's; it uses no global random
   state.
4. **config** -- recipes: complete, frozen TOML, with every problem reported at once.
5. **models** -- ``teacher`` returns spatial and global logits rounded to float16; ``student``
   returns class, distillation and dense logits; ``weights`` and ``checkpoint`` read files without
   executing anything in them; ``train_state`` is the state that a run resumes from.
6. **distill** -- tensors only. ``ckf`` fuses the logits and finds the upper envelope of K lines in
   r; ``losses`` compares student and ``targets``; ``encodings`` has one file per encoding of a
   response.
7. **cache** -- storage: a zarr v3 group with leading axes (view, shard, offset). Its layout follows
   from ``manifest``; ``writer`` commits units (block of views, tar shard), digests last; ``reader``
   refuses unfinished and altered units; ``convert``, ``merge`` and ``upgrade`` derive caches from
   caches; ``folders`` opens local and remote ones.
8. **data** -- input: ``shards`` (tars), ``plan`` (which sample comes when, in which view: a pure
   function, independent of the number of ranks and workers), ``join`` (matches a cache's samples
   with the user's tars by key), ``batches`` (decode once, render, pair), ``assemble`` (uint8 to
   mixed floats).
9. **pipeline** -- the two stages, ``dump`` and ``train``, which never import each other, and
   ``evaluate``.
10. **tools** -- commands built on the stages: ``bench``, ``estimate`` (``plan``), ``verify``,
    ``report`` (pages and plots), ``export``, ``study``, ``demo``.
11. **cli** -- thin typer commands.

The library consists of the names in ``PUBLIC`` below. ``docs/api.md`` has their docstrings,
``docs/examples`` shows loops that use them::

    cache = cskd_pipeline.open_cache("cache")
    targets = cache.targets([(0, key) for key in cache.keys(0)])
    targets.hard_spatial(r=0.5)                             # (n, h, w) int64

``tests/test_structure.py`` enforces the import order.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> its module, imported on first use so that ``import cskd_pipeline`` costs nothing.
# ``__init__.pyi`` lists the same names for type checkers and docs/api.md for people; a test keeps
# the three consistent.
PUBLIC = {
    "Cache": "cskd_pipeline.cache.reader",
    "CacheSection": "cskd_pipeline.config.sections",
    "CachedBatch": "cskd_pipeline.data.cached_loader",
    "CachedLoader": "cskd_pipeline.data.cached_loader",
    "CskdError": "cskd_pipeline.errors",
    "DistillationLoss": "cskd_pipeline.distill.losses",
    "Encoding": "cskd_pipeline.distill.encodings.base",
    "Heads": "cskd_pipeline.models.student",
    "Loading": "cskd_pipeline.data.unit_views",
    "LogitTargets": "cskd_pipeline.distill.targets",
    "LossParts": "cskd_pipeline.distill.losses",
    "Targets": "cskd_pipeline.distill.targets",
    "TeacherInfo": "cskd_pipeline.cache.manifest",
    "TeacherViews": "cskd_pipeline.data.full_batches",
    "TrainingViews": "cskd_pipeline.data.training_views",
    "UnitWriter": "cskd_pipeline.pipeline.unit_writer",
    "ViewPolicy": "cskd_pipeline.views.policy",
    "WriteOptions": "cskd_pipeline.pipeline.write_cache",
    "ckf_ratio": "cskd_pipeline.distill.ckf",
    "dense_logits": "cskd_pipeline.models.student",
    "inference_logits": "cskd_pipeline.models.student",
    "open_cache": "cskd_pipeline.cache.reader",
    "open_views": "cskd_pipeline.data.training_views",
    "register_encoding": "cskd_pipeline.distill.encodings",
    "register_policy": "cskd_pipeline.views.policy",
    "replay_view": "cskd_pipeline.data.replay",
    "write_cache": "cskd_pipeline.pipeline.write_cache",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
