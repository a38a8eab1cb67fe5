"""Devices are checked before they are used."""

import pytest
import torch

from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.device import pick_device


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu:99", "mtia:99", "hpu", "vulkan", "meta"])
def test_an_unavailable_device_is_refused(name: str) -> None:
    """torch raises five kinds of errors for these, and none for meta, which holds no values."""
    with pytest.raises(UsageError, match="no such device on this machine"):
        pick_device(name)


def test_auto_is_a_gpu_if_available() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
