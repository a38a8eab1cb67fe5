"""The two stages, and measuring a student.

1. ``dump`` -- stage one: units of views to the teacher, its logits to the cache. ``write_cache``
   does the same with any network's logits; ``undone_units`` draws the units among processes,
   ``unit_writer`` is what overlaps meanwhile.
2. ``train`` -- stage two, from its first epoch to its last. ``training_data`` brings cache, shards
   and recipe together, and ``settle`` leaves out what the recipe says; ``from_recipe`` makes loss,
   student (``finetune``: from given weights), ``optimizer`` and the ``trainer``, whose step is one
   update. ``train_job`` is what a run keeps and its state holds (``resuming``: what may
   change); ``run_log`` and ``scalars`` write curves.
3. ``evaluate`` -- top-1 and top-5 of a checkpoint.
"""
