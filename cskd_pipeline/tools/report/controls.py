"""What the pages of caches and of runs say of a view alike."""

from __future__ import annotations

import numpy as np

from cskd_pipeline.cache.reader import CacheReader
from cskd_pipeline.distill.ckf import UNUSED
from cskd_pipeline.errors import printable
from cskd_pipeline.tools.report import page
from cskd_pipeline.tools.report.gallery import GalleryViews
from cskd_pipeline.tools.report.statistics import Truth

_NAME = 80  # letters of a class name


_CONTROLS = """
<div class="controls">
{first}<div class="slide">
<input type="range" id="at" min="0" max="100" value="{value}" step="1"
 aria-label="r of the teacher's labels, from local to global">
<div class="ends" aria-hidden="true"><span>local, r = 1</span><span>global, r = 0</span></div>
</div>
<label><input type="checkbox" id="labels" checked> labels</label>
<label class="strength">strength
<input type="range" id="strength" min="10" max="100" value="50"></label>
<output id="told" for="at" aria-live="polite"></output>
</div>
<noscript><p class="note">The labels over the views need JavaScript, which this page carries itself.
</p></noscript>
"""


def controls(ratio: float, first: str = "") -> str:
    """The slider that starts at r = ``ratio``, and how the labels are shown; ``first``: HTML."""
    return _CONTROLS.format(value=round(100 * (1 - ratio)), first=first)


def class_names(reader: CacheReader) -> list[str]:
    """A name for every class, not too long, on one line."""
    data = reader.manifest.dataset
    if data.class_names is None:
        return [f"class {k}" for k in range(data.num_classes)]
    return [printable(name, _NAME) or f"class {k}" for k, name in enumerate(data.class_names)]


def places(planes: np.ndarray) -> list[list[int]]:
    """One view's (P, h, w) planes, place by place, without what is unused."""
    height, width = planes.shape[1:]
    return [
        [int(v) for v in planes[: 2 * int((planes[0::2, y, x] != UNUSED).sum()) - 1, y, x]]
        for y in range(height)
        for x in range(width)
    ]


def classes(planes: np.ndarray) -> np.ndarray:
    """The classes that (n, P, h, w) planes name, each once."""
    lines = planes[:, 0::2]
    return np.unique(lines[lines != UNUSED])


def content(truth: Truth, i: int, names: list[str]) -> tuple[str, str]:
    """What is in view ``i``: as text, and as HTML with a swatch of each class's colour."""
    share, larger, smaller = truth.share[i], int(truth.larger[i]), int(truth.smaller[i])
    contents = [(larger, names[larger])]
    if share < 1:
        shares = ((larger, share), (smaller, 1 - share))
        contents = [(k, f"{names[k]} {part:.0%}") for k, part in shares]
    swatch = '<span class="swatch" data-class="{}"></span> {}'
    marked = " ".join(
        f'<span class="truth">{swatch.format(k, page.text(name))}</span>' for k, name in contents
    )
    return ", ".join(name for _, name in contents), marked


def warning(views: GalleryViews, i: int) -> str:
    """HTML that tells how view ``i`` is not what the teacher saw; empty if it is."""
    if not views.same[i]:
        told = "Made from another image than the teacher saw."
    elif not views.exact[i]:
        told = "Differs by rounding from what the teacher saw."
    else:
        return ""
    return f'<br><span class="warning">{page.text(told)}</span>'
