"""Small real images that need no download: handwritten digits at varying locations.

scikit-learn ships 1,797 scans of handwritten digits (8x8, the UCI "optical recognition" test set).
One digit at a varying location, scale and colour on a shaded canvas, amid fragments of other
digits: a part of the image decides its class, so spatial logits say more than global ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cskd_pipeline.errors import MissingPackageError

CANVAS = 48  # pixels
DIGIT = (30, 45)  # side in pixels, from and up to
FRAGMENT = (8, 12)
VALIDATION_DIGITS = 497  # scans that no training image is made of


def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans, (N, 8, 8) float in [0, 1], and their (N,) labels.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the demo takes its images from scikit-learn, which is not installed",
            action="pip install 'cskd-pipeline[demo]'",
        ) from error
    digits, labels = load_digits(return_X_y=True)
    return digits.reshape(-1, 8, 8) / 16.0, labels.astype(np.int64)


def write_digit_folders(out: Path, *, train: int, validation: int, seed: int) -> None:
    """Write ``out/train/<digit>/*.png`` and ``out/validation/<digit>/*.png``, 48x48 RGB.

    Training and validation images are made of different scans. The same arguments give the same
    images.
    """
    scans, labels = _scans()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scans))
    pools = {"validation": order[:VALIDATION_DIGITS], "train": order[VALIDATION_DIGITS:]}
    for split, count in (("train", train), ("validation", validation)):
        for number, chosen in enumerate(np.resize(pools[split], count).tolist()):
            folder = out / split / str(labels[chosen])
            folder.mkdir(parents=True, exist_ok=True)
            image = _image(scans, chosen, pools[split], rng)
            Image.fromarray(image).save(folder / f"{number:05d}.png")


def _image(
    scans: np.ndarray, chosen: int, pool: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return an image of one digit, uint8 (48, 48, 3)."""
    ramp = np.linspace(-1.0, 1.0, CANVAS)
    shade = rng.uniform(-30, 30) * ramp[:, None] + rng.uniform(-30, 30) * ramp[None, :]
    canvas = rng.uniform(20, 90, 3) + shade[..., None] + rng.normal(0, 10, (CANVAS, CANVAS, 1))
    for other in rng.choice(pool, rng.integers(2, 5)):
        row, column = rng.integers(0, 5, 2)
        fragment = scans[other, row : row + 4, column : column + 4]
        _paint(canvas, fragment, int(rng.integers(*FRAGMENT)), rng.uniform(60, 255, 3), rng)
    _paint(canvas, scans[chosen], int(rng.integers(*DIGIT)), rng.uniform(150, 255, 3), rng)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _paint(
    canvas: np.ndarray, ink: np.ndarray, side: int, colour: np.ndarray, rng: np.random.Generator
) -> None:
    """Lay ``ink`` (opacity in [0, 1]), enlarged to ``side`` pixels, somewhere on the canvas."""
    scaled = Image.fromarray((ink * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    opacity = np.asarray(scaled, np.float64)[..., None] / 255
    top, left = rng.integers(0, CANVAS - side + 1, 2)
    part = canvas[top : top + side, left : left + side]
    part[:] = part * (1 - opacity) + colour * opacity
