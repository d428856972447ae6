"""The one training loop of all notebooks."""

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from src import ROOT, ProjectError
from src.device import Runtime, Stopwatch, seed_everything


class Means:
    """Means over samples, not over batches: a ragged last batch counts by its size."""

    def __init__(self):
        self.sums, self.count = defaultdict(float), 0

    def add(self, values: dict, n: int) -> None:
        """Adds the means of one batch of n samples; values are floats or zero-dimensional tensors."""
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


def fit(
    name: str,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    batches,
    step,
    validate,
    *,
    epochs: int,
    seed: int,
    runtime: Runtime,
    monitor: str,
    lr_schedule=None,
    config=None,
    checkpoint_dir: Path | None = None,
) -> History:
    """Trains a model, keeps the epoch with the lowest validation value, and can be interrupted.

    Random numbers are seeded from (seed, epoch) when an epoch begins, so an interrupted
    training that is started again ends with the same numbers as one that ran through.

    Args:
        name: names the training in the progress bar and in its checkpoint.
        model: put in training mode before every epoch; ends with the best epoch's weights.
        optimiser: holds the parameters that train.
        batches: called with the epoch (from 0); gives a sized iterable of batches.
        step: called with (batch, epoch); gives (loss, metrics, n), the loss being a mean over
            n samples, metrics a dict of further means over the same samples.
        validate: called with no argument; gives a dict of means on the validation split.
        epochs: how often `batches` is asked.
        seed: of this training.
        runtime: device and precision.
        monitor: the validation value that chooses the epoch; lower is better.
        lr_schedule: a learning-rate scheduler stepped after every batch, or None.
        config: a dataclass; a checkpoint of another configuration is never continued.
        checkpoint_dir: where the checkpoint of a running training lies; default `data/checkpoints`.

    Returns:
        The history, with keys `train_*` from `step`, `val_*` from `validate`, and `seconds`.

    Raises:
        ProjectError: if the loss stops being finite, or a batch iterable is empty.
    """
    folder = checkpoint_dir or ROOT / "data" / "checkpoints"
    identity = [
        name,
        seed,
        epochs,
        asdict(config) if config else None,
        str(runtime.device),
        torch.__version__,
    ]
    identity += [(key, list(value.shape)) for key, value in model.state_dict().items()]
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:12]
    checkpoint = folder / f"{name}-{digest}.pt"
    stateful = {"model": model, "optimiser": optimiser} | (
        {"lr_schedule": lr_schedule} if lr_schedule else {}
    )

    history, best = [], None
    saved = _read_checkpoint(checkpoint)
    if saved:
        for key, part in stateful.items():
            part.load_state_dict(saved[key])
        history, best = saved["history"], saved["best"]
        print(f"{name}: an interrupted training goes on after epoch {len(history)} of {epochs}.")

    for epoch in range(len(history), epochs):
        seed_everything(seed * 10_000 + epoch)
        model.train()
        means, watch = Means(), Stopwatch(runtime)
        bar = tqdm(
            batches(epoch),
            desc=f"{name}: epoch {epoch + 1} of {epochs}",
            leave=False,
            mininterval=0.5,
        )
        for batch in bar:
            with runtime.precision():
                loss, metrics, n = step(batch, epoch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if lr_schedule:
                lr_schedule.step()
            means.add({"loss": loss, **metrics}, n)
        row = {f"train_{key}": value for key, value in means.result().items()}
        if not all(abs(value) < float("inf") for value in row.values()):
            raise ProjectError(
                f"{name}: the loss is not finite in epoch {epoch + 1}; lower the learning rate."
            )
        model.eval()
        with torch.inference_mode():
            row |= {f"val_{key}": value for key, value in validate().items()}
        row["seconds"] = watch.lap()
        history.append(row)
        if best is None or row[monitor] < history[best["epoch"]][monitor]:
            weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
            best = {"epoch": epoch, "weights": weights}
        _save(
            {
                **{k: part.state_dict() for k, part in stateful.items()},
                "history": history,
                "best": best,
            },
            checkpoint,
        )

    model.load_state_dict(best["weights"])
    model.eval()
    checkpoint.unlink(missing_ok=True)
    return History(history, best["epoch"] + 1, sum(row["seconds"] for row in history))


def _read_checkpoint(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except (
        Exception
    ) as error:  # torch.load raises many kinds; a broken checkpoint must not stop a training
        print(
            f"The checkpoint {path.name} cannot be read ({type(error).__name__}): the training starts afresh."
        )
        return None


def _save(content, path: Path) -> None:
    """Writes with torch.save under a temporary name, then renames: no half-written file stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            torch.save(content, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise ProjectError(
            f"{path.name} cannot be saved in {path.parent.name}/ ({error}): free space or rights are missing."
        ) from error


def save_model(model: torch.nn.Module, path: Path) -> None:
    """Saves a model's weights, matrices and kernels as float16: half the size, float32 again when loaded."""
    # Vectors stay float32: they are small, and a BatchNorm's variance can pass float16's range.
    state = {
        k: v.half() if v.is_floating_point() and v.ndim > 1 else v
        for k, v in model.state_dict().items()
    }
    _save({k: v.cpu() for k, v in state.items()}, Path(path))


def load_model(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Loads weights saved by `save_model` into a model of the same architecture.

    Raises:
        ProjectError: if the file is missing, unreadable, or comes from another model.
    """
    path = Path(path)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ProjectError(
            f"There is no model file {path.name}: run the notebook that trains it."
        ) from None
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        raise ProjectError(
            f"{path.name} is not a model file ({type(error).__name__}): train the model again."
        ) from None
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    found = {k: v.shape for k, v in state.items()} if isinstance(state, dict) else {}
    if wanted != found:
        differing = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise ProjectError(
            f"{path.name} comes from another model ({len(differing)} entries differ, first {differing[0]!r}): "
            "build the model it was saved from, or train again."
        )
    model.load_state_dict(state)
    return model
