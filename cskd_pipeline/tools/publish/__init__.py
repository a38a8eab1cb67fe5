"""Publishing a cache: files next to its arrays, for the Hub and its visitors.

``publish_cache`` writes them all: ``cache_card`` is the README, ``preview`` a sample of the views
as Parquet, ``croissant`` the machine-readable description. Readers of the cache ignore them, and
its digest does not depend on them.
"""
