"""Devices are looked at before anything is begun on them."""

import pytest
import torch

from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.device import pick_device


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu:99", "mtia:99", "hpu", "vulkan", "meta"])
def test_a_device_that_is_not_there_is_refused_in_one_way(name: str) -> None:
    """torch raises five kinds of errors for these, and none for meta, which holds no values."""
    with pytest.raises(UsageError, match="no such device on this machine"):
        pick_device(name)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
