"""Faults, for real: processes are killed, disks fill, bits flip; nothing lost, nothing wrong.

==========================================  =======================================================
fault                                       test
==========================================  =======================================================
SIGKILL at random moments of every command  ``test_kills`` (``CSKD_KILLS=50`` for more of them)
SIGINT, SIGTERM                             ``pipeline/test_dump``, ``pipeline/test_training``
an exception at chosen updates of a run     ``pipeline/test_training``
one command twice into one cache at once    ``test_kills``; writers alone: ``cache/test_writer``
ranks killed, stopped, nodes that join      ``pipeline/test_elastic``
a disk that fills, under every writer       ``test_full_disk``; at every file of a unit, at every
                                            sync: ``cache/test_writer``, ``pipeline/test_refusals``
files that may not grow (a quota, ulimit)   ``test_full_disk``
a file of a finished unit lost or emptied   ``test_damage``
a bit flipped in a cache                    ``test_damage``: 1,000, in every kind of file
a bit flipped in a tar, a training state    ``test_damage``; a tar's headers: ``loading/test_tars``
a cache's file cut at any length            ``cache/test_reader``
a tar cut at and between members            ``test_cut_tars``; at every block:
                                            ``loading/test_tars``
clock, time zone, locale, dates of files    ``test_clock``
==========================================  =======================================================
"""
