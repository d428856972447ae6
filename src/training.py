"""Train, keep the best epoch, survive interruptions; save and load models."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src import ROOT, ProjectError
from src.device import Runtime, Stopwatch, is_out_of_memory, seed_everything
from src.files import replacing
from src.provenance import code_fingerprint, object_digest

CHECKPOINTS = ROOT / "data" / "checkpoints"
TIMED = 10  # steps from which a training's time is estimated
LONG = 180  # seconds from which on that is said


class RunningMean:
    """Means over samples, not over batches: a ragged last batch counts by its size."""

    def __init__(self):
        self.sums, self.count = defaultdict(float), 0

    def add(self, values: dict, n: int) -> None:
        """Add the means of one batch of n samples, floats or zero-dimensional tensors."""
        for name, value in values.items():
            self.sums[name] = (
                self.sums[name] + (value.detach() if torch.is_tensor(value) else value) * n
            )
        self.count += n

    def result(self) -> dict[str, float]:
        if not self.count:
            raise ProjectError("No samples to average over: the data set or the loader is empty.")
        return {name: float(total) / self.count for name, total in self.sums.items()}


@dataclass
class History:
    """What a training showed: one dict of numbers per epoch, and which epoch was kept."""

    epochs: list[dict[str, float]]
    best_epoch: int  # counted from 1, chosen on validation
    seconds: float  # training and validation together

    def column(self, name: str) -> list[float]:
        return [epoch[name] for epoch in self.epochs]


def make_optimizer(
    parts: Sequence[tuple[nn.Module | Iterable[nn.Parameter], float]],
    weight_decay: float,
    total_steps: int,
    warmup: float = 0.25,
):
    """AdamW with one learning-rate cycle (Loshchilov and Hutter 2019; Smith and Topin 2017).

    Only kernels and matrices decay; biases and BatchNorm's parameters do not. The momentum is not
    cycled.

    Args:
        parts: (module or parameters, peak learning rate); frozen parameters are left out.
        weight_decay: decoupled, of parameters with two or more dimensions.
        total_steps: optimization steps of the whole training.
        warmup: share of the steps in which the learning rate rises.

    Returns:
        The optimizer and the scheduler, which is stepped after every batch.
    """
    groups = []
    for part, lr in parts:
        parameters = part.parameters() if isinstance(part, nn.Module) else part
        trained = [p for p in parameters if p.requires_grad]
        for decay, chosen in (
            (weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, fused=True)  # one pass over all parameters
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=max(total_steps, 10),  # a cycle of fewer steps has no room for its warm-up
        pct_start=warmup,
        cycle_momentum=False,
    )
    return optimizer, lr_scheduler


def fit(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler,
    batches: Callable[[int], Iterable],
    step: Callable[[Any, int], tuple[Tensor, dict[str, Tensor], int]],
    validate: Callable[[], dict[str, float]],
    *,
    epochs: int,
    seed: int,
    runtime: Runtime,
    ema_decay: float | None = None,
    quiet: bool = False,
) -> History:
    """Train a model and keep the epoch with the lowest validation loss.

    Random numbers are seeded from (seed, epoch) when an epoch begins, and a checkpoint is written
    when it ends, so a training that is interrupted and started again ends with the same numbers as
    one that ran through. A checkpoint is only continued by the same code on the same data. Where
    the device's memory does not suffice, a step is repeated in halves whose gradients are added up;
    but for BatchNorm's statistics and losses that compare within a batch, that is the same step.

    Args:
        name: names the training in the progress bar and in its checkpoint.
        model: in training mode during every epoch; ends with the weights of the best one.
        optimizer: holds the parameters that train.
        lr_scheduler: stepped after every batch, or None.
        batches: called with the epoch (from 0); gives a sized iterable of batches, each a tensor or
            a tuple of tensors with the samples along the first dimension.
        step: called with (batch, epoch) in the run's precision; gives (loss, metrics, n), the loss
            being a mean over n samples, metrics a dict of further means over the same samples.
        validate: called with no argument in the run's precision; gives a dict of means on the
            validation split, "loss" among them.
        epochs: how often `batches` is asked.
        seed: of this training.
        runtime: device and precision.
        ema_decay: where given, weights averaged over the steps with this decay (Polyak and Juditsky
            1992) are validated and kept instead of the last ones.
        quiet: whether to leave out the line that is printed for every epoch.

    Returns:
        The history, with keys `train_*` from `step`, `val_*` from `validate`, and `seconds`.

    Raises:
        ProjectError: if the loss is not finite, a batch iterable is empty, or the memory does not
            even suffice for one sample.
    """
    identity = object_digest(
        [name, seed, epochs, str(runtime.device), str(runtime.autocast), torch.__version__],
        [group | {"params": None} for group in optimizer.state_dict()["param_groups"]],
        [_code(), lr_scheduler and lr_scheduler.state_dict()],
        [ema_decay, model, batches, step, validate],
    )
    checkpoint = CHECKPOINTS / f"{name.replace(' ', '_')}-{identity}.pt"
    scaler = torch.amp.GradScaler(
        runtime.device.type, init_scale=1024, enabled=runtime.autocast is torch.float16
    )
    stateful = {"model": model, "optimizer": optimizer, "scaler": scaler}
    stateful |= {"lr_scheduler": lr_scheduler} if lr_scheduler else {}

    stepper = _Stepper(name, model, optimizer, lr_scheduler, scaler, step, runtime)
    history, best = [], None
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema_decay else None
    saved = _read_checkpoint(checkpoint, [*stateful, "history", "best", "average", "steps"])
    if saved:
        for key, part in stateful.items():
            part.load_state_dict(saved[key])
        history, best, average = (saved[key] for key in ("history", "best", "average"))
        stepper.steps = saved["steps"]
        print(
            f"{name}: continues after epoch {len(history)} of {epochs}, where it was interrupted."
        )

    begun = len(history)
    for epoch in range(begun, epochs):
        seed_everything(seed * 10_000 + epoch)
        model.train()
        means, watch = RunningMean(), Stopwatch(runtime)
        label = f"{name}: epoch {epoch + 1} of {epochs}"
        of_epoch, pace = batches(epoch), Stopwatch(runtime)
        bar = tqdm(of_epoch, desc=label, leave=False, mininterval=0.5)
        for number, batch in enumerate(bar, start=1):
            for values, n in stepper(batch, epoch):
                means.add(values, n)
            if average:
                _update_average(average, model, ema_decay, stepper.steps)
            if number == TIMED and epoch == begun:
                _say_time(name, pace.lap() / TIMED * len(of_epoch) * (epochs - epoch))
        row = {f"train_{key}": value for key, value in means.result().items()}
        if not all(abs(value) < float("inf") for value in row.values()):
            raise ProjectError(
                f"{name}: the loss is not finite in epoch {epoch + 1}; lower the learning rate."
            )
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average or state)
        model.eval()
        with torch.inference_mode(), runtime.precision():
            row |= {f"val_{key}": value for key, value in validate().items()}
        row["seconds"] = watch.lap()
        history.append(row)
        if best is None or row["val_loss"] < history[best["epoch"]]["val_loss"]:
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            best = {"epoch": epoch, "weights": weights}
        model.load_state_dict(state)
        states = {key: part.state_dict() for key, part in stateful.items()}
        states |= {"history": history, "best": best, "average": average, "steps": stepper.steps}
        _save(states, checkpoint)
        if not quiet:
            numbers = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "seconds")
            print(f"{label}: {numbers}, {row['seconds']:.0f} s")

    model.load_state_dict(best["weights"])
    model.eval()
    checkpoint.unlink(missing_ok=True)
    return History(history, best["epoch"] + 1, sum(row["seconds"] for row in history))


def _say_time(name: str, seconds: float) -> None:
    """Say how long a training takes, where that is long."""
    if seconds >= LONG:
        print(
            f"{name}: about {seconds / 60:.0f} min on this machine, at the pace of its first "
            f"{TIMED} steps; HW3_PROFILE=demo asks for less"
        )


class _Stepper:
    """One optimization step after the other, cut into parts where the memory asks for it."""

    def __init__(self, name, model, optimizer, lr_scheduler, scaler, step, runtime):
        self.name, self.model, self.step, self.runtime = name, model, step, runtime
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.parts, self.steps = 1, 0

    def __call__(self, batch, epoch: int) -> list[tuple[dict, int]]:
        """Take one step; give the means and the number of samples of each part of the batch."""
        while True:
            try:
                seen = self._gradients(batch, epoch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = _size(batch)
                if self.parts >= size:
                    raise ProjectError(
                        f"{self.name}: the memory of the device does not suffice for one sample: "
                        "close other programs, or set HW3_PROFILE=cpu or HW3_DEVICE=cpu."
                    ) from None
                self.parts = min(2 * self.parts, size)
                print(
                    f"{self.name}: out of memory; steps are taken in {self.parts} parts, whose "
                    "gradients are added up (BatchNorm sees each part)."
                )
            # Here the exception is gone, and with it the activations that its frames held.
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.lr_scheduler and self.scaler.get_scale() >= before:  # else the step was skipped
            self.lr_scheduler.step()
        self.steps += 1
        return seen

    def _gradients(self, batch, epoch: int) -> list[tuple[dict, int]]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(self.parts, _size(batch))  # the last batch may be smaller
        pieces = [batch] if parts == 1 else _cut(batch, parts)
        seen = []
        for piece in pieces:
            with self.runtime.precision():
                loss, metrics, n = self.step(piece, epoch)
            share = 1.0 if parts == 1 else _size(piece) / _size(batch)
            self.scaler.scale(loss * share).backward()
            values = {"loss": loss, **metrics}
            seen.append(
                ({k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()}, n)
            )
            del loss, metrics, values  # what hangs on them must not stand beside the next part
        return seen


def _tensors(batch) -> list[Tensor]:
    if torch.is_tensor(batch):
        return [batch]
    return [x for part in batch for x in _tensors(part)] if isinstance(batch, (tuple, list)) else []


def _size(batch) -> int:
    return max((len(x) for x in _tensors(batch)), default=1)


def _cut(batch, parts: int) -> list:
    if torch.is_tensor(batch):
        return list(batch.tensor_split(parts))
    if isinstance(batch, (tuple, list)):
        return [tuple(pieces) for pieces in zip(*(_cut(part, parts) for part in batch))]
    return [batch] * parts


@torch.no_grad()
def _update_average(average: dict, model: nn.Module, decay: float, steps: int) -> None:
    """Move the averaged weights towards the model's; quickly at first, when few have been seen."""
    weight = 1 - min(decay, (1 + steps) / (10 + steps))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, weight)
        else:
            average[key].copy_(value)


