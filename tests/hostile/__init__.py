"""Nothing foreign runs, climbs or unfolds: what strangers can send, and the test that has it.

Commands that must be refused end with code 1 or 2 and one message, never with a traceback; where a
few bytes could become many, the command runs in a process whose memory is measured.

============================================  =====================================================
threat                                        test
============================================  =====================================================
pickles: training state, teacher's weights    ``test_code``; bare: ``distill/test_weights``
pickles in the place of chunks                ``test_code``
object dtypes, codecs that run, in zarr.json  ``test_code``; other changes: ``cache/test_reader``
recipes that name code, or files to open      ``test_code``
students' cards that name hubs, files, code   ``test_code``
states and cards of odd values                ``test_code``
``pipe:`` and other URLs as shards            ``test_code``, ``loading/test_listing``
lists of shards that climb                    ``test_paths``, ``loading/test_listing``,
                                              ``test_manifest``
links and devices in tars                     ``data/test_tars``
keys that climb                               ``test_paths``
links in a cache, read and written through    ``test_paths``; pipes: ``cache/test_reader``
names among finished units                    ``test_paths``
JSON: deep, long, many, twice, slow           ``test_bombs``, ``test_manifest``; in tars:
                                              ``data/test_tars``
manifests that imply much                     ``test_bombs``
zstd frames that lie; frames behind frames    ``test_bombs``, ``cache/test_zarr``
shard indices that lead elsewhere             ``test_bombs``
values that no answer has                     ``cache/test_reader``
pictures: large, animated, cut, compressed    ``test_bombs``, ``views/test_decode``
text
tars: claims, sparse maps, records, names     ``test_bombs``; backwards: ``data/test_tars``
weights that unfold                           ``test_bombs``
terminal escapes, markup, HTML, in names      ``test_names``; ``runtime/test_console``
============================================  =====================================================
"""
