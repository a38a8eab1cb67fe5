"""Views: each is a pure function of (image bytes, seed, policy) and of its partner's.

1. ``policy`` -- every number that decides what views look like.
2. ``bits`` -- a counter-based bit stream, and seeds derived from names.
3. ``draw`` -- seed to parameters: crop, flip, RandAugment operations, erase boxes.
4. ``decode`` -- file bytes to upright RGB.
5. ``apply`` -- image and parameters to uint8 pixels, their digest, and the erase noise; ``kernels``
   has the loops over pixels.
6. ``mixing`` -- each view's partner, and how the two are mixed.

Numpy, numba, simplejpeg and Pillow only; no global random state is read or seeded.
"""
