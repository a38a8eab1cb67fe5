"""The two networks and the files of their weights.

1. ``timm_models`` -- timm and torchvision models by name.
2. ``teacher`` -- a CNN whose head applies at each location, loaded by name or from a factory;
   ``cut`` splits a network at its last feature map and proves the split on random pixels.
3. ``student`` -- a timm ViT with class, distillation and dense logits.
4. ``weights`` -- the tensors of a checkpoint, read without running code from it.
5. ``checkpoint`` -- a student's ``.safetensors`` file with timm's parameter names, which
   ``timm.create_model(name, checkpoint_path=file)`` accepts. Its JSON header states model, heads,
   origin and the SHA-256 of its tensors.
6. ``train_state`` -- one ``state.pt``, written atomically and read with ``weights_only=True``:
   tensors and plain values.
"""
