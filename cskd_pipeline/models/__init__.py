"""The two networks, and the files that hold their weights.

1. ``timm_models`` -- timm models by name; every way of not getting one is a clear error.
2. ``teacher`` -- any CNN whose head can be applied at each location: ``cut`` finds the last feature
   map and proves on random pixels that it is the right one.
3. ``student`` -- a timm ViT with class, distillation and dense logits.
4. ``weights`` -- a checkpoint's tensors, read without running anything that is in it.
5. ``checkpoint`` -- a student's file: ``.safetensors`` with timm's own parameter names, which
   ``timm.create_model(name, checkpoint_path=file)`` takes; its header states, as JSON, model,
   heads, origin, and the SHA-256 of its tensors.
6. ``train_state`` -- one ``state.pt``, written whole or not at all and read with
   ``weights_only=True``: tensors and plain values.
"""
