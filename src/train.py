"""What every training needs around its loop: optimizer, progress, best epoch, exact resume."""

import contextlib
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from IPython import get_ipython
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from src import ROOT, ProjectError
from src.device import Stopwatch, seed_everything
from src.files import write_whole
from src.run import executed_cells

CHECKPOINTS = ROOT / "data" / "checkpoints"


class Means:
    """Means over samples, not over batches: a ragged last batch counts by its size."""

    def __init__(self):
        self.sums, self.n = defaultdict(float), 0

    def add(self, n, **values):
        """Add the means over n samples, floats or tensors with one element."""
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self.sums[name] = self.sums[name] + value * n
        self.n += n

    def result(self):
        return {name: float(total) / self.n for name, total in self.sums.items()}


@dataclass
class History:
    """What a training showed: one dict of numbers per epoch, and which epoch was kept."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0  # counted from 1, chosen on validation

    @property
    def seconds(self):
        """Training and validation together."""
        return sum(epoch["seconds"] for epoch in self.epochs)

    def column(self, name):
        return [epoch.get(name, math.nan) for epoch in self.epochs]


class Training:
    """One training: AdamW under one learning-rate cycle, and what its loop leaves to others.

    The optimizer is Loshchilov and Hutter's (2019), the cycle Smith and Topin's (2017). Only
    kernels and matrices decay; biases and BatchNorm's parameters do not. The loop itself stands in
    the notebook:

        for epoch in training.epochs(n):
            for batch in training.bar(loader):
                training.step(loss, n=len(batch))
            training.end_epoch(loss=...)

    Random numbers are seeded from (seed, epoch) when an epoch begins, and a checkpoint is written
    when it ends, so an interrupted training that is started again ends with the same numbers as one
    that ran through. It begins afresh, and says so, where code, configuration or data have changed.

    Args:
        name: of the training, in progress bars and for its checkpoint.
        network: ends with the weights of the best epoch, in evaluation mode.
        groups: (module, peak learning rate) each; frozen parameters are left out.
        steps: of the whole training.
        run: gives device, precision and what the checkpoint depends on.
        seed: of this training.
        weight_decay: decoupled, of parameters with two or more dimensions.
        warmup: share of the steps in which the learning rate rises.
        ema_decay: where given, an exponential average of the weights (Polyak and Juditsky 1992) is
            validated and kept.
    """

    def __init__(
        self, name, network, groups, steps, run, seed=0, weight_decay=0.0, warmup=0.25, ema_decay=0
    ):
        self.name, self.network, self.run, self.seed, self.steps = name, network, run, seed, steps
        chosen = []
        for module, lr in groups:
            for decays in (True, False):
                some = [
                    p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == decays
                ]
                if some:
                    decay = weight_decay * decays
                    chosen.append({"params": some, "lr": lr, "weight_decay": decay})
        rates = [group["lr"] for group in chosen]
        self.optimizer = torch.optim.AdamW(chosen, fused=True)  # one pass over all parameters
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            rates,
            total_steps=max(steps, 10),  # a cycle of fewer steps has no room for its warm-up
            pct_start=warmup,
            cycle_momentum=False,
        )
        half = run.autocast == torch.float16  # whose small gradients would vanish
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=half)
        self.average = None
        if ema_decay:
            rule = _ema(ema_decay)
            self.average = AveragedModel(network, multi_avg_fn=rule, use_buffers=True)
        self.history, self.best, self.done = History(), None, 0
        parts = [run.profile, run.config, run.source, run.device, run.autocast, run.src, name, seed]
        parts += [torch.__version__, executed_cells()]
        parts += [steps, rates, weight_decay, warmup, ema_decay]
        self.identity = hashlib.sha256(repr(parts).encode()).hexdigest()
        label = re.sub(r"\W+", "_", f"{run.name}_{run.profile}_{name}_{seed}")
        self.checkpoint = CHECKPOINTS / f"{label}.pt"

    def epochs(self, n):
        """Count the epochs from 0 to n - 1, going on where an interrupted run stopped."""
        self._resume()
        for epoch in range(len(self.history.epochs), n):
            seed_everything(self.seed * 10_000 + epoch)
            self.network.train()
            self.means, self.watch, self.last = Means(), Stopwatch(self.run.device), epoch == n - 1
            yield epoch
        if self.best:
            self.network.load_state_dict(self.best)
        self.network.eval()
        self.checkpoint.unlink(missing_ok=True)

    def bar(self, batches):
        """The batches, with a progress bar for people who watch."""
        label = f"{self.name}: epoch {len(self.history.epochs) + 1}"
        quiet = False if get_ipython() else None  # None: where standard error is no terminal
        return tqdm(batches, desc=label, leave=False, mininterval=0.5, disable=quiet)

    def step(self, loss, n, **means):
        """Take an optimization step down the loss, a mean over n samples; average further means."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale and self.done < self.steps - 1:  # else it was skipped
            self.scheduler.step()
        if self.average:
            self.average.update_parameters(self.network)
        self.means.add(n, loss=loss, **means)
        self.done += 1

    @contextlib.contextmanager
    def validating(self):
        """Evaluation mode without gradients, in the run's precision, with the averaged weights."""
        own = _copy(self.network) if self.average else None
        if self.average:
            self.network.load_state_dict(self.average.module.state_dict())
        self.network.eval()
        try:
            with torch.inference_mode(), self.run.precision():
                yield
        finally:
            if own:
                self.network.load_state_dict(own)
            self.network.train()

    def end_epoch(self, **validation):
        """Note the epoch's means and validation, keep the best one by `loss`, write a checkpoint.

        Without a validation loss, the last epoch is kept. A ProjectError if a training mean is not
        a finite number.
        """
        row = {f"train_{key}": value for key, value in self.means.result().items()}
        for key, value in row.items():
            if not math.isfinite(value):
                raise ProjectError(
                    f"{self.name}: the mean {key} of epoch {len(self.history.epochs) + 1} is "
                    f"{value}: the training diverged (a lower learning rate helps), or its data "
                    "hold such numbers."
                )
        row |= {f"val_{key}": float(value) for key, value in validation.items()}
        row["seconds"] = self.watch.lap()
        self.history.epochs.append(row)
        losses = [math.inf if math.isnan(x) else x for x in self.history.column("val_loss")]
        if not math.isfinite(row.get("val_loss", 0.0)):
            print(f"{self.name}: the validation loss is {row['val_loss']}; the epoch is not kept.")
        if losses[-1] == min(losses):
            kept = self.average.module if self.average else self.network
            self.best, self.history.best_epoch = _copy(kept), len(losses)
        if not self.last:
            self._write()

    def _parts(self):
        names = "optimizer", "scheduler", "scaler", "network", "average"
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def _write(self):
        content = {key: part.state_dict() for key, part in self._parts().items()}
        content |= {"identity": self.identity, "best": self.best, "done": self.done}
        try:
            write_whole(self.checkpoint, _bytes(content | {"history": asdict(self.history)}))
        except ProjectError as error:  # no reason to end a training
            print(f"{self.name}: goes on without a checkpoint. {error}")

    def _resume(self):
        if not self.checkpoint.is_file():
            return
        try:
            saved = torch.load(self.checkpoint, map_location=self.run.device, weights_only=True)
            changed = saved["identity"] != self.identity
            fresh = "code, configuration or data have changed" if changed else ""
        except Exception as error:  # torch.load raises many kinds; a broken file stops no training
            fresh = f"its checkpoint is damaged ({type(error).__name__})"
        if fresh:
            print(f"{self.name}: starts afresh, as {fresh}.")
            return
        for key, part in self._parts().items():
            part.load_state_dict(saved[key])
        self.history = History(**saved["history"])
        self.best, self.done = saved["best"], saved["done"]
        print(f"{self.name}: goes on after epoch {len(self.history.epochs)}, where it stopped.")


