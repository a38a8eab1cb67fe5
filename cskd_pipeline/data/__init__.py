"""Data reading: from tars on disk or at a URL to batches on a device.

1. ``listing`` -- the tars that a user names. ``remote_tar`` -- a tar at a URL: headers by range
   requests, images from a local copy, which ``read_ahead`` fetches before use. ``tar_index`` --
   keys, labels and image offsets from one pass over a tar's headers; ``shards`` reads images by
   offset. ``index`` -- a data set of tars; ``describe`` -- its manifest. ``corrupt`` -- images that
   cannot be decoded; ``left_out`` -- the list of images that a command skips, and why.
2. ``plan`` -- the order of samples and views: a pure function, independent of the number of ranks
   and processes, in which pairs and repeated views are neighbours.
3. ``join`` -- a cache's samples found in the user's tars by key. ``images`` -- their images, with
   labels and checksums compared. ``replay`` -- a cache's views rendered again and compared with its
   record.
4. ``batches`` -- rows of (view, shard, offset) to pixels: each image decoded once, each view
   rendered once, digests compared; plus mixing parameters and labels. ``unit_views`` -- all views
   of whole units, for the dump. ``evalset`` -- images for evaluation.
5. ``workers`` -- the processes that run step 4; errors arrive as raised, batches through shared
   memory (``handover``). On the network's device: ``assemble`` -- uint8 to mixed floats;
   ``full_batches`` -- full batches for a teacher.
6. ``training_views`` -- shards and cache as one data set; ``cached_loader`` -- its batches in the
   plan's order, ready for a training loop.
"""
