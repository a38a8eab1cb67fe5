"""Cumulative Spatial Knowledge Distillation in two stages that meet at a cache.

CSKD (ICCV 2023, arXiv 2307.08500) lets a CNN's response at every place supervise the patch token
there, fused with the CNN's global response, which counts more and more as training goes on (CKF).
Here the CNN runs once, in ``dump-teacher``; ``train`` reads what it said and never loads it.
This docstring is the tour; the rooms come in the order in which a picture passes through them.

1. **errors, progress, files, resources, plots** -- one exception tree worded for the person who
   must act; how long work is told; writes that happen whole or not at all; where recipes and
   schemas lie; plain data drawn.
2. **recipe, manifest** -- what a user asks for (TOML, frozen, checked) and what a data set or a
   cache says of itself (JSON, checked against the schemas in ``manifests/``, every problem at
   once).
3. **views** -- what a network sees. ``draw(seed, policy, width, height)`` gives parameters,
   ``render(image, params, policy)`` gives uint8 pixels, ``mixing`` pairs neighbours. A view is a
   pure function of (image bytes, seed, policy) and of its partner's; no global random state is
   touched.
4. **distill** -- what is learned, as tensors only. ``teacher`` gives spatial and global logits
   rounded to float16; ``ckf`` fuses them and finds the upper envelope of K lines in r; ``student``
   gives the class, distillation and dense predictions; ``losses`` compares the two.
5. **cache** -- what is stored: a zarr v3 group with leading axes (view, shard, offset).
   ``encodings`` has one file per way of storing the teacher's answer; ``writer`` commits units
   (block of views, tar shard), their digests last; ``reader`` knows nothing that is not done;
   ``convert`` makes a smaller cache of another, ``merge`` one of several parts; ``remote`` reads
   one where it is published.
6. **loading** -- what is read: ``shards`` (tars), ``plan`` (which sample in which view comes when:
   a pure function, the same for any number of ranks and workers), ``join`` (a cache's sample to the
   user's own tar, by key), ``batches`` (decode once, render, pair), ``device`` (uint8 to mixed
   floats).
7. **dump** and **train** -- the two stages, each one readable function over the rooms above. They
   never import each other. ``evaluate`` measures a checkpoint, **exporting** hands it on to timm
   and ONNX. **demo** runs all of it on small images, **study** compares what it is for, over seeds,
   both by this program's own ``commands``.
8. **bench**, **planning**, **verifying** -- what encodings cost and lose, and how fast the loader
   is beside others; what a dump or a run will cost, from a small part done for real; whether a
   cache is whole, and fits the images and the teacher at hand.
9. **showing** -- what there is to see, as HTML pages that need no network: real views of a cache
   with the teacher's labels over them, for every r; training runs side by side, and what their
   students say of every place.
10. **cli** -- thin typer commands over 7 to 9.

Imports point one way, from later rooms to earlier ones; ``tests/test_structure.py`` holds that.
"""

__version__ = "0.1.0"
