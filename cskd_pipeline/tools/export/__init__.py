"""A student for those without this package: in timm's form for the hub, and as ONNX.

1. ``export_student`` -- the whole: what is written, all of it or nothing.
2. ``onnx_graph`` -- ONNX, with the normalisation and the mean of the heads inside.
3. ``model_card`` -- the model card, with the few lines that give the student's own logits in timm.
"""
