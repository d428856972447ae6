"""Training: the loop's optimizer and means, the kept epoch, exact resume, saved models."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import ProjectError, run, train

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
EPOCHS = 5


@dataclass(frozen=True)
class Config:
    width: int = 8


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path)
    return run.Run("toy", "cpu", Config(), None, torch.device("cpu"))


def make(toy, seed=1, ema_decay=None, **settings):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )
    settings = {"weight_decay": 0.1, "ema_decay": ema_decay} | settings
    return train.Training("toy", network, [(network, 0.02)], EPOCHS * 7, toy, seed=seed, **settings)


def fit(training, stop=None, validation=None):
    """The loop of the notebooks on 50 points in ragged batches; `stop` interrupts an epoch."""
    for epoch in training.epochs(EPOCHS):
        for index in training.bar(torch.randperm(50).split(8)):
            logits = training.network(X[index])
            right = (logits.argmax(dim=1) == Y[index]).float().mean()
            training.step(F.cross_entropy(logits, Y[index]), n=len(index), accuracy=right)
            if epoch == stop:
                raise KeyboardInterrupt
        with training.validating():
            loss = F.cross_entropy(training.network(X), Y)
        training.end_epoch(loss=loss if validation is None else validation[epoch])
    return training


def numbers(training):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in training.history.epochs]
    return rows, training.history.best_epoch, training.network.state_dict()


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_an_interrupted_training_ends_with_the_same_bits(toy, ema_decay, capsys):
    rows, best, weights = numbers(fit(make(toy, ema_decay=ema_decay)))
    with pytest.raises(KeyboardInterrupt):
        fit(make(toy, ema_decay=ema_decay), stop=2)
    resumed = numbers(fit(make(toy, ema_decay=ema_decay)))
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert resumed[:2] == (rows, best)
    assert all(torch.equal(weights[key], value) for key, value in resumed[2].items())
    assert not list(train.CHECKPOINTS.iterdir())


@pytest.mark.parametrize("change", ["config", "code", "rate", "source"])
def test_another_training_does_not_go_on(toy, change, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(make(toy), stop=2)
    if change == "config":
        toy.config = Config(width=9)
    elif change == "code":
        toy.src = "other"
    elif change == "source":
        toy.source = "other data"
    other = make(toy, weight_decay=0.2) if change == "rate" else make(toy)
    assert len(fit(other).history.epochs) == EPOCHS
    assert "starts afresh, as code, configuration or data" in capsys.readouterr().out


def test_a_damaged_checkpoint_stops_nothing(toy, capsys):
    training = make(toy)
    train.CHECKPOINTS.mkdir(exist_ok=True)
    training.checkpoint.write_bytes(b"half a file")
    assert len(fit(training).history.epochs) == EPOCHS
    assert "damaged" in capsys.readouterr().out


def test_a_full_disk_stops_nothing(toy, monkeypatch, capsys):
    def refuse(path, content):
        raise ProjectError("No space left.")

    monkeypatch.setattr(train, "write_whole", refuse)
    assert len(fit(make(toy)).history.epochs) == EPOCHS
    assert "No space left" in capsys.readouterr().out


def test_the_best_epoch_is_kept_and_nan_never(toy, capsys):
    training = make(toy)
    states = []
    original = training.end_epoch
    training.end_epoch = lambda **v: (
        original(**v),
        states.append(train._copy(training.network)),
    )
    fit(training, validation=[math.nan, 3.0, 1.0, 2.0, math.nan])
    assert training.history.best_epoch == 3 and not training.network.training
    kept = training.network.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in states[2].items())
    assert "validation loss is nan" in capsys.readouterr().out


def test_without_validation_the_last_epoch_is_kept(toy):
    training = make(toy)
    for _ in training.epochs(2):
        training.step(F.cross_entropy(training.network(X), Y), n=50)
        training.end_epoch()
    assert training.history.best_epoch == 2


def test_a_training_that_diverges_says_where(toy):
    training = make(toy)
    with pytest.raises(ProjectError, match="toy: the mean train_loss of epoch 1 is nan"):
        for _ in training.epochs(1):
            loss = F.cross_entropy(training.network(X), Y)
            training.step(loss * math.nan, n=50)
            training.end_epoch(loss=1.0)


def test_means_count_samples_not_batches():
    means = train.Means()
    means.add(3, loss=torch.tensor(1.0))
    means.add(1, loss=5.0)
    assert means.result() == {"loss": 2.0} and train.Means().result() == {}


def test_a_step_is_a_step_of_adamw(toy):
    network = nn.Linear(4, 2)
    reference = nn.Linear(4, 2)
    reference.load_state_dict(network.state_dict())
    training = train.Training("one", network, [(network, 0.1)], 20, toy, weight_decay=0.5)
    optimizer = torch.optim.AdamW(
        [{"params": [reference.weight], "weight_decay": 0.5}, {"params": [reference.bias]}],
        lr=training.scheduler.get_last_lr()[0],
        weight_decay=0.0,
    )
    for _ in training.epochs(1):
        training.step(F.cross_entropy(network(X), Y), n=50)
        training.end_epoch()
    F.cross_entropy(reference(X), Y).backward()
    optimizer.step()
    for ours, theirs in zip(network.parameters(), reference.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_rates_rise_and_fall_and_frozen_layers_stay(toy):
    network = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    groups = [(network[0], 1.0), (network[1], 0.1)]
    training, before = train.Training("rates", network, groups, 40, toy), network[0].weight.clone()
    rates = []
    for _ in training.epochs(1):
        for _ in range(44):  # more than were announced
            rates.append(training.optimizer.param_groups[0]["lr"])
            training.step(F.cross_entropy(network(X), Y), n=50)
        training.end_epoch()
    assert max(rates) == pytest.approx(0.1, rel=0.01) and 5 < rates.index(max(rates)) < 15
    assert rates[-1] < 0.001 and torch.equal(before, network[0].weight)


def test_the_average_is_validated_and_the_own_weights_come_back(toy):
    training = make(toy, ema_decay=0.9)
    for _ in training.epochs(1):
        for _ in range(5):
            training.step(F.cross_entropy(training.network(X), Y), n=50)
        own = train._copy(training.network)
        with training.validating():
            averaged = training.network.state_dict()["0.weight"].clone()
            assert not training.network.training and not torch.is_grad_enabled()
        assert not torch.equal(averaged, own["0.weight"]) and training.network.training
        assert torch.equal(training.network.state_dict()["0.weight"], own["0.weight"])
        training.end_epoch(loss=1.0)
    assert torch.equal(training.network.state_dict()["0.weight"], averaged)


def test_a_saved_model_comes_back(toy, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        network[1].running_var.fill_(1e9)  # beyond float16
    path = tmp_path / "deep" / "model.pt"
    train.save_model(network, path, Config(width=4))
    loaded = train.load_model(
        lambda config: nn.Sequential(nn.Conv2d(3, config["width"], 3), nn.BatchNorm2d(4)), path
    )
    x = torch.randn(1, 3, 5, 5)
    assert not loaded.training and torch.allclose(loaded(x), network.eval()(x), atol=1e-2)
    assert loaded[1].running_var[0] == 1e9 and loaded[0].weight.dtype == torch.float32
    with pytest.raises(ProjectError, match="no model nothing.pt: run the notebook"):
        train.load_model(None, tmp_path / "nothing.pt")
