"""Views: pure functions of image bytes, seed and policy, and of the partner's if mixed.

1. ``policy`` -- all parameters of the augmentation.
2. ``bits`` -- a counter-based bit stream, and seeds derived from names.
3. ``draw`` -- seed to parameters: crop, flip, RandAugment operations, erase boxes.
4. ``decode`` -- file bytes to upright RGB.
5. ``apply`` -- image and parameters to uint8 pixels, their digest, and the erase noise; ``kernels``
   has the loops over pixels.
6. ``mixing`` -- each view's partner, and the mixing of the two.

These modules use numpy, numba, simplejpeg and Pillow only, and no global random state.
"""
