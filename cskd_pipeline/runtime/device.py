"""Devices, memory formats, compilation, and limits on cores and memory."""

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cskd_pipeline.errors import MissingPackageError, UsageError

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device for ``auto`` (CUDA if available) or for a torch device string."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # unknown name, no driver or kernels, no data (meta); a build without it; no module for it
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            "no such device on this machine", where="device", found=name, expected="cpu, cuda, auto"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def use_threads(threads: int) -> None:
    """Let networks on the CPU use ``threads`` threads; 0 keeps torch's default, one per core.

    Loader processes need cores too: on few cores, one thread can be many times faster than two
    that wait for each other. The last bits of CPU results depend on the number of threads.
    """
    if threads > 0:
        torch.set_num_threads(threads)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format of a network's weights and images: convolutions depend on both."""
    return torch.channels_last if channels_last else torch.contiguous_format


def place(network: N, device: torch.device | str, channels_last: bool) -> N:
    """Move ``network`` to a device and into a memory format, in place.

    Only four-dimensional tensors are converted: ``Module.to`` would fail on five-dimensional ones.
    """
    network.to(device)
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=memory_format(channels_last))
    return network


def compile_for(function: Callable[..., T], device: torch.device | str) -> Callable[..., T]:
    """Return ``torch.compile(function)`` after checking that this machine can compile.

    Raises:
        MissingPackageError: generated code cannot be built, for example without a C compiler.
    """
    length = 2 + int.from_bytes(os.urandom(2), "big")  # a new shape, so that no cached code is used
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(length, device=device))
    except Exception as problem:  # from torch or the tools that it calls
        raise MissingPackageError(
            "torch.compile does not work on this machine",
            found=str(problem).partition("\n")[0],
            expected="a working C and C++ compiler, and Triton on a GPU",
            action="install gcc and g++ (on Debian: apt install build-essential), or set "
            "run.compile=false for train, dump.compile=false for dump-teacher",
        ) from problem
    return torch.compile(function)


def worker_count(workers: int) -> int:
    """Return ``workers``; for -1 the number of available cores minus one, at least one."""
    return workers if workers >= 0 else max(1, cores() - 1)


def cores() -> int:
    """Return the number of cores available to this process.

    That is a container's or Slurm job's share if the system reports it; macOS does not.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_limit(root: Path = Path("/")) -> int:
    """Return the bytes of memory of this machine, or the limit of a container or Slurm job."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kind, own = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            name = "memory.limit_in_bytes" if kind else "memory.max"
            top = root / "sys/fs/cgroup" / kind
            group = top / own.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # absent, or "max"
                    limits.append(int((folder / name).read_text()))
                if folder == top:
                    break
    return min(limits)


def all_finite(*logits: Tensor) -> bool:
    """Return whether float16 tensors contain no NaN or infinity; wait for the device.

    Finite float16 values always have a finite float32 sum, so this takes one pass and no mask.
    """
    return all(bool(values.sum(dtype=torch.float32).isfinite()) for values in logits)
