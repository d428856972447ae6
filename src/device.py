"""The machine that a run uses: device, precision, seeds, clocks."""

import contextlib
import ctypes
import os
import platform
import random
import shutil
import time

import numpy as np
import torch

GIGABYTE = 1e9
# What profile `gpu` needs: memory of the card (an "8 GB" card offers a little less than its name
# says), most of it free, and compute capability.
LEAST_MEMORY, LEAST_CAPABILITY = 7 * GIGABYTE, (7, 0)


def choose(requested=None):
    """Choose CUDA where a kernel really runs there, else the CPU; print why a GPU is not used.

    `requested` is "cpu" or "cuda" (`HW3_DEVICE`), or None.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if requested == "cuda" or os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi"):
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
            print(
                f"No GPU can be used: PyTorch, built for {built}, sees none (driver missing, too "
                "old, or held by another program). The run goes on on the CPU."
            )
        return torch.device("cpu")
    device = torch.device("cuda")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products may vary
    try:  # a card that PyTorch has no kernels for counts as available; only a kernel tells
        x = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
        torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3, device=device)).sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        print(f"The GPU cannot be used with this PyTorch ({reason}). The run goes on on the CPU.")
        return torch.device("cpu")
    return device


def profile_for(device):
    """Name the profile that fits a device, "gpu" or "cpu"; print why a GPU does not get its own."""
    if device.type == "cpu":
        return "cpu"
    free, total = torch.cuda.mem_get_info(device)
    capability = torch.cuda.get_device_capability(device)
    if min(total, free / 0.85) >= LEAST_MEMORY and capability >= LEAST_CAPABILITY:
        return "gpu"
    print(
        f"Profile cpu on this GPU: it has {total / GIGABYTE:.0f} GB ({free / GIGABYTE:.0f} free) "
        f"and capability {capability[0]}.{capability[1]}; profile gpu needs "
        f"{LEAST_MEMORY / GIGABYTE:.0f} GB, most of them free, and capability 7.0."
    )
    return "cpu"


def autocast_type(device, profile):
    """The type of mixed precision in profile `gpu`; None is float32.

    bfloat16 convolutions are slow below capability 8.0, where PyTorch still calls the type
    supported; there float16 with a gradient scaler takes its place.
    """
    if device.type == "cpu" or profile != "gpu":
        return None
    newer = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if newer else torch.float16


def prepare():
    """Set PyTorch up for runs that can be repeated."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, positions need it
    torch.set_flush_denormal(True)  # denormal gradients slow a CPU down and change nothing else
    # Let the C library keep large freed blocks: otherwise the kernel hands out every activation's
    # pages anew, and a training step on a CPU takes half as long again.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is kept while the process runs


def machine(device):
    """One line on the hardware, for results and timings."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(models, name)
    return f"{name}, {torch.get_num_threads()} threads"


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Stopwatch:
    """Seconds since it was made or since the last `lap`, the device's work included."""

    def __init__(self, device):
        self.device, self.began = device, time.perf_counter()

    def lap(self):
        if self.device.type != "cpu":  # without waiting, a GPU's clock stops too early
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        return seconds
