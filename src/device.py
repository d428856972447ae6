"""The machine a run stands on: device, precision, seeds, clocks."""

import contextlib
import ctypes
import os
import platform
import random
import time
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Runtime:
    """Where and how the tensors of a run live."""

    device: torch.device
    autocast: bool  # bfloat16 autocast of forward and loss; the gpu profile's
    memory_format: torch.memory_format = (
        torch.channels_last
    )  # faster for convolutions on CPU and GPU alike

    def precision(self):
        """The context in which forward passes and losses are computed."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Moves a module to the device, in the run's memory format."""
        return module.to(self.device, memory_format=self.memory_format)

    def synchronise(self) -> None:
        """Waits until the device has finished: without it, a GPU's clock stops too early."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        precision = "bfloat16 autocast" if self.autocast else "float32"
        return f"{machine(self.device)}, {precision}"


def start(profile: str) -> Runtime:
    """Sets PyTorch up for reproducible runs and picks the device (CUDA where there is one)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True  # same seed, same machine: same numbers
    torch.backends.cudnn.benchmark = False
    torch.set_flush_denormal(
        True
    )  # denormal gradients slow a CPU down and change no result worth keeping
    _keep_freed_memory()
    return Runtime(device, autocast=profile == "gpu")


def _keep_freed_memory() -> None:
    """Lets the C library keep large freed blocks: otherwise every activation's pages are fetched from the kernel anew."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        mallopt(
            -1, 2**31 - 1
        )  # M_TRIM_THRESHOLD: the heap is not given back while the process runs


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def machine(device: torch.device) -> str:
    """One line on the hardware, for results and timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(
                (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                name,
            )
    return f"{name}, {torch.get_num_threads()} threads"


class Stopwatch:
    """Seconds since it was made or since the last `lap`, the device's work included."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.lap()

    def lap(self) -> float:
        self.runtime.synchronise()
        now = time.perf_counter()
        seconds, self.began = now - getattr(self, "began", now), now
        return seconds
