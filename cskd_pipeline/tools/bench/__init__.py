"""Measurements on the user's own machine and data, behind ``cskd-pipeline bench``.

1. **timing** -- comparisons whose sides take turns: medians with spread, ratios round by round;
   the rate of a pipeline after its warm-up.
2. **sampled_dump** -- a dump of a few images, complete or part by part. **responses** -- logits to
   measure encodings on, from a cache with ``dense`` or from a teacher, encoded and stored.
3. **bench_loader** -- this loader against timm's. **bench_join** -- the loader with and without a
   cache's responses, and caches of ImageNet's shape. **bench_dump** -- a dump against the bare
   teacher. **bench_step** -- a training step from a cache against a plain one and one with a live
   teacher. **bench_encodings** -- bytes, times and distortion of each encoding.
4. **bench_all** -- all of them and the study, most important first, within a time limit, as
   one Markdown table; **gpu_checks** -- exactness checks for any device.
"""
