"""What is learned: tensors in, tensors out, no files but weights.

One batch passes through the room like this::

    pixels --teacher--> Answer: spatial d (B, K, h, w) and global g (B, K), rounded once to float16
                          |
                          | LogitTargets (live, or a dense cache)       upper_envelope --> planes
                          v                                               v  EnvelopeTargets
    pixels --student--> Heads: cls, dist (B, K), dense (B, K, h, w) ----> DistillationLoss

1. ``weights`` -- a checkpoint's tensors, read without running anything that is in it.
2. ``models`` -- timm models by name; every way of not getting one is a clear error.
3. ``teacher`` -- any CNN whose head can be applied at each location, proven on random features.
4. ``ckf`` -- the fused response and its hard labels in exact integers, and the upper envelope that
   stores those labels for every r.
5. ``student`` -- a timm ViT with class, distillation and dense predictions.
6. ``targets`` -- one interface to what the teacher said, whichever way it was stored.
7. ``losses`` -- the three methods, hard and soft.
"""
