"""The method: tensors in, tensors out.

One batch passes through the room like this::

    pixels --teacher--> spatial logits d (B, K, h, w), global logits g (B, K), rounded to float16
                          |
                          | LogitTargets (live, or a dense cache)       upper_envelope --> planes
                          v                                               v  EnvelopeTargets
    pixels --student--> Heads: cls, dist (B, K), dense (B, K, h, w) ----> DistillationLoss

1. ``ckf`` -- the fused response and its hard labels in exact integers, and the upper envelope that
   stores those labels for every r.
2. ``targets`` -- one interface to the teacher's response, whichever way it was stored.
3. ``losses`` -- the three methods, hard and soft.
4. ``encodings`` -- the ways of storing a response, one file each.
"""
