"""Reading: from tars on a disk to batches on a device.

1. ``listing`` -- the tars that a user names; ``remote_tar`` -- one at a URL, its headers by ranges,
   its images from a copy, which ``read_ahead`` fetches before use. ``tar_index`` -- a pass over
   one tar's headers gives keys, labels and each image's offset; ``shards`` then reads images by
   it. ``index`` -- a data set of them; ``describe`` -- its manifest. ``corrupt`` -- images that
   cannot be decoded; ``left_out`` -- the list of those, and of others that a command does not use.
2. ``plan`` -- the order of samples and views. A pure function, the same for any number of
   ranks and processes; pairs and repeated views are neighbours in it.
3. ``join`` -- finds a cache's samples in the user's tars, by key. ``images`` -- reads them, and
   compares labels and checksums on the way. ``replay`` -- a cache's views rendered again, and
   compared with what it recorded.
4. ``batches`` -- rows of (view, shard, offset) to pixels, each image decoded once, each view
   rendered once, digests compared; then how they are mixed, and labels. ``unit_views`` -- those of
   whole units, for the dump. ``evalset`` -- images for evaluation.
5. ``workers`` -- the processes in which 4 happens; their errors arrive as raised, their batches
   through shared memory (``handover``). Then, where the network is: ``assemble`` -- uint8 to mixed
   floats; ``full_batches`` -- for a teacher, which always sees a whole batch.
6. ``training_views`` -- all of that as a data set of one's shards and cache, and
   ``cached_loader`` -- its batches in the plan's order, ready for a loop.
"""
