"""What ways of storing an answer cost and keep: the measurements behind ``cskd-pipeline bench``.

1. **answers** -- real answers to measure on: from a cache with ``dense``, or from a teacher.
2. **encodings** -- each encoding's bytes, times and distortion on them.
3. **plot** -- distortion against bytes, as an SVG.
"""
