"""Measurements on the user's own machine and data, behind ``cskd-pipeline bench``.

1. **turns** -- two sides of a comparison in turn: medians with spread, ratios round by round
   (``threads``: on one core). **steady** -- the rate of a pipeline once its start is over.
2. **loader** -- this loader against timm's. **join** -- the loader with a cache's answers against
   the loader without, and caches of ImageNet's shape. **dump** -- a dump against the bare teacher.
   **step** -- a training step from a cache against a plain one, and one with a live teacher.
3. **answers** -- real answers to measure encodings on: from a cache with ``dense``, or from a
   teacher. **encodings** -- each encoding's bytes, times and distortion on them. **plot** --
   distortion against bytes, drawn.
"""
