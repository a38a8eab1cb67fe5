"""The two stages, and evaluation.

1. ``dump`` -- stage one: run the teacher on every view and store its logits. ``write_cache`` does
   the same for any network; ``unit_writer`` shares the units among processes, and overlaps
   rendering, the network, encoding and writing.
2. ``train`` -- stage two, all its epochs. ``training_data`` joins cache, shards and recipe, and
   skips samples as the recipe says; ``from_recipe`` builds loss, student (``finetune``: from given
   weights), loader and optimizer; ``trainer`` runs an optimizer update. ``train_job`` defines a
   run's state, and what may change when it is resumed; ``run_log`` writes curves.
3. ``evaluate`` -- top-1 and top-5 of a checkpoint.
"""
