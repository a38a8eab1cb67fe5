"""What stands on the two stages; only the command line uses it.

``bench`` measures, ``estimate`` says what a dump or a run will cost, ``verify`` whether a cache
can be trusted; ``report`` writes pages and plots, ``export`` students for others, ``cache_card`` a
cache's README; ``make_shards`` packs images; ``demo`` and ``study`` run the whole, by this
program's own ``commands``.
"""
