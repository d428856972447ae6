import math

import pytest
import torch
from torch import nn

from src import ProjectError, training
from src.device import Runtime

RUNTIME = Runtime(torch.device("cpu"), autocast=False)
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


def make(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.ReLU(), nn.Linear(width, 2))


def train(folder, model=None, epochs=4, stop_after=None, seed=3, validate=None):
    """Trains on 30 points in batches of 8, the last one ragged; `stop_after` interrupts after so many steps."""
    model = model or make()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=4 * epochs)
    done = 0

    def step(index, epoch):
        nonlocal done
        if done == stop_after:
            raise KeyboardInterrupt
        done += 1
        logits = model(X[index])
        return (
            nn.functional.cross_entropy(logits, Y[index]),
            {"accuracy": (logits.argmax(1) == Y[index]).float().mean()},
            len(index),
        )

    def on_all():
        return {"loss": nn.functional.cross_entropy(model(X), Y).item()}

    history = training.fit(
        "toy",
        model,
        optimiser,
        lambda epoch: torch.randperm(30).split(8),
        step,
        validate or on_all,
        epochs=epochs,
        seed=seed,
        runtime=RUNTIME,
        monitor="val_loss",
        lr_schedule=schedule,
        checkpoint_dir=folder,
    )
    return model, history


def numbers(history):
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in history.epochs
    ]


def test_it_learns_and_leaves_no_checkpoint(tmp_path):
    _, history = train(tmp_path, epochs=20)
    assert history.column("val_loss")[-1] < 0.5 * history.column("val_loss")[0]
    assert not list(tmp_path.iterdir())


def test_means_weigh_samples_not_batches():
    means = training.Means()
    means.add({"loss": torch.tensor(1.0)}, 8)
    means.add({"loss": torch.tensor(4.0)}, 2)
    assert means.result() == {"loss": pytest.approx(1.6)}
    with pytest.raises(ProjectError, match="No samples"):
        training.Means().result()


def test_same_seed_same_numbers_and_another_seed_others(tmp_path):
    first, second, other = (train(tmp_path, seed=seed)[1] for seed in (3, 3, 4))
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(other)


@pytest.mark.parametrize("stop_after", [5, 8, 15])
def test_interrupted_and_resumed_ends_with_the_same_numbers(tmp_path, stop_after, capsys):
    whole_model, whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_after=stop_after)
    resumed_model, resumed = train(tmp_path / "cut")
    assert f"goes on after epoch {stop_after // 4} of 4" in capsys.readouterr().out
    assert numbers(resumed) == numbers(whole) and resumed.best_epoch == whole.best_epoch
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole_model.state_dict().values(), resumed_model.state_dict().values())
    )


def test_a_checkpoint_of_another_model_or_seed_is_not_continued(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_after=9)
    train(tmp_path, model=make(width=6))
    train(tmp_path, seed=5)
    assert "goes on" not in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1, "the interrupted training's checkpoint must stay"


def test_a_broken_checkpoint_does_not_stop_a_training(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_after=9)
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    _, history = train(tmp_path)
    assert "cannot be read" in capsys.readouterr().out and len(history.epochs) == 4


def test_the_best_epoch_on_validation_is_kept(tmp_path):
    model, losses, seen = make(), iter([3.0, 1.0, 2.0, 5.0]), []

    def validate():
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"loss": next(losses)}

    _, history = train(tmp_path, model=model, validate=validate)
    assert history.best_epoch == 2
    assert all(torch.equal(value, seen[1][key]) for key, value in model.state_dict().items())
    assert not model.training


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    model = make()
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(ProjectError, match="toy: the loss is not finite in epoch 1"):
        train(tmp_path, model=model)


def test_saved_models_load_and_stay_close(tmp_path):
    model, path = make(), tmp_path / "model.pt"
    training.save_model(model, path)
    loaded = training.load_model(make(), path)
    assert torch.allclose(model.eval()(X), loaded.eval()(X), atol=5e-3)
    assert loaded[0].weight.dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode, (
        "readable by those who may read any new file"
    )


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ProjectError, match="There is no model file gone.pt"):
        training.load_model(make(), tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ProjectError, match="text.pt is not a model file"):
        training.load_model(make(), tmp_path / "text.pt")
    training.save_model(make(width=6), tmp_path / "other.pt")
    with pytest.raises(
        ProjectError,
        match=r"other.pt comes from another model \(3 entries differ, first '0.bias'\)",
    ):
        training.load_model(make(), tmp_path / "other.pt")


def test_saving_into_a_file_that_is_no_folder(tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(ProjectError, match="cannot be saved"):
        training.save_model(make(), tmp_path / "models" / "model.pt")
