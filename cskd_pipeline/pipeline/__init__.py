"""The two stages, and measuring a student.

1. ``dump`` -- stage one: units of views to the teacher, its logits to the cache. ``write_cache``
   does the same with any network's logits; ``unit_writer`` is what overlaps meanwhile.
2. ``train`` -- stage two: epochs of a ``trainer``, which has the model, the ``optimizer`` and one
   update. ``training_data`` brings cache, shards and recipe together, ``settle`` leaves out what
   the recipe says, ``finetune`` starts from given weights, ``resuming`` decides what a resumed run
   may change, ``run_log`` and ``scalars`` write curves.
3. ``evaluate`` -- top-1 and top-5 of a checkpoint.
"""
