"""`python -m tools.bench`: time deformable convolution against others (`make bench`).

Forward and backward of one layer, in float32, on the device that the notebooks would take. The
contenders take turns in every round, and ratios are taken within a round: so a slow minute of the
machine meets all of them alike. On a CPU everything is repeated beside a program that keeps one
processor busy.
"""

import contextlib
import functools
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from src import ProjectError, device, stats
from src.run import start
from tools.notebooks import definitions, print_anything


@dataclass(frozen=True)
class Config:
    shapes: tuple[tuple[int, int, int, int], ...] = (  # batch, channels in, out, side
        (8, 64, 64, 56),
        (8, 128, 128, 28),
        (32, 64, 64, 32),
        (1, 256, 256, 56),
    )
    rounds: int = 7  # measured, after one round that warms up
    offset_std: float = 2.0  # pixels, of the normal offsets
    seed: int = 0


CPU = Config()
CONFIGS = {
    "smoke": replace(CPU, shapes=((2, 4, 4, 5),), rounds=2),
    "demo": replace(CPU, rounds=2),
    "cpu": CPU,
    "gpu": CPU,
}


def grid_sample_convolution(input, offset, weight):
    """The obvious 3x3 deformable convolution with padding 1: `grid_sample` and a matrix product."""
    batch, _, height, width = input.shape
    y, x, taps = (torch.arange(n, device=input.device) for n in (height, width, 9))
    shift = offset.view(batch, 9, 2, height, width)
    y = y[:, None] + (taps // 3 - 1)[:, None, None] + shift[:, :, 0]  # (N, 9, H, W)
    x = x + (taps % 3 - 1)[:, None, None] + shift[:, :, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1).flatten(1, 2)
    samples = F.grid_sample(input, grid, align_corners=True)  # (N, C, 9 * H, W)
    out = weight.flatten(1) @ samples.view(batch, -1, height * width)
    return out.view(batch, -1, height, width)


def contenders():
    """The functions of (input, offset, weight) that are compared, kernel 3 and padding 1."""
    fast, readable = definitions("deformable_convolution"), definitions("deformable_convolution")
    readable.product = readable.sampled_product
    return {
        "conv": lambda input, offset, weight: F.conv2d(input, weight, padding=1),
        "ours": functools.partial(fast.deform_conv2d, padding=1),
        "readable": functools.partial(readable.deform_conv2d, padding=1),
        "grid_sample": grid_sample_convolution,
        "torchvision": functools.partial(torchvision.ops.deform_conv2d, padding=1),
    }


def inputs(shape, config, place):
    """Input, offset and weight of a shape (batch, in, out, side), normal, asking for gradients."""
    batch, channels, outputs, side = shape
    generator = torch.Generator().manual_seed(config.seed)
    sizes = (batch, channels, side, side), (batch, 18, side, side), (outputs, channels, 3, 3)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[1] *= config.offset_std
    tensors[2] /= (9 * channels) ** 0.5
    return [tensor.to(place).requires_grad_() for tensor in tensors]


def compute(function, tensors):
    """Compute the result and its gradients with respect to all tensors that it depends on."""
    out = function(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out), allow_unused=True)


def time_in_turns(functions, tensors, rounds, place):
    """Milliseconds of each function in each round; round 0 warms up and is left out."""
    milliseconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            watch = device.Stopwatch(place)
            compute(function, tensors)
            milliseconds[name].append(1000 * watch.lap())
    return {name: np.array(values[1:]) for name, values in milliseconds.items()}


@contextlib.contextmanager
def busy_processor():
    """Another program that never rests."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield
        process.kill()


def peak(name, shape, config):
    """Megabytes that one call needs at most, in a fresh process; an OSError outside of Linux."""
    function, tensors = contenders()[name], inputs(shape, config, "cpu")
    process = Path("/proc/self")

    def kilobytes(entry):
        status = (process / "status").read_text(encoding="ascii")
        return int(re.search(rf"{entry}:\s+(\d+)", status)[1])

    (process / "clear_refs").write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    compute(function, tensors)
    return (kilobytes("VmHWM") - before) / 1000


def measure(run):
    """All metrics of the benchmark."""
    config, metrics, functions = run.config, {}, contenders()
    for shape in config.shapes:
        label, tensors = "x".join(map(str, shape)), inputs(shape, config, run.device)
        for kind, beside in (("", contextlib.nullcontext), ("busy_", busy_processor)):
            if kind and run.device.type != "cpu":
                continue
            some = {k: f for k, f in functions.items() if not kind or k in ("ours", "torchvision")}
            with beside():
                values = time_in_turns(some, tensors, config.rounds, run.device)
            for name, each in values.items():
                metrics[f"{label}.{name}.{kind}milliseconds"] = stats.mean(each, "milliseconds")
            ratio = stats.mean(values["torchvision"] / values["ours"], "times")
            metrics[f"{label}.{kind}torchvision_over_ours"] = ratio
            print(
                f"{label} {kind}: "
                + ", ".join(f"{k} {np.median(v):.0f}" for k, v in values.items())
                + f" ms; torchvision over ours {ratio}",
                flush=True,
            )
    for name in ("ours", "torchvision"):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool, contextlib.suppress(OSError):
            megabytes = pool.submit(peak, name, config.shapes[0], config).result()
            metrics[f"{name}.megabytes"] = stats.Estimate(megabytes, 1, None, "MB")
            print(f"{name}: {megabytes:.0f} MB a call, first shape")
    return metrics


def main():
    print_anything()
    try:
        run = start("deformable_benchmark", CONFIGS)
        run.save(measure(run), [run.config.seed])
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
