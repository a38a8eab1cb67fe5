"""Small shards and image folders, created once and read only."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.runtime.progress import restore_reporting
from tests.images import write_image_folder, write_shards

COUNTS = (21, 8, 13, 1)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and the machine may be shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _default_hangup_handler() -> None:
    """``nohup`` ignores SIGHUP, and the commands that tests start would inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Exclude objects of imports and earlier modules from garbage collection.

    Scanning them takes more than a second in each forked process, which copies all their pages.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Show Hypothesis's summary the referrers of objects: frozen ones are invisible."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _restore_reporting() -> Iterator[None]:
    """Remove the listeners and log handlers that a test has added."""
    with restore_reporting():
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four tars with 21, 8, 13 and 1 samples of five classes, in all image formats."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, COUNTS)
    return folder


@pytest.fixture
def dataset(shards: Path) -> Dataset:
    return load_dataset(shards)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 23 images in five class folders."""
    return write_image_folder(tmp_path_factory.mktemp("images") / "train", 23)
