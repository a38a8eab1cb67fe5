"""Cumulative Spatial Knowledge Distillation in two stages that meet at a cache.

CSKD (ICCV 2023, arXiv 2307.08500) lets a CNN's response at every location supervise the patch token
there, fused with the CNN's global response, which counts more and more as training goes on (CKF).
Here the CNN runs once, in ``dump-teacher``; ``train`` reads its cached logits and never loads it.
This docstring is the tour. The rooms stand in the order of their imports: each uses only those
above it.

1. **errors** -- one exception tree: where, what was found, what was expected, what to do.
2. **runtime** -- what any long job needs: atomic writes, signals, devices, distributed ranks,
   console and progress, JSON documents checked against schemas, classes compared by name.
3. **views** -- what a network sees. ``draw(seed, policy, width, height)`` gives parameters,
   ``render(image, params, policy)`` gives uint8 pixels, ``mixing`` pairs neighbours. A view is a
   pure function of (image bytes, seed, policy) and of its partner's; no global random state is
   touched.
4. **config** -- recipes: TOML, complete, frozen, checked; every problem at once.
5. **models** -- ``teacher`` gives spatial and global logits rounded to float16; ``student`` gives
   class, distillation and dense logits; ``weights`` and ``checkpoint`` read files without running
   anything in them; ``train_state`` is what a run goes on from.
6. **distill** -- tensors only. ``ckf`` fuses the logits and finds the upper envelope of K lines in
   r; ``losses`` compares student and ``targets``; ``encodings`` has one file for each way of
   storing a response.
7. **cache** -- what is stored: a zarr v3 group with leading axes (view, shard, offset).
   ``manifest`` decides all of it; ``writer`` commits units (block of views, tar shard), their
   digests last; ``reader`` refuses what is not finished, or not what was written; ``convert``,
   ``merge`` and ``upgrade`` make caches of caches; ``folders`` read one where it is published.
8. **data** -- what is read: ``shards`` (tars), ``plan`` (which sample comes when, in which view: a
   pure function, the same for any number of ranks and workers), ``join`` (a cache's sample to the
   user's own tar, by key), ``batches`` (decode once, render, pair), ``assemble`` (uint8 to mixed
   floats).
9. **pipeline** -- the two stages, ``dump`` and ``train``, which never import each other, and
   ``evaluate``.
10. **tools** -- what stands on the stages and only the command line uses: ``bench``, ``estimate``
    (``plan``), ``verify``, ``report`` (pages and plots), ``export``, ``study``, ``demo``.
11. **cli** -- thin typer commands.

As a library: the names of ``PUBLIC`` below, each from the room that it belongs to. ``docs/api.md``
has them with their docstrings, ``docs/examples`` the loops that use them::

    cache = cskd_pipeline.open_cache("cache")
    targets = cache.targets([(0, key) for key in cache.keys(0)])
    targets.hard_spatial(r=0.5)                             # (n, h, w) int64

``tests/test_structure.py`` holds the direction of the imports.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that has it, imported when the name is first used: ``import
# cskd_pipeline`` costs nothing. ``__init__.pyi`` says the same to type checkers, and docs/api.md to
# people; a test holds the three together.
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
