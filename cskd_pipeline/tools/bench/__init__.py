"""Measurements on the user's own machine and data, behind ``cskd-pipeline bench``.

1. **timing** -- sides of a comparison in turn: medians with spread, ratios round by round; the rate
   of a pipeline once its start is over.
2. **sampled_dump** -- a dump of a few images, whole or part by part. **responses** -- logits to
   measure encodings on, from a cache with ``dense`` or from a teacher, encoded and stored.
3. **bench_loader** -- this loader against timm's. **bench_join** -- the loader with a cache's
   responses against the loader without, and caches of ImageNet's shape. **bench_dump** -- a dump
   against the bare teacher. **bench_step** -- a training step from a cache against a plain one, and
   one with a live teacher. **bench_encodings** -- each encoding's bytes, times and distortion.
4. **bench_all** -- all of them and the study, in order of worth, within a time, as one Markdown
   table; **gpu_checks** -- what must hold on every device.
"""
