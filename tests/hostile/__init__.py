"""Untrusted input runs no code, escapes no folder and exhausts no memory: threats and tests.

A refused command exits with code 1 or 2 and one message, never a traceback. Where a few bytes could
expand to many, the command runs in a process whose memory is measured.

============================================  =====================================================
threat                                        test
============================================  =====================================================
pickles: training state, teacher weights      ``test_code``; bare: ``models/test_weights``
pickles as chunks                             ``test_code``
object dtypes, code as codecs, in zarr.json   ``test_code``; other changes: ``cache/test_reader``
recipes that name code or files to open       ``test_code``
student headers that name hubs, files, code   ``test_code``
states and headers with invalid values        ``test_code``
``pipe:`` and other URLs as shards            ``test_code``, ``data/test_listing``
shard lists that leave their folder           ``test_paths``, ``data/test_listing``,
                                              ``cache/test_manifest``
links and devices in tars                     ``data/test_tars``
keys that leave their folder                  ``test_paths``
reads and writes through links in a cache     ``test_paths``; pipes: ``cache/test_reader``
invalid names among finished units            ``test_paths``
JSON: deep, long, many, duplicate, slow       ``test_bombs``, ``cache/test_manifest``;
                                              in tars: ``data/test_tars``
manifests that imply huge arrays              ``test_bombs``
zstd frames: false sizes, appended frames     ``test_bombs``, ``cache/test_zarr``
shard indices with false offsets              ``test_bombs``
values that no response contains              ``cache/test_reader``
images: large, animated, cut, compressed text ``test_bombs``, ``views/test_decode``
tars: claims, sparse maps, records, names     ``test_bombs``; backwards: ``data/test_tars``
weights that expand                           ``test_bombs``
terminal escapes, markup, HTML, in names      ``test_names``; ``runtime/test_console``
============================================  =====================================================
"""
