"""HTML pages of a cache or of training runs, each one self-contained file.

``cache_page`` builds the page of a cache from ``gallery`` and ``labels``; ``run_page`` that of runs
from ``records`` (reads a run's folder), ``ranking``, ``curves`` and ``dense_overlay``. ``page``
renders templates in ``templates/``; ``plots`` draws figures, ``plot_files`` writes them as SVG or
PNG.
"""
