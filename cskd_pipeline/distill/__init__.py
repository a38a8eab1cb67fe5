"""The method, CSKD (arXiv 2307.08500): tensors in, tensors out.

The path of one batch::

    pixels --teacher--> spatial logits d (B, K, h, w), global logits g (B, K), rounded to float16
                          |
                          | LogitTargets (live, or a dense cache)       upper_envelope --> planes
                          v                                               v  EnvelopeTargets
    pixels --student--> Heads: cls, dist (B, K), dense (B, K, h, w) ----> DistillationLoss

1. ``ckf`` -- the fused response, its hard labels in exact integers, and the upper envelope that
   encodes these labels for every r.
2. ``targets`` -- one interface to the teacher's response, however it is stored.
3. ``losses`` -- the three methods, hard and soft.
4. ``encodings`` -- storage encodings of a response, one module each.
"""
