"""Pages that show what a teacher teaches, and what its students learn.

Each is one HTML file, which needs no network, from a template in ``templates/``. ``cache_page`` and
``run_page`` make them: of a cache with ``gallery`` and ``labels``, of runs with ``records`` (a
run's folder, read), ``ranking``, ``curves`` and ``dense_overlay``. ``page`` renders and writes
both; ``plots`` draws, ``plot_files`` makes figures SVG or PNG.
"""
