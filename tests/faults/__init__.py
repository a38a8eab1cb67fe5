"""Real faults: processes are killed, disks fill, bits flip; nothing is lost or silently wrong.

==========================================  =======================================================
fault                                       test
==========================================  =======================================================
SIGKILL at random moments of every command  ``test_kills`` (``CSKD_KILLS=50`` for more of them)
SIGINT, SIGTERM                             ``pipeline/test_dump``, ``pipeline/test_training``
an exception at chosen updates of a run     ``pipeline/test_training``
two processes writing one cache             ``test_kills``; writers alone: ``cache/test_writer``
ranks killed or stopped, nodes joining      ``pipeline/test_elastic``
a disk that fills, under every writer       ``test_full_disk``; at every file of a unit, at every
                                            sync: ``cache/test_writer``, ``pipeline/test_refusals``
a limit on file sizes (a quota, ulimit)     ``test_full_disk``
a file of a finished unit lost or emptied   ``test_damage``
a bit flipped in a cache                    ``test_damage``: 1,000, in every kind of file
a bit flipped in a tar, a training state    ``test_damage``; a tar's headers: ``data/test_tars``
a cache's file truncated at any length      ``cache/test_reader``
a tar truncated at and between members      ``test_cut_tars``; at every block: ``data/test_tars``
clock, time zone, locale, file dates        ``test_clock``
==========================================  =======================================================
"""
