"""Publishing a cache: files beside its arrays that hubs, and people, read.

``publish_cache`` writes them all: ``cache_card`` is the README, ``preview`` some views as Parquet,
``croissant`` the description that machines read. No reader of caches looks at them, and no digest
of a cache depends on them.
"""
