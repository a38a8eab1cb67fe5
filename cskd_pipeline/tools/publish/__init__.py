"""Publishing a cache: files beside its arrays that hubs, and people, read.

``publish_cache`` writes them all: ``cache_card`` the README, ``preview`` some views as Parquet,
``sums`` every file's SHA-256, ``croissant`` the description that machines read. No reader of caches
looks at them, and no digest of a cache depends on them.
"""