def _ema(decay):
    """The rule of an exponential average; quick at first, when few weights have been seen."""

    @torch.no_grad()
    def update(averages, values, n):
        weight = 1 - min(decay, (1 + int(n)) / (10 + int(n)))
        for average, value in zip(averages, values):
            average.lerp_(value, weight) if average.is_floating_point() else average.copy_(value)

    return update


def _copy(network):
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def _bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# --- models ---------------------------------------------------------------------------------------
def save_model(network, path, config=None):
    """Save a network's weights with the configuration (a dataclass) that builds it.

    Matrices and kernels are stored as float16: half the size, float32 again when loaded. Vectors
    stay float32: they are small, and a BatchNorm's variance can pass float16's range.
    """
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    plain = json.loads(json.dumps(asdict(config))) if config else {}
    write_whole(path, _bytes({"config": plain, "state": state}))


def load_model(build, path):
    """Load a network that `save_model` stored, on the CPU in evaluation mode.

    `build` is called with the stored configuration as a dict and gives such a network. A
    ProjectError if there is no such file.
    """
    if not Path(path).is_file():
        raise ProjectError(f"There is no model {Path(path).name}: run the notebook that trains it.")
    stored = torch.load(path, weights_only=True, map_location="cpu")
    network = build(stored["config"])
    network.load_state_dict(stored["state"])
    return network.eval()