@functools.cache
def _code() -> str:
    """The fingerprint of `src`, as a training also depends on code that its objects do not show."""
    return code_fingerprint()


def _read_checkpoint(path: Path, keys: Iterable[str]) -> dict | None:
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)
        return {key: saved[key] for key in keys}
    except (
        Exception
    ) as error:  # torch.load raises many kinds; a broken file must not stop a training
        print(
            f"The checkpoint {path.name} cannot be read ({type(error).__name__}): starting afresh."
        )
        return None


def _save(content, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # how torch.save reports a full disk
        if isinstance(error, ProjectError):
            raise
        raise ProjectError(
            f"{path.name} cannot be written in {path.parent.name}/ ({error}): free space."
        ) from error


# --- models ---------------------------------------------------------------------------------------
def save_model(model: nn.Module, path: Path, config=None) -> None:
    """Save a model's weights with the configuration that builds it.

    Matrices and kernels are stored as float16: half the size, float32 again when loaded.

    Args:
        config: a dataclass, stored as plain values for `load_model`.
    """
    # Vectors stay float32: they are small, and a BatchNorm's variance can pass float16's range.
    state = {
        k: v.half() if v.is_floating_point() and v.ndim > 1 else v
        for k, v in model.state_dict().items()
    }
    plain = json.loads(json.dumps(asdict(config))) if config else {}
    _save({"config": plain, "state": {k: v.cpu() for k, v in state.items()}}, Path(path))


def load_model(build: Callable[[dict], nn.Module], path: Path) -> nn.Module:
    """Load a model that `save_model` stored.

    Args:
        build: called with the stored configuration as a dict; gives a model of that architecture.
        path: the file.

    Raises:
        ProjectError: if the file is missing, unreadable, of another model, or holds no numbers.
    """
    path = Path(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        config, state = content["config"], content["state"]
        stored = {k: v.shape for k, v in state.items()}
    except FileNotFoundError:
        raise ProjectError(
            f"There is no model file {path.name}: run the notebook that trains it."
        ) from None
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise ProjectError(
            f"{path.name} is not a model file ({type(error).__name__}): train the model again."
        ) from None
    try:
        model = build(config)
    except ProjectError:
        raise
    except Exception as error:  # the stored configuration can be anything
        raise ProjectError(
            f"{path.name} holds a configuration that does not fit ({type(error).__name__}: "
            f"{error}): train the model again."
        ) from None
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    if wanted != stored:
        differing = sorted(
            (k for k in wanted.keys() | stored.keys() if wanted.get(k) != stored.get(k)), key=str
        )
        raise ProjectError(
            f"{path.name} is of another model ({len(differing)} entries differ, first "
            f"{differing[0]!r}): build the model that it was saved from, or train again."
        )
    if not all(v.isfinite().all() for v in state.values() if v.is_floating_point()):
        raise ProjectError(f"{path.name} holds values that are not finite: train the model again.")
    model.load_state_dict(state)
    return model
