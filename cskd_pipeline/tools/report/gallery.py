"""Views as the network saw them: replayed from the user's images, mixed, ready for a page."""

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
from cskd_pipeline.data.images import ABSENT
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.remote_tar import FETCHING
from cskd_pipeline.data.replay import pair_views, same_images, spread_views
from cskd_pipeline.errors import JoinError, printable
from cskd_pipeline.runtime.progress import progress

_SMALL = 64  # pixels; up to here a view is a lossless PNG, shown without smoothing
_SYNSET = re.compile("n[0-9]{8}")
_NAME = 80  # characters of a class name
_SINGLE = 0.995  # share of one image from which the other is not named


@dataclass(frozen=True)
class GroundTruth:
    """The classes of n mixed views, from the cache's labels.

    Args:
        own, partner: (n,) int64, classes of each view's own image and of the one mixed in; equal if
            none is mixed in.
        share: (n,) float, share of the own image.
    """

    own: np.ndarray
    partner: np.ndarray
    share: np.ndarray

    @property
    def larger(self) -> np.ndarray:
        """Return the class of the image with the larger share of each view: (n,) int64."""
        return np.where(self.share >= 0.5, self.own, self.partner)


@dataclass(frozen=True)
class GalleryView:
    """One replayed view.

    Args:
        number, key: the view's number and its sample's key.
        pixels: (S, S, 3) uint8, mixed, as the network saw them.
        contents: class and name of each image in it, with its share if two are mixed.
        same: whether both images are those that the teacher saw.
        exact: whether the sample's own view has the digest recorded in the cache.
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
        """Return how the view differs from the teacher's; empty if it does not."""
        if not self.same:
            return "Not from the image that the teacher saw."
        return "" if self.exact else "Differs by rounding from the view that the teacher saw."

    @property
    def small(self) -> bool:
        """Return whether the view is shown without smoothing."""
        return len(self.pixels) <= _SMALL

    @property
    def image(self) -> str:
        """Return the view as a ``data:`` URL."""
        kind, data = self.encode(len(self.pixels))
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def encode(self, max_side: int) -> tuple[str, bytes]:
        """Return format and bytes of an image file: PNG for a small view, else JPEG.

        Args:
            max_side: side in pixels to which a larger view is scaled down.
        """
        kind, buffer = "png" if self.small else "jpeg", io.BytesIO()
        image = Image.fromarray(self.pixels)
        image.thumbnail((max_side, max_side))
        image.save(buffer, format=kind.upper(), quality=88)
        return kind, buffer.getvalue()


def class_names(cache: Cache) -> list[str]:
    """Return a short one-line name for every class, in words for ImageNet's."""
    data = cache.manifest.dataset
    names = data.class_names or _synsets_of_keys(cache) or [""] * data.num_classes
    return [printable(name, _NAME) or f"class {k}" for k, name in enumerate(words_of(names))]


def words_of(names: Sequence[str]) -> list[str]:
    """Replace ImageNet-1k's synsets with timm's words; other names stay as they are.

    ``n01443537`` becomes ``goldfish``; of two cranes one becomes ``crane (n02012849)``.
    """
    if not any(map(_SYNSET.fullmatch, names)):
        return list(names)
    from timm.data import ImageNetInfo  # takes a second: only for ImageNet

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
    """Return ImageNet-1k's synsets if a finished shard's keys begin with those of their labels."""
    finished = np.flatnonzero(cache.done().any(axis=0))
    if cache.manifest.dataset.num_classes != 1000 or not len(finished):
        return []
    from timm.data import ImageNetInfo

    synsets, shard = ImageNetInfo().label_names(), int(finished[0])
    pairs = zip(cache.keys(shard), cache.labels(shard).tolist(), strict=True)
    return synsets if all(key.startswith(synsets[label]) for key, label in pairs) else []


def choose_views(joined: Join, count: int) -> np.ndarray:
    """Return about ``count`` views whose images are available: (n, 3) view, shard, offset; n > 0.

    Views dominated by one image come first.
    """
    rows = with_images(joined, spread_views(joined, count, few=FETCHING))
    if not len(rows):
        raise JoinError(
            "the shards have no image of any finished view of the cache",
            where=joined.cache.path,
            found=f"{joined.missing} of {joined.samples.total} samples missing",
            action="give the shards that the cache was dumped from, or finish the dump",
        )
    share = ground_truth(joined.cache, rows).share
    return rows[np.argsort(-np.maximum(share, 1 - share), kind="stable")]


def with_images(joined: Join, rows: np.ndarray) -> np.ndarray:
    """Keep the views whose own image and mixing partner are both available."""
    if not len(rows):
        return rows
    own, partner = (
        joined.images.locate(part[:, 1:])[0] != ABSENT
        for part in (rows, pair_views(joined.cache, rows).partner)
    )
    return rows[own & partner]


def ground_truth(cache: Cache, rows: np.ndarray) -> GroundTruth:
    """Return the classes in views, (n, 3) view, shard, offset."""
    pairing = pair_views(cache, rows)
    own, partner = (
        np.array([cache.labels(shard)[offset] for _, shard, offset in part.tolist()], np.int64)
        for part in (pairing.own, pairing.partner)
    )
    return GroundTruth(own, partner, np.array([mix.lam for mix in pairing.mixes]))


def replay_views(joined: Join, rows: np.ndarray) -> list[GalleryView]:
    """Replay views, (n, 3) view, shard, offset, for a page."""
    cache, renderer = joined.cache, joined.renderer
    partner = pair_views(cache, rows).partner
    same = same_images(joined, rows) & same_images(joined, partner)
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
    if own == partner or larger[1] >= _SINGLE:
        return [(larger[0], names[larger[0]])]
    return [(k, f"{names[k]} {part:.0%}") for k, part in (larger, *smaller)]
