"""Commands that write, ready to run as processes, and the output expected of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cskd_pipeline.models.train_state import load_state
from tests.pipeline import world
from tests.processes import Server

Arguments = list[object]


@dataclass(frozen=True)
class Stages:
    """Arguments of ``dump-teacher``, ``cache convert``, ``cache merge`` and ``train``.

    ``parts`` are two overlapping caches that together equal ``cache``.
    """

    server: Server
    shards: Path
    cache: Path
    log: Path
    parts: tuple[Path, ...] = ()

    def dump(self, out: Path, workers: int = 1) -> Arguments:
        """Write a cache equal to ``cache``."""
        return [
            *("dump-teacher", "--shards", self.shards, "--cache", out, "--quiet"),
            *("--teacher", world.TEACHER, "--weights", "random"),
            *("--workers", workers, "--device", "cpu", *world.as_flags(world.dump_sets())),
        ]

    def convert(self, out: Path, workers: int = 0) -> Arguments:
        """Convert ``cache`` to all other encodings."""
        flags = ("--encoding", "dense-q8", "--encoding", "topk", "--encoding", "envelope")
        flags += ("--encoding", "sampled", "--sampled-draws", "2")
        return ["cache", "convert", self.cache, out, *flags, "--device", "cpu", "--quiet"]

    def merge(self, out: Path, workers: int = 0) -> Arguments:
        """Merge ``parts`` into a cache equal to ``cache``."""
        return ["cache", "merge", *self.parts, "--out", out, "--quiet"]

    def train(self, out: Path, workers: int = 1) -> Arguments:
        """Train for 24 updates and save the state after every one."""
        sets = [*world.train_sets(), "run.checkpoint_every=1"]
        return [
            *("train", "--shards", self.shards, "--cache", self.cache, "--out", out, "--quiet"),
            *("--student", world.STUDENT, "--method", "cskd", "--epochs", 4, "--batch-size", 16),
            *("--workers", workers, "--device", "cpu", *world.as_flags(sets), "--resume"),
        ]


class Reference(NamedTuple):
    """Output, disk usage and duration of a command that ran undisturbed."""

    files: dict[str, bytes]
    bytes: int
    seconds: float


def disk_usage(folder: Path) -> int:
    """Return the bytes that the files of ``folder`` occupy in a tmpfs, which stores whole pages."""
    size = os.sysconf("SC_PAGE_SIZE")
    lengths = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-length // size) * size for length in lengths)


def output_of(kind: str, out: Path) -> dict[str, bytes]:
    """Return every file of a finished command, partial ones too, except those that store times."""
    timed = {"zarr.json", "state.pt", "summary.csv"}
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and str(path.relative_to(out)) not in timed
        and path.parent.name != "tensorboard"
    }
    if kind == "train":
        del files["recipe.toml"]  # contains the folder's name
        files["state"] = canonical(load_state(out / "state.pt"))
    return files


def canonical(state: Any) -> bytes:
    """Return a training state as bytes, without its timings."""
    if isinstance(state, torch.Tensor):
        return repr((state.dtype, state.shape)).encode() + state.contiguous().numpy().tobytes()
    if isinstance(state, dict):
        timings = ("seconds", "images_per_second", "data_wait")
        parts = [(k, canonical(v)) for k, v in state.items() if k not in timings]
        return b"{" + b"".join(repr(k).encode() + v for k, v in parts) + b"}"
    if isinstance(state, list | tuple):
        return b"[" + b",".join(map(canonical, state)) + b"]"
    return repr(state).encode()
