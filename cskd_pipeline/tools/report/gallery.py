"""Views as the network saw them: replayed from the user's images and mixed, ready for a page."""

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.images import NOWHERE
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.remote_tar import FETCHING
from cskd_pipeline.data.replay import pair_views, same_images, spread_views
from cskd_pipeline.errors import JoinError, printable
from cskd_pipeline.runtime.progress import progress

_SMALL = 64  # pixels up to which a view is stored as it is, and shown without smoothing
_SYNSET = re.compile("n[0-9]{8}")
_NAME = 80  # letters of a class name
_ALONE = 0.995  # from this share on, what is mixed in is too little to be named


@dataclass(frozen=True)
class GroundTruth:
    """The classes of n mixed views, by the cache's labels.

    Args:
        own, partner: (n,) int64, the class of each view's own image, and of the one mixed in; equal
            where none is.
        share: (n,) float, of the own image.
    """

    own: np.ndarray
    partner: np.ndarray
    share: np.ndarray

    @property
    def larger(self) -> np.ndarray:
        """Return the class of the image that fills more of each view: (n,) int64."""
        return np.where(self.share >= 0.5, self.own, self.partner)


@dataclass(frozen=True)
class GalleryView:
    """One replayed view.

    Args:
        number, key: of the view, and of its sample.
        pixels: (S, S, 3) uint8, mixed, as the network saw it.
        contents: each class in it and its name, with its share where two are mixed.
        same: both of its images are those that the teacher saw.
        exact: the sample's own view has the digest that the cache recorded.
    """

    number: int
    key: str
    pixels: np.ndarray
    contents: list[tuple[int, str]]
    same: bool
    exact: bool

    @property
    def summary(self) -> str:
        """Return the names in ``contents`` as text."""
        return ", ".join(name for _, name in self.contents)

    @property
    def warning(self) -> str:
        """Return how the view differs from what the teacher saw; empty if it does not."""
        if not self.same:
            return "Made from another image than the teacher saw."
        return "" if self.exact else "Differs by rounding from what the teacher saw."

    @property
    def small(self) -> bool:
        """Return whether the view is shown without smoothing."""
        return len(self.pixels) <= _SMALL

    @property
    def image(self) -> str:
        """Return the view as a ``data:`` URL."""
        kind, data = self.encoded(len(self.pixels))
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def encoded(self, most: int) -> tuple[str, bytes]:
        """Return kind and bytes of an image file, PNG of a small view and JPEG of others.

        Args:
            most: pixels of a side; a larger view is made smaller.
        """
        kind, buffer = "png" if self.small else "jpeg", io.BytesIO()
        image = Image.fromarray(self.pixels)
        image.thumbnail((most, most))
        image.save(buffer, format=kind.upper(), quality=88)
        return kind, buffer.getvalue()


def class_names(cache: Cache) -> list[str]:
    """Return a name for every class, on one line and not too long; of ImageNet's classes words."""
    data = cache.manifest.dataset
    names = data.class_names or _synsets_of_keys(cache) or [""] * data.num_classes
    return [printable(name, _NAME) or f"class {k}" for k, name in enumerate(words_of(names))]


def words_of(names: Sequence[str]) -> list[str]:
    """Return names with ``n01443537`` as ``goldfish``, and ``crane (n02012849)`` of two cranes.

    Words are those of timm's list of ImageNet-1k; other names stay as they are.
    """
    if not any(map(_SYNSET.fullmatch, names)):
        return list(names)
    from timm.data import ImageNetInfo  # takes a second, which other data need not pay

    info = ImageNetInfo()
    known = set(info.label_names()).intersection(names)
    words = [
        info.label_name_to_description(name).partition(",")[0] if name in known else name
        for name in names
    ]
    uses = Counter(words)
    return [
        f"{word} ({name})" if name in known and uses[word] > 1 else word
        for word, name in zip(words, names, strict=True)
    ]


def _synsets_of_keys(cache: Cache) -> list[str]:
    """Return ImageNet-1k's synsets if the keys of a finished shard begin with their labels'."""
    finished = np.flatnonzero(cache.done().any(axis=0))
    if cache.manifest.dataset.num_classes != 1000 or not len(finished):
        return []
    from timm.data import ImageNetInfo

    synsets, shard = ImageNetInfo().label_names(), int(finished[0])
    pairs = zip(cache.keys(shard), cache.labels(shard).tolist(), strict=True)
    return synsets if all(key.startswith(synsets[label]) for key, label in pairs) else []


def choose_views(found: Join, count: int) -> np.ndarray:
    """Return about ``count`` views whose images are there: (n, 3) view, shard, offset; n > 0.

    Those in which one image fills the most come first.
    """
    rows = with_images(found, spread_views(found, count, few=FETCHING))
    if not len(rows):
        raise JoinError(
            "there is nothing to show: no finished part of the cache has its images here",
            where=found.cache.path,
            found=f"{found.missing} of {found.samples.total} samples missing",
            action="give the shards that the cache was made from, or finish the dump",
        )
    share = ground_truth(found.cache, rows).share
    return rows[np.argsort(-np.maximum(share, 1 - share), kind="stable")]


def with_images(found: Join, rows: np.ndarray) -> np.ndarray:
    """Return those of the views ``rows`` whose images, the one mixed in too, are there."""
    if not len(rows):
        return rows
    own, partner = (
        found.images.locate(part[:, 1:])[0] != NOWHERE
        for part in (rows, pair_views(found.cache, rows).partner)
    )
    return rows[own & partner]


def ground_truth(cache: Cache, rows: np.ndarray) -> GroundTruth:
    """Return the classes in the views ``rows``, (n, 3) view, shard, offset."""
    pairing = pair_views(cache, rows)
    own, partner = (
        np.array([cache.labels(shard)[offset] for _, shard, offset in part.tolist()], np.int64)
        for part in (pairing.own, pairing.partner)
    )
    return GroundTruth(own, partner, np.array([mix.lam for mix in pairing.mixes]))


def make_views(found: Join, rows: np.ndarray) -> list[GalleryView]:
    """Replay the views ``rows``, (n, 3) view, shard, offset."""
    cache, renderer = found.cache, found.renderer
    partner = pair_views(cache, rows).partner
    same = same_images(found, rows) & same_images(found, partner)
    truth, names = ground_truth(cache, rows), class_names(cache)
    views = []
    with progress(len(rows), "views", "replaying views") as meter:
        for i, (view, shard, offset) in enumerate(rows.tolist()):
            batch = render_batch(renderer, rows[i : i + 1])
            pixels = assemble(batch, cache.manifest.policy)[0].permute(1, 2, 0)
            digest = int(batch.view_digest[int(batch.own[0])])
            views.append(
                GalleryView(
                    number=view,
                    key=cache.keys(shard)[offset],
                    pixels=(pixels.clamp(0, 1) * 255).round().byte().numpy(),
                    contents=_contents(truth, i, names),
                    same=bool(same[i]),
                    exact=digest == int(cache.view_digests(view, shard)[offset]),
                )
            )
            meter.advance()
    return views


def _contents(truth: GroundTruth, i: int, names: list[str]) -> list[tuple[int, str]]:
    own, partner, share = int(truth.own[i]), int(truth.partner[i]), float(truth.share[i])
    larger, *smaller = sorted([(own, share), (partner, 1 - share)], key=lambda part: -part[1])
    if own == partner or larger[1] >= _ALONE:
        return [(larger[0], names[larger[0]])]
    return [(k, f"{names[k]} {part:.0%}") for k, part in (larger, *smaller)]
