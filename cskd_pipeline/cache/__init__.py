"""The teacher cache: a zarr v3 group with leading axes (view, shard, offset).

1. ``manifest`` -- the JSON that determines everything else, validated by its schema and by code;
   ``layout`` -- the arrays that follow from it, and the files of each unit (block of views, tar
   shard).
2. ``chunks`` -- one array: geometry and ``zarr.json``, encoding of files, decoding of single
   chunks, checksums. ``digests`` -- SHA-256 from a unit's files up to the whole cache.
3. ``store`` -- a folder opened as a cache: manifest, finished units, chunks; errors name array,
   unit and file. ``folders`` -- its files, local or at a URL; ``remote_files`` -- remote files of
   caches and shards, fetched by ``transfers`` into local copies (``mirror``).
4. ``writer`` -- commits units: writes temporary files, syncs and renames them (``durable``), the
   record last; ``units`` -- the contents of a unit and its number of views; ``claims`` -- which
   process writes which unit.
5. ``reader`` -- reads finished units only and verifies every file once; ``slabs`` decodes and
   caches rows, ``key_index`` finds samples by key, ``choosing`` picks the encoding for a loss.
6. ``convert`` -- one cache from another, smaller or in fewer files; ``merge`` -- one from several;
   ``upgrade`` -- version 1 to 2, in place; ``omitted`` -- the list of samples that a dump skipped,
   copied along with the cache.
7. ``info`` -- a description of a cache as a dictionary, ``summary`` as half a screen; ``check`` --
   verification of a cache without shards or teacher.

A missing, truncated or altered file raises an error; it never reads as fill values. torch is
imported only when an encoding receives a tensor. ``manifests/cache-format.md`` specifies the format
for readers in any language.
"""
