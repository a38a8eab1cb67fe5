"""The two stages, and measuring a student.

1. ``dump`` -- stage one: units of views to the teacher, its logits to the cache. ``write_cache``
   does the same with any network's logits; ``unit_writer`` draws the units among processes, and is
   what overlaps meanwhile.
2. ``train`` -- stage two, from its first epoch to its last. ``training_data`` brings cache, shards
   and recipe together, and leaves out what the recipe says; ``from_recipe`` makes loss, student
   (``finetune``: from given weights), loader and optimizer, whose update is ``trainer``'s step.
   ``train_job`` is what a run keeps, what its state holds, and what may change when it is resumed;
   ``run_log`` writes curves.
3. ``evaluate`` -- top-1 and top-5 of a checkpoint.
"""
