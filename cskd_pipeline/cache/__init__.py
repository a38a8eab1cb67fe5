"""The teacher cache: a zarr v3 group with leading axes (view, shard, offset). The map of this room:

1. **encodings** -- what is stored of an answer: ``dense`` keeps the logits, ``envelope`` what hard
   labels need at every CKF ratio. One file each behind one interface, which names arrays, makes
   rows from logits on the device, and makes targets for the losses from rows.
2. **layout** -- the manifest decides everything: which arrays there are (``arrays``: geometry,
   ``zarr.json``, file names) and how a unit (block of views, tar shard) maps to files of its own.
3. **chunks** -- bytes: a file of chunks encoded, one chunk decoded, every checksum looked at.
4. **store** -- a folder as a cache: manifest, units done, chunks; errors name array, unit and file.
5. **writer** -- commits units: files written beside their place, synced, renamed (``durable``);
   their record (``digests``) after all others. **reader** -- sees finished units, compares every
   file with its record once, keeps decoded slabs (``lru``).
   **remote** -- the same of a URL, through copies on this machine (``mirror``).
6. **info** -- what ``cskd-pipeline cache info`` tells (``summary``: to a person); **card** -- the
   README of a published cache.
7. **convert** -- a smaller cache of another; **merge** -- one of several (``parts``: whether they
   belong together); **verify** -- everything looked at, everything wrong told.

A file that is missing, cut short or altered raises ``CacheError``; it never reads as fill values.
Nothing here imports torch before an encoding meets a tensor. ``manifests/cache-format.md`` is the
specification, for readers in any language.
"""
