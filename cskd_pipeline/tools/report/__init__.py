"""Pages that show what a teacher teaches, and what its students learn.

Each is one HTML file, which needs no network. ``cache_page`` and ``run_page`` make them: of a cache
with ``gallery``, ``labels`` and ``statistics``, of runs with ``records`` (what is in a run's
folder), ``curves``, ``dense_overlay`` and ``predictions``. ``page`` is the shell of both,
``controls`` what they share.
"""
