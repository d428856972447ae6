"""`python -m tools.bench`: time deformable convolution against others (`make bench`).

Forward and backward of one layer, in float32, on the device that the notebooks would take. The
contenders take turns in every round, each round begins with another of them, and ratios are taken
within a round: so a slow minute of the machine meets all of them alike.
"""

import argparse
import contextlib
import ctypes
import functools
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from src import ROOT, ProjectError, device, provenance, results, settings
from src.results import Metric
from tools.notebooks import definitions

NAME, NOTEBOOK = "deformable_benchmark", "deformable_convolution"
SLOW = ("readable", "grid_sample")  # take part in every second round
RATIOS = ("ours_over_conv", "torchvision_over_ours")  # of which geometric means are given


@dataclass(frozen=True)
class Config:
    shapes: tuple[tuple[int, int, int, int], ...] = (  # batch, in, out, side
        (8, 64, 64, 56),
        (8, 128, 128, 28),
        (32, 64, 64, 32),
        (1, 256, 256, 56),
    )
    rounds: int = 7  # measured, after one round that warms up
    threads: int = 2  # on the CPU
    offset_std: float = 2.0  # pixels, of the normal offsets
    seed: int = 0


def grid_sample_convolution(input, offset, weight):
    """The obvious 3x3 deformable convolution with padding 1: `grid_sample` and a matrix product."""
    batch, _, height, width = input.shape
    y, x, taps = (
        torch.arange(n, dtype=input.dtype, device=input.device) for n in (height, width, 9)
    )
    shift = offset.view(batch, 9, 2, height, width)
    y = y[:, None] + (taps // 3 - 1)[:, None, None] + shift[:, :, 0]  # (N, 9, H, W)
    x = x + (taps % 3 - 1)[:, None, None] + shift[:, :, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1).flatten(1, 2)
    samples = F.grid_sample(input, grid, align_corners=True)  # (N, C, 9 * H, W)
    out = weight.flatten(1) @ samples.view(batch, -1, height * width)
    return out.view(batch, -1, height, width)


def contenders():
    """The functions of (input, offset, weight) that are compared, kernel 3 and padding 1."""
    fast, readable = definitions(NOTEBOOK), definitions(NOTEBOOK)
    readable.fast_product = readable.sampled_product
    return {
        "ours": functools.partial(fast.deform_conv2d, padding=1),
        "torchvision": functools.partial(torchvision.ops.deform_conv2d, padding=1),
        "conv": lambda input, offset, weight: F.conv2d(input, weight, padding=1),
        "readable": functools.partial(readable.deform_conv2d, padding=1),
        "grid_sample": grid_sample_convolution,
    }


def inputs(shape, config, runtime):
    """Input, offset and weight of a shape (batch, in, out, side), normal, asking for gradients."""
    batch, channels, out_channels, side = shape
    generator = torch.Generator().manual_seed(config.seed)
    sizes = (batch, channels, side, side), (batch, 18, side, side), (out_channels, channels, 3, 3)
    scales = 1.0, config.offset_std, (9 * channels) ** -0.5
    tensors = [
        torch.randn(size, generator=generator).mul_(scale) for size, scale in zip(sizes, scales)
    ]
    return [tensor.to(runtime.device).requires_grad_() for tensor in tensors]


def forward_and_backward(function, tensors):
    """Compute the result and its gradients with respect to all tensors that it depends on."""
    out = function(*tensors)
    ones = torch.ones_like(out)
    torch.autograd.grad(out, tensors, ones, allow_unused=True)  # a convolution has no offset


def name_of(shape):
    return "x".join(map(str, shape))


def time_shape(functions, shape, config, runtime):
    """Seconds of each contender in each measured round, {name: list}; None where it sat out."""
    tensors, names = inputs(shape, config, runtime), list(functions)
    seconds = {name: [] for name in names}
    for number in range(config.rounds + 1):  # round 0 warms up
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name in SLOW and number and number % 2 == 0:
                seconds[name].append(None)
                continue
            watch = device.Stopwatch(runtime)
            forward_and_backward(functions[name], tensors)
            if number:
                seconds[name].append(watch.lap())
    return seconds


def _status(key):
    """An entry of /proc/self/status in megabytes."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def own_peak(name, shape, config, runtime):
    """Megabytes that one call takes beside its inputs.

    On the CPU this is only right in a process that has done little else.
    """
    function, small = contenders()[name], (1, *shape[1:3], 4)
    forward_and_backward(function, inputs(small, config, runtime))  # what is loaded once
    tensors = inputs(shape, config, runtime)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
        before = torch.cuda.memory_allocated(runtime.device)
        forward_and_backward(function, tensors)
        return (torch.cuda.max_memory_allocated(runtime.device) - before) / 1e6
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that still count could be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    forward_and_backward(function, tensors)
    return _status("VmHWM") - before


def peak_megabytes(name, shape, config, runtime):
    """Peak memory of one call in megabytes, None where the system does not tell it.

    On the CPU it is measured in a fresh process.
    """
    if runtime.device.type == "cuda":
        return own_peak(name, shape, config, runtime)
    command = [sys.executable, "-m", "tools.bench", "--threads", str(config.threads)]
    command += ["--peak", name, name_of(shape)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


def measures(shapes, seconds, peaks):
    """The metrics.

    Args:
        shapes: those of the config.
        seconds: {shape's name: what `time_shape` gives}.
        peaks: {(shape's name, contender): megabytes}, what could be measured.

    Returns:
        {name: metric}: per shape and contender the median and quartiles of its seconds, and of its
        ratios to ours and to the ordinary convolution, each taken within a round; the peaks;
        geometric means over the shapes.
    """
    metrics = {}

    def add(name, values, unit):
        quartiles = np.percentile(values, [25, 50, 75])
        for suffix, value in zip(("_q1", "", "_q3"), quartiles):
            metrics[name + suffix] = Metric(float(value), len(values), None, unit)

    for shape in map(name_of, shapes):
        rounds = seconds[shape]
        for name in rounds:
            key = f"{shape}.{name}"
            add(f"{key}_seconds", [x for x in rounds[name] if x is not None], "seconds")
            for other in {"ours", "conv"} - {name}:
                pairs = zip(rounds[name], rounds[other])
                add(f"{key}_over_{other}", [a / b for a, b in pairs if a and b], "ratio")
            if (shape, name) in peaks:
                metrics[f"{key}_peak_mb"] = results.single(peaks[shape, name], "megabytes")
    for ratio in RATIOS:
        logarithms = [math.log(metrics[f"{name_of(shape)}.{ratio}"].value) for shape in shapes]
        mean = math.exp(np.mean(logarithms))
        metrics[f"geometric_mean.{ratio}"] = Metric(mean, len(shapes), None, "ratio")
    return metrics


def table(shapes, names, metrics):
    """The metrics as a markdown table."""

    def value(name, factor=1.0, digits=2):
        return f"{factor * metrics[name].value:.{digits}f}" if name in metrics else "–"

    headings = ["batch x in x out x side", "contender", "median (ms)", "quartiles (ms)"]
    headings += ["peak (MB)", "time / ours", "time / conv"]
    rows = []
    for shape in map(name_of, shapes):
        for name in names:
            key = f"{shape}.{name}"
            quartiles = (value(f"{key}_seconds_{q}", 1000) for q in ("q1", "q3"))
            cells = [value(f"{key}_seconds", 1000), " to ".join(quartiles)]
            cells.append(value(f"{key}_peak_mb", digits=0))
            for other in ("ours", "conv"):
                cells.append("1" if name == other else value(f"{key}_over_{other}"))
            rows.append((shape, name, *cells))
    return results.table(headings, rows)


def run(config, runtime):
    """Measure everything, print a table and store the numbers; give the results file's path."""
    clock, functions, seconds, peaks = device.Stopwatch(runtime), contenders(), {}, {}
    torch.set_num_threads(config.threads)
    print(f"Forward and backward, 3x3, {runtime.describe()}, {config.rounds} rounds.")
    print("readable: the notebook's sampled_product; peak: memory of one call beside its inputs.")
    for shape in config.shapes:
        seconds[name_of(shape)] = time_shape(functions, shape, config, runtime)
        for name in functions:
            peak = peak_megabytes(name, shape, config, runtime)
            if peak is not None:
                peaks[name_of(shape), name] = peak
    metrics = measures(config.shapes, seconds, peaks)
    print(table(config.shapes, functions, metrics))
    if not peaks:
        print("Peak memory was not measured: this system does not tell it.")
    for ratio in RATIOS:
        mean = metrics[f"geometric_mean.{ratio}"].value
        print(f"geometric mean over the shapes, {ratio.replace('_', ' ')}: {mean:.2f}")
    code = provenance.code_fingerprint(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb")
    about = dict(profile="bench", source=None, runtime=runtime, seeds=[config.seed], config=config)
    return results.save_results(NAME, metrics, **about, seconds=clock.lap(), fingerprint=code)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description="Times deformable convolution."
    )
    peak = dict(nargs=2, metavar=("CONTENDER", "SHAPE"))
    parser.add_argument("--peak", **peak, help="only print the peak megabytes of one call")
    threads = "on the CPU (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=Config.threads, help=threads)
    options = parser.parse_args(arguments)
    config = Config(threads=options.threads)
    try:
        place = device.choose_device(settings.read().device)
        runtime = device.start(place, "cpu")  # float32, and the notebooks' setting for the memory
        if options.peak:
            torch.set_num_threads(config.threads)
            name, shape = options.peak
            print(own_peak(name, tuple(map(int, shape.split("x"))), config, runtime))
        else:
            print(f"wrote {run(config, runtime).relative_to(ROOT)}")
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
