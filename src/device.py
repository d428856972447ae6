"""The machine that a run uses: device, precision, seeds, clocks."""

import contextlib
import ctypes
import dataclasses
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from src.provenance import machine

GIGABYTE = 1e9
GPU = "cuda"  # as PyTorch calls it; the tests put a fake one here
# Least memory of the card in bytes and least compute capability of the two sizes for GPUs; an
# "8 GB" card offers a little less than its name says, a "24 GB" one as well.
GPU_PROFILES = {"gpu_full": (23.5 * GIGABYTE, (8, 0)), "gpu": (7 * GIGABYTE, (7, 0))}


@dataclass(frozen=True)
class Runtime:
    """Device, precision and memory format of a run."""

    device: torch.device
    autocast: torch.dtype | None = None  # the type of forward passes and losses; None is float32
    memory_format: torch.memory_format = torch.channels_last

    def precision(self):
        """The context in which forward passes and losses are computed."""
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled)

    def full_precision(self):
        """The context for what needs float32, such as positions."""
        return torch.autocast(self.device.type, enabled=False)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module to the device, in the run's memory format."""
        return module.to(self.device, memory_format=self.memory_format)

    def synchronize(self) -> None:
        """Wait until the device has finished: without it, a GPU's clock stops too early."""
        if self.device.type == GPU:
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        kind = {None: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        suffix = " autocast" if self.autocast else ""
        return f"{machine(self.device)}, {kind[self.autocast]}{suffix}"


def choose_device(requested: str | None = None) -> torch.device:
    """Choose CUDA where a kernel really runs there, else the CPU; print why a GPU is not used.

    Args:
        requested: "cpu" or "cuda" (`HW3_DEVICE`), or None.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if requested == "cuda" or os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi"):
            why = (
                "its driver is missing or too old for this PyTorch (CUDA "
                f"{torch.version.cuda}), or another program has locked it"
                if torch.version.cuda
                else "this PyTorch is built without CUDA"
            )
            print(f"No GPU can be used: {why}. The run goes on on the CPU.")
        return torch.device("cpu")
    device = torch.device(GPU)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products may vary
    try:  # a card that PyTorch has no kernels for counts as available; only a kernel tells
        x = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
        torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3, device=device)).sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        name = ""
        with contextlib.suppress(RuntimeError):  # a card that does not even start has no name
            name = f" {machine(device)}"
        print(
            f"The GPU{name} cannot be used with this PyTorch ({reason}). "
            "The run goes on on the CPU."
        )
        return torch.device("cpu")
    return device


def choose_profile(device: torch.device) -> str:
    """Name the largest profile that fits the device: "gpu_full", "gpu" or "cpu"; print why."""
    if device.type != GPU:
        return "cpu"
    memory = torch.cuda.get_device_properties(device).total_memory
    free, capability = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_capability(device)
    text = f"{machine(device)}, {memory / GIGABYTE:.0f} GB ({free / GIGABYTE:.0f} free)"
    for name, (least, version) in GPU_PROFILES.items():
        if memory >= least and free >= 0.85 * least and capability >= version:
            print(f"Profile {name}: {text}.")
            return name
    least = GPU_PROFILES["gpu"][0] / GIGABYTE
    print(
        f"Profile cpu, on the GPU: {text}, capability {capability[0]}.{capability[1]}; profile gpu "
        f"needs {least:.0f} GB, most of them free, and capability 7.0."
    )
    return "cpu"


def autocast_type(device: torch.device, profile: str) -> torch.dtype | None:
    """The type of mixed precision: the `gpu` profiles' where the card has fast kernels for it.

    bfloat16 convolutions are slow below capability 8.0, where PyTorch still calls the type
    supported; there float16 with a gradient scaler takes its place.
    """
    if device.type != GPU or profile not in GPU_PROFILES:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) else None


def start(device: torch.device, profile: str) -> Runtime:
    """Set PyTorch up for runs that can be repeated, and give the runtime."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, positions need it
    torch.set_flush_denormal(True)  # denormal gradients slow a CPU down and change nothing else
    _keep_freed_memory()
    autocast = autocast_type(device, profile)
    # Without a half-width type, old cards are slower with the channels last.
    plain = device.type == GPU and autocast is None
    return Runtime(device, autocast, torch.contiguous_format if plain else torch.channels_last)


def faster_precision(runtime: Runtime, step: Callable[[], object], gain: float = 1.2) -> Runtime:
    """Choose bfloat16 on a CPU where a step is faster with it by a factor of `gain`.

    Some processors multiply faster in bfloat16, others slower; on a GPU nothing is changed.

    Args:
        step: a forward and backward pass, called several times under each precision.
    """
    if runtime.device.type != "cpu":
        return runtime
    candidates = [dataclasses.replace(runtime, autocast=kind) for kind in (None, torch.bfloat16)]
    fastest = dict.fromkeys(candidates, math.inf)
    for number in range(9):  # in turns, so that a slow moment meets both
        for candidate in candidates:
            watch = Stopwatch(candidate)
            with candidate.precision():
                step()
            if number:  # the first round warms up
                fastest[candidate] = min(fastest[candidate], watch.lap())
    plain, half = fastest
    return half if fastest[half] * gain < fastest[plain] else plain


def main_memory() -> float | None:
    """Bytes of this machine's main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is full, the machine's or its GPU's; libraries have words of their own."""
    words = (
        *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
        *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    )
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def _keep_freed_memory() -> None:
    """Let the C library keep large freed blocks.

    Otherwise every activation's pages are fetched from the kernel anew.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is kept while the process runs


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Stopwatch:
    """Seconds since it was made or since the last `lap`, the device's work included."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.lap()

    def lap(self) -> float:
        self.runtime.synchronize()
        now = time.perf_counter()
        seconds, self.began = now - getattr(self, "began", now), now
        return seconds
