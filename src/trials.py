"""Train, score and time many small networks on the same samples."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from src import device, training


@torch.inference_mode()
def score(
    model: nn.Module, losses: Callable, load: Callable, n: int, size: int = 128
) -> dict[str, Tensor]:
    """Score n samples one by one.

    Args:
        losses: called with the model's logits and foreground, masks and labels; gives {name: (B,)}.
        load: called with indices; gives the model's input, masks and labels on the device.
        size: samples at once.

    Returns:
        {name: (n,) on the CPU}, and the class that was "found".
    """
    rows = []
    for index in torch.arange(n).split(size):
        inputs, masks, labels = load(index)
        logits, foreground = model(inputs)
        row = losses(logits, foreground, masks, labels) | {"found": logits.argmax(dim=1)}
        rows.append({name: value.cpu() for name, value in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def train(
    name: str,
    model: nn.Module,
    parts: Sequence,
    losses: Callable,
    load: Callable,
    n: int,
    load_val: Callable,
    n_val: int,
    *,
    epochs: int,
    per_epoch: int,
    seed: int,
    config,
    runtime: device.Runtime,
) -> training.History:
    """Train a model with one learning-rate cycle, keeping the epoch with the best validation loss.

    Args:
        parts: for `training.make_optimizer`.
        losses: as in `score`; the mean of its "loss" is minimised.
        load: called with (indices, epoch), `load_val` with indices; as in `score`.
        n, n_val: numbers of training and validation samples.
        per_epoch: training samples of an epoch, drawn anew.
        config: with `batch_size` and `weight_decay`.
    """
    steps = epochs * math.ceil(min(per_epoch, n) / config.batch_size)
    optimizer, lr_scheduler = training.make_optimizer(parts, config.weight_decay, steps)

    def step(index, epoch):
        inputs, masks, labels = load(index, epoch)
        means = {k: v.mean() for k, v in losses(*model(inputs), masks, labels).items()}
        return means.pop("loss"), means, len(index)

    def validate():
        scores = score(model, losses, load_val, n_val)
        return {key: float(v.mean()) for key, v in scores.items() if key != "found"}

    def batches(epoch):
        return torch.randperm(n)[:per_epoch].split(config.batch_size)

    return training.fit(
        name,
        model,
        optimizer,
        lr_scheduler,
        batches,
        step,
        validate,
        epochs=epochs,
        seed=seed,
        runtime=runtime,
        quiet=True,
    )


@torch.inference_mode()
def seconds_per_sample(functions: Mapping, inputs, n: int, runtime, rounds: int = 7) -> dict:
    """Median seconds per sample of each {key: function of the inputs}; they take turns."""
    seconds = {key: [] for key in functions}
    for number in range(rounds + 1):
        for key, function in functions.items():
            watch = device.Stopwatch(runtime)
            function(inputs)
            if number:  # the first round warms up
                seconds[key].append(watch.lap() / n)
    return {key: float(np.median(values)) for key, values in seconds.items()}


def count_macs(head: nn.Module, shapes: Sequence[tuple[int, ...]]) -> int:
    """Multiply-accumulates of one of the notebook's heads for one view.

    Convolutions at every position of their map, the offset branches among them where they read the
    input; the sampling takes four products per sample and channel.

    Args:
        shapes: (C, s, s) of the levels that the head reads, finest first.
    """
    positions = math.prod(shapes[0][1:])
    macs = sum(f.weight.numel() * math.prod(s[1:]) for f, s in zip(head.reduce, shapes))
    for layer in (*(block[0] for block in head.layers), head.foreground):
        macs += layer.weight.numel() * positions
        if branch := getattr(layer, "offset_branch", None):
            macs += branch.weight.numel() * positions if branch.weight.requires_grad else 0
            macs += 4 * layer.weight[0].numel() * positions
    return macs + head.classifier.weight.numel()
