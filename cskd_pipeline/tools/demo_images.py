"""Small real images without a download: pages of handwritten digits.

scikit-learn ships 1,797 scans of handwritten digits (8x8, the UCI "optical recognition" test set).
An image shows several digits of its class in a 3 x 3 grid, optionally with a few of other classes.
The recipes apply CutMix to every view, so locations show different classes and spatial logits carry
more information than global ones. Some training images have random labels, as in data sets
collected from the web.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cskd_pipeline.errors import require_packages

CANVAS = 48  # pixels
ROWS = 3  # rows and columns of cells
SIDE = (13, 16)  # digit size in pixels, end exclusive
RANDOM_LABELS = 0.3  # share of training images; a tenth of these labels are right by chance
VALIDATION_DIGITS = 497  # scans reserved for validation images


@dataclass(frozen=True)
class Page:
    """Digits in an image: number of its own class (range, end exclusive), maximum of others."""

    own: tuple[int, int] = (7, 9)
    others: int = 0


DEMO, CLUTTERED = Page(), Page(own=(4, 6), others=4)
"""DEMO shows only the class's digits; in CLUTTERED they are mixed with other classes."""


def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans, (N, 8, 8) float in [0, 1], and their (N,) labels."""
    problem = "scikit-learn, the source of the demo images, is not installed"
    require_packages("sklearn", extra="demo", problem=problem)
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    return digits.reshape(-1, 8, 8) / 16.0, labels.astype(np.int64)


def write_digit_folders(
    out: Path, *, train: int, validation: int, seed: int, page: Page = DEMO
) -> None:
    """Write ``out/train/<label>/*.png`` and ``out/validation/<label>/*.png``, 48x48 RGB.

    Training and validation images use different scans, and validation labels are all correct. The
    same arguments give the same images.
    """
    scans, classes = _scans()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scans))
    pools = {"validation": order[:VALIDATION_DIGITS], "train": order[VALIDATION_DIGITS:]}
    for split, count in (("train", train), ("validation", validation)):
        pool = pools[split]
        for number, chosen in enumerate(np.resize(pool, count).tolist()):
            label = classes[chosen]
            canvas = _background(rng)
            digits = _digits(chosen, pool, classes, page, rng)
            _paint_digits(canvas, scans[digits], rng)
            if split == "train" and rng.random() < RANDOM_LABELS:
                label = rng.integers(10)
            folder = out / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image = np.clip(canvas, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{number:05d}.png")


def _digits(
    chosen: int, pool: np.ndarray, classes: np.ndarray, page: Page, rng: np.random.Generator
) -> list[int]:
    """Return ``chosen``, more digits of its class, and one digit each of some other classes."""
    of_class = {int(label): pool[classes[pool] == label] for label in np.unique(classes[pool])}
    own = of_class.pop(int(classes[chosen]))
    digits = [chosen, *rng.choice(own, int(rng.integers(*page.own)) - 1)]
    if page.others:
        count = int(rng.integers(page.others + 1))
        labels = rng.choice(list(of_class), count, replace=False).tolist()
        digits += [rng.choice(of_class[label]) for label in labels]
    return digits


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a coloured, shaded, noisy canvas, float (48, 48, 3)."""
    ramp = np.linspace(-1.0, 1.0, CANVAS)
    shade = rng.uniform(-30, 30) * ramp[:, None] + rng.uniform(-30, 30) * ramp[None, :]
    return rng.uniform(20, 90, 3) + shade[..., None] + rng.normal(0, 10, (CANVAS, CANVAS, 1))


def _paint_digits(canvas: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> None:
    """Paint each of the scans ``digits``, (n, 8, 8), into a random cell of the canvas."""
    cell = CANVAS // ROWS
    for index, digit in zip(rng.permutation(ROWS**2), digits, strict=False):
        side = int(rng.integers(*SIDE))
        top, left = cell * np.array(divmod(index, ROWS)) + rng.integers(0, cell - side + 1, 2)
        _paint(canvas[top : top + side, left : left + side], digit, rng)


def _paint(part: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> None:
    """Paint ``ink`` (opacity in [0, 1]) on a square ``part`` of the canvas in a random colour."""
    scaled = Image.fromarray((ink * 255).astype(np.uint8)).resize(
        part.shape[:2], Image.Resampling.BICUBIC
    )
    opacity = np.asarray(scaled, np.float64)[..., None] / 255
    part[:] = part * (1 - opacity) + rng.uniform(150, 255, 3) * opacity
