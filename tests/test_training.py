import dataclasses
import math
import os
import weakref

import pytest
import torch
from torch import nn

from src import ProjectError, training
from src.device import Runtime

RUNTIME = Runtime(torch.device("cpu"))
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def make(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.ReLU(), nn.Linear(width, 2))


class Interrupt:
    """Raises after so many steps; not part of what a checkpoint depends on."""

    def __init__(self, after):
        self.left = math.inf if after is None else after

    def digest_parts(self):
        return ()

    def count(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


def train(
    model=None,
    epochs=4,
    stop_after=None,
    seed=3,
    validate=None,
    data=X,
    loss=None,
    warmup=0.25,
    **more,
):
    """Train on 30 points in batches of 8, the last one ragged; `stop_after` interrupts."""
    model, loss = model or make(), loss or nn.functional.cross_entropy
    optimizer, lr_scheduler = training.make_optimizer([(model, 0.02)], 0.01, 4 * epochs, warmup)
    interrupt = Interrupt(stop_after)

    def step(index, epoch):
        interrupt.count()
        logits = model(data[index])
        accuracy = (logits.argmax(1) == Y[index]).float().mean()
        return loss(logits, Y[index]), {"accuracy": accuracy}, len(index)

    def on_all():
        return {"loss": nn.functional.cross_entropy(model(data), Y).item()}

    history = training.fit(
        "toy",
        model,
        optimizer,
        lr_scheduler,
        lambda epoch: torch.randperm(30).split(8),
        step,
        validate or on_all,
        **{"epochs": epochs, "seed": seed, "runtime": RUNTIME} | more,
    )
    return model, history


def numbers(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.epochs]


def test_it_learns_prints_each_epoch_and_leaves_no_checkpoint(folder, capsys):
    _, history = train(epochs=20)
    assert history.column("val_loss")[-1] < 0.5 * history.column("val_loss")[0]
    assert not list(folder.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].startswith("toy: epoch 1 of 20: train_loss ")
    train(quiet=True)
    assert not capsys.readouterr().out


def test_means_weigh_samples_not_batches():
    means = training.RunningMean()
    means.add({"loss": torch.tensor(1.0)}, 8)
    means.add({"loss": torch.tensor(4.0)}, 2)
    assert means.result() == {"loss": pytest.approx(1.6)}
    with pytest.raises(ProjectError, match="No samples"):
        training.RunningMean().result()


def test_same_seed_same_numbers_and_another_seed_others():
    first, second, other = (train(seed=seed)[1] for seed in (3, 3, 4))
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("stop_after", [5, 8, 15])
def test_interrupted_and_resumed_ends_with_the_same_numbers(stop_after, ema_decay, capsys):
    whole_model, whole = train(ema_decay=ema_decay)
    with pytest.raises(KeyboardInterrupt):
        train(stop_after=stop_after, ema_decay=ema_decay)
    resumed_model, resumed = train(ema_decay=ema_decay)
    assert f"continues after epoch {stop_after // 4} of 4" in capsys.readouterr().out
    assert numbers(resumed) == numbers(whole) and resumed.best_epoch == whole.best_epoch
    pairs = zip(whole_model.state_dict().values(), resumed_model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def doubled(logits, labels):
    return 2 * nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    "other",
    [
        {"model": lambda: make(width=6)},
        {"seed": lambda: 5},
        {"data": lambda: X + 1e-3},
        {"loss": lambda: doubled},
        {"ema_decay": lambda: 0.5},
        {"warmup": lambda: 0.5},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_of_other_code_or_data_is_not_continued(folder, other, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(stop_after=9)
    train(**{key: make_value() for key, make_value in other.items()})
    assert "continues" not in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 1, "the interrupted training's checkpoint must stay"


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_broken_checkpoint_does_not_stop_a_training(folder, share, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(stop_after=9)
    (checkpoint,) = folder.iterdir()
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    _, history = train()
    assert "cannot be read" in capsys.readouterr().out and len(history.epochs) == 4


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"history": []}])
def test_a_checkpoint_in_another_form_does_not_stop_a_training(folder, content, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(stop_after=9)
    (checkpoint,) = folder.iterdir()
    torch.save(content, checkpoint)
    _, history = train()
    assert "cannot be read" in capsys.readouterr().out and len(history.epochs) == 4


def test_a_checkpoint_of_other_code_in_src_is_not_continued(monkeypatch, capsys):
    """Functions of other modules are not seen in the objects of a training."""
    with pytest.raises(KeyboardInterrupt):
        train(stop_after=9)
    monkeypatch.setattr(training, "_code", lambda: "other")
    train()
    assert "continues" not in capsys.readouterr().out


def test_the_best_epoch_on_validation_is_kept():
    model, losses, seen = make(), iter([3.0, 1.0, 2.0, 5.0]), []

    def validate():
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"loss": next(losses)}

    _, history = train(model=model, validate=validate)
    assert history.best_epoch == 2
    assert all(torch.equal(value, seen[1][key]) for key, value in model.state_dict().items())
    assert not model.training


def test_averaged_weights_are_validated_and_kept_while_the_last_ones_train_on():
    plain, averaged, seen = make(), make(), []

    def validate():
        seen.append(averaged[0].weight.clone())
        return {"loss": 1.0 / len(seen)}

    train(model=averaged, ema_decay=0.9, validate=validate)
    train(model=plain, validate=lambda: {"loss": -plain[0].weight.new_zeros(()).item()})
    assert torch.equal(averaged[0].weight, seen[-1])
    final, _ = train(ema_decay=0.0)  # decay 0 keeps the last weights: the average must be another
    assert not torch.allclose(final[0].weight, averaged[0].weight)


def test_a_step_that_does_not_fit_is_taken_in_parts_with_the_same_gradient(capsys):
    def run(limit):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(batch, epoch):
            x, (y, name) = batch
            assert name == "name", "every part has what is no tensor"
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return nn.functional.cross_entropy(model(x), y), {}, len(x)

        history = training.fit(
            "toy",
            model,
            optimizer,
            None,
            lambda epoch: [(X[i], (Y[i], "name")) for i in torch.arange(30).split(8)],
            step,
            lambda: {"loss": 0.0},
            epochs=2,
            seed=0,
            runtime=RUNTIME,
            quiet=True,
        )
        return model.weight, history.column("train_loss")

    whole = run(30)
    for limit in (4, 3, 1):  # of one sample, the last batch has fewer parts than the others
        parts = run(limit)
        if limit == 4:  # two parts suffice
            printed = capsys.readouterr().out
            assert "steps are taken in 2 parts" in printed and "in 4 parts" not in printed
        assert torch.allclose(whole[0], parts[0], atol=1e-6)
        assert whole[1] == pytest.approx(parts[1], abs=1e-6)
    assert "in 4 parts" in capsys.readouterr().out
    with pytest.raises(ProjectError, match="does not suffice for one sample"):
        run(0)


def test_what_an_attempt_held_is_freed_before_the_next_one():
    model, held, alive = nn.Linear(4, 2), [], []

    def step(batch, epoch):
        alive.append(sum(reference() is not None for reference in held))
        activations = model(batch)
        held.append(weakref.ref(activations))
        if len(batch) > 8:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return activations.square().mean(), {"kept": activations.mean()}, len(batch)

    training.fit(
        "toy",
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        lambda epoch: [X],
        step,
        lambda: {"loss": 0.0},
        epochs=1,
        seed=0,
        runtime=RUNTIME,
        quiet=True,
    )
    assert alive == [0] * 6, "attempts with 30 and 15 samples, then four parts"


def test_another_error_is_no_lack_of_memory():
    def broken(logits, labels):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(loss=broken)


def test_only_kernels_and_matrices_decay_and_frozen_parameters_stay_out():
    model = make()
    model[3].requires_grad_(False)
    optimizer, lr_scheduler = training.make_optimizer([(model, 0.02)], 0.05, 40, warmup=0.25)
    groups = [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(1, 0.05), (1, 0.0)]
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    assert max(rates) == pytest.approx(0.02, rel=0.01) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 1e-4
    for steps, cycle in ((3, 10), (12, 12)):  # one of fewer steps would have no warm-up
        assert training.make_optimizer([(make(), 0.02)], 0.05, steps)[1].total_steps == cycle


def test_a_loss_that_is_not_finite_is_said():
    model = make()
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(ProjectError, match="toy: the loss is not finite in epoch 1"):
        train(model=model)


def test_validation_has_the_precision_of_the_steps():
    seen, model = [], nn.Linear(4, 2)

    def validate():
        logits = model(X)
        seen.append(logits.dtype)
        return {"loss": nn.functional.cross_entropy(logits, Y).item()}

    train(model, epochs=1, validate=validate, runtime=Runtime(RUNTIME.device, torch.bfloat16))
    train(model, epochs=1, validate=validate)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("seconds, minutes", [(179, None), (180, 3), (3600, 60)])
def test_a_long_training_says_how_long_it_takes(seconds, minutes, monkeypatch, capsys):
    """One step takes an eighth of the time of two epochs with four steps each."""
    for timed in (1, 2):
        monkeypatch.setattr(training, "TIMED", timed)
        monkeypatch.setattr(training.Stopwatch, "lap", lambda watch, part=timed / 8: part * seconds)
        train(epochs=2)
        lines = [x for x in capsys.readouterr().out.splitlines() if "on this machine" in x]
        assert len(lines) == (minutes is not None)
        assert not lines or lines[0].startswith(f"toy: about {minutes} min on this machine")
    monkeypatch.setattr(training.Stopwatch, "lap", lambda watch: 1.0)
    train(epochs=2, quiet=True)
    assert not capsys.readouterr().out


def test_metrics_may_be_plain_numbers():
    model = make()
    optimizer, lr_scheduler = training.make_optimizer([(model, 0.02)], 0.01, 10)

    def step(index, epoch):
        return nn.functional.cross_entropy(model(X[index]), Y[index]), {"half": 0.5}, len(index)

    history = training.fit(
        *("toy", model, optimizer, lr_scheduler, lambda epoch: torch.arange(30).split(8), step),
        lambda: {"loss": 1.0},
        **dict(epochs=1, seed=0, runtime=RUNTIME, quiet=True),
    )
    assert history.column("train_half") == [0.5]


def test_a_training_that_goes_on_counts_the_rest_of_its_time(monkeypatch, capsys):
    monkeypatch.setattr(training, "TIMED", 2)
    monkeypatch.setattr(training.Stopwatch, "lap", lambda watch: 300.0)  # of two steps of four
    with pytest.raises(KeyboardInterrupt):
        train(epochs=4, stop_after=5)
    assert "about 40 min" in capsys.readouterr().out
    train(epochs=4)
    assert "about 30 min" in capsys.readouterr().out


# --- models


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8


def build(config):
    return make(config["width"])


def test_saved_models_load_with_their_configuration_and_stay_close(tmp_path):
    model, path = make(6), tmp_path / "model.pt"
    training.save_model(model, path, Config(6))
    loaded = training.load_model(build, path)
    assert torch.allclose(model.eval()(X), loaded.eval()(X), atol=5e-3)
    assert loaded[0].weight.dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, "readable like any new file"


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ProjectError, match="There is no model file gone.pt"):
        training.load_model(build, tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("no model")
    for content in ([], None, {}, {"config": {}, "state": None}):
        torch.save(content, tmp_path / "empty.pt")
        with pytest.raises(ProjectError, match="empty.pt is not a model file"):
            training.load_model(build, tmp_path / "empty.pt")
    with pytest.raises(ProjectError, match="text.pt is not a model file"):
        training.load_model(build, tmp_path / "text.pt")
    training.save_model(make(width=6), tmp_path / "other.pt", Config(8))
    with pytest.raises(
        ProjectError, match="other.pt is of another model .3 entries differ, .*0.bias"
    ):
        training.load_model(build, tmp_path / "other.pt")
    training.save_model(make(), tmp_path / "bare.pt")
    with pytest.raises(
        ProjectError, match="bare.pt holds a configuration that does not fit .KeyError"
    ):
        training.load_model(build, tmp_path / "bare.pt")
    broken = make()
    nn.init.constant_(broken[0].bias, math.nan)
    training.save_model(broken, tmp_path / "nan.pt", Config())
    with pytest.raises(ProjectError, match="nan.pt holds values that are not finite"):
        training.load_model(build, tmp_path / "nan.pt")


def test_saving_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(ProjectError, match="cannot be written"):
        training.save_model(make(), tmp_path / "models" / "model.pt")


# --- details that a training rests on


def test_the_model_is_evaluated_in_evaluation_mode_and_trained_in_training_mode():
    model, modes = make(), []

    def validate():
        modes.append(("validation", model.training))
        return {"loss": 1.0}

    def spy(logits, labels):
        modes.append(("training", model.training))
        return nn.functional.cross_entropy(logits, labels)

    train(model=model, epochs=2, loss=spy, validate=validate)
    assert set(modes) == {("training", True), ("validation", False)}
    assert not model.training


def test_every_epoch_has_its_own_random_numbers():
    drawn = []

    def spy(logits, labels):
        drawn.append(torch.initial_seed())
        return nn.functional.cross_entropy(logits, labels)

    train(epochs=3, loss=spy, seed=3)
    assert sorted(set(drawn)) == [30_000, 30_001, 30_002]


def test_averaged_weights_by_hand():
    """A weight moves by -1 a step, and the average by the share 1 - min(d, (1 + t) / (10 + t))."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    seen, last = [], []

    def validate():
        seen.append(model.weight.item())
        return {"loss": -float(len(seen))}

    def step(batch, epoch):
        last.append(model.weight.item())
        return model.weight.sum(), {}, 1

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arguments = "toy", model, optimizer, None, lambda epoch: [torch.zeros(1)] * 2, step, validate
    training.fit(*arguments, epochs=2, seed=0, runtime=RUNTIME, ema_decay=0.25, quiet=True)
    average, wanted = 0.0, []
    for t, weight in enumerate((-1.0, -2.0, -3.0, -4.0), start=1):
        average += (1 - min(0.25, (1 + t) / (10 + t))) * (weight - average)
        wanted.append(average)
    assert seen == pytest.approx([wanted[1], wanted[3]]), "the average is what is validated"
    assert last == [0, -1, -2, -3], "and the last weights train on"
    assert model.weight.item() == pytest.approx(wanted[3])


def test_a_training_that_was_cut_off_after_its_last_epoch_is_complete(folder, capsys):
    kept = {}
    real = training._save

    def keep(content, path):
        real(content, path)
        kept[path] = path.read_bytes()

    training._save, before = keep, real
    try:
        whole_model, whole = train()
    finally:
        training._save = before
    for path, content in kept.items():
        path.write_bytes(content)
    model, history = train()
    assert "continues after epoch 4 of 4" in capsys.readouterr().out
    assert numbers(history) == numbers(whole) and not model.training
    assert torch.equal(model[0].weight, whole_model[0].weight)


def test_floats_and_tensors_are_averaged_alike():
    means = training.RunningMean()
    means.add({"a": 1.0, "b": torch.tensor(1.0, requires_grad=True)}, 1)
    means.add({"a": 2.0, "b": torch.tensor(2.0)}, 3)
    assert means.result() == {"a": 1.75, "b": 1.75}


def test_matrices_are_stored_in_half_precision_and_vectors_are_not(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    training.save_model(model, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert stored["0.weight"].dtype == torch.float16
    assert {stored[k].dtype for k in ("0.bias", "1.weight", "1.running_var")} == {torch.float32}
    assert stored["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("change", ["more", "fewer", "a number"])
def test_a_model_file_with_more_or_fewer_entries_is_refused(tmp_path, change):
    path = tmp_path / "model.pt"
    training.save_model(make(), path, Config())
    content = torch.load(path, weights_only=True)
    if change == "more":
        content["state"]["extra"] = torch.zeros(1)
    else:
        bias = content["state"].pop("0.bias")
        content["state"] |= {5: bias} if change == "a number" else {}
    torch.save(content, path)
    with pytest.raises(ProjectError, match="is of another model .[12] entries differ"):
        training.load_model(build, path)


class Payload:
    """What a file of a stranger could hold: code that runs while it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_model_file_cannot_run_code(tmp_path):
    torch.save({"config": {}, "state": Payload(tmp_path / "trace")}, tmp_path / "model.pt")
    with pytest.raises(ProjectError, match="not a model file"):
        training.load_model(lambda config: make(), tmp_path / "model.pt")
    assert not (tmp_path / "trace").exists()
