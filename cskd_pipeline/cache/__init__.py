"""Storage: the teacher cache, a zarr v3 group with leading axes (view, shard, offset).

1. ``manifest`` -- the JSON that decides everything, checked by its schema and beyond;
   ``layout`` -- which arrays and files follow from it, and how a unit (block of views, tar shard)
   maps to files of its own.
2. ``chunks`` -- one array: geometry and ``zarr.json``, a file of chunks encoded, one chunk decoded,
   every checksum compared. ``digests`` -- SHA-256 from a unit's files up to the whole cache.
3. ``store`` -- a folder as a cache: manifest, finished units, chunks; errors name array, unit and
   file. ``folders`` -- its files, here or at a URL; ``remote_files`` -- files at a URL, of caches
   and of shards, by ``transfers`` and through copies on this machine (``mirror``).
4. ``writer`` -- commits units: files written beside their final names, synced, renamed
   (``durable``), their record last; ``units`` has what a unit holds, gathers it, and
   says how many views it had best have; ``claims`` say which process makes which.
5. ``reader`` -- sees finished units only, and compares every file with its record once; ``slabs``
   decodes rows and keeps what fits, ``key_index`` finds samples by key, ``choosing`` picks the
   encoding that serves a loss.
6. ``convert`` -- a cache of another, smaller or in fewer files; ``merge`` -- one of several;
   ``upgrade`` -- version 1 to 2, in place; ``omitted`` -- the list of samples that a dump left
   out, which goes along.
7. ``info`` -- a cache described as a dictionary, ``summary`` in half a screen; ``check`` -- a cache
   verified from nothing but itself.

A file that is missing, cut short or altered raises an error; it never reads as fill values.
Nothing here imports torch before an encoding meets a tensor. ``manifests/cache-format.md`` is the
specification, for readers in any language.
"""
