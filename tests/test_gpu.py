"""The road of a GPU: on a real one with `pytest -m gpu`, else as far as a machine without one goes.

Every notebook runs in profile `gpu`, at the size of `smoke`: on the fake accelerator, which refuses
to mix devices, and on the CPU in bfloat16, where types do not mix. All figures are looked at.
"""

import dataclasses
import sys
import types

import pytest
import torch
import torchvision

from src import backbones, data, device, run, show, train
from tests import fake_accelerator
from tools import notebooks

NAMES = ("deformable_convolution", "detect_change", "transfer_learning")
CARDS = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "fake",
        marks=pytest.mark.skipif(
            fake_accelerator.MISSING is not None, reason=str(fake_accelerator.MISSING)
        ),
    ),
    "bfloat16",
]


@pytest.fixture(params=CARDS)
def card(request, monkeypatch):
    """The device of the walk, put in its place."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        return torch.device("cuda")
    if request.param == "fake":
        return fake_accelerator.install(monkeypatch)
    monkeypatch.setattr(device, "autocast_type", lambda *_: torch.bfloat16)
    return torch.device("cpu")


def small_resnet():
    """A network of a tenth of ResNet-50's layers."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def walk(name, monkeypatch, folder, plant=None):
    """Run all cells of a notebook in this process, on the stand-in, in profile `gpu` at small size.

    Args:
        folder: where its files go.
        plant: (text, other text) to replace in the cells.

    Returns:
        The notebook's namespace, and a list of its figures' (axes' labels, caption, alt text).
    """
    module, figures = types.ModuleType(f"notebooks.{name}"), []
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.setenv("HW3_PROFILE", "gpu")
    monkeypatch.setattr(train, "CHECKPOINTS", folder / "checkpoints")
    monkeypatch.setattr(run.Run, "reports", folder)
    find, display = data.find, show.display_figure
    monkeypatch.setattr(data, "find", lambda dataset, *_: find(dataset, "smoke"))
    for network in ("resnet18", "resnet50"):  # small, and not downloaded
        monkeypatch.setattr(torchvision.models, network, small_resnet)
    weights = small_resnet().state_dict()
    monkeypatch.setattr(backbones, "_resnet_weights", lambda name: weights)

    def look(fig, caption, alt, standin):
        labels = [
            (ax.get_title(), ax.get_xlabel(), ax.get_ylabel())
            for ax in fig.axes
            if ax.axison and not ax.get_label().startswith("<colorbar>")
        ]
        figures.append((labels, caption, alt))
        display(fig, caption, alt, standin)

    monkeypatch.setattr(show, "display_figure", look)
    start = run.start

    def start_small(name, configs, dataset=None):
        small = configs["smoke"]
        if hasattr(small, "backbone"):
            small = dataclasses.replace(small, backbone="resnet50")
        return start(name, configs | {"gpu": small}, dataset)

    monkeypatch.setattr(run, "start", start_small)
    planted = 0
    for number, cell in enumerate(notebooks.read(name).cells, 1):
        if cell.cell_type == "code":
            source = cell.source
            if plant:
                planted += source.count(plant[0])
                source = source.replace(*plant)
            exec(compile(source, f"<{name}, cell {number}>", "exec"), module.__dict__)
    assert plant is None or planted, "nothing was planted"
    return module, figures


@pytest.mark.parametrize("name", NAMES)
def test_notebook(card, name, monkeypatch, tmp_path):
    module, figures = walk(name, monkeypatch, tmp_path)
    assert module.run.device.type == card.type and module.run.profile == "gpu"
    stored = run.load_results(tmp_path / "results" / f"{name}.json")
    assert 0 < len(stored["metrics"]) <= 60 and figures
    for labels, caption, alt in figures:
        assert caption.strip() and alt.strip()
        for title, xlabel, ylabel in labels:
            assert xlabel and ylabel, f"{caption}: the axis {title!r} has no labels"


PLANTS = {  # a part of a cell, and the same without its device
    "deformable_convolution": (", device=offset.device)", ")"),
    "detect_change": (
        "torch.arange(a.shape[self.axis], device=a.device)",
        "torch.arange(a.shape[self.axis])",
    ),
    "transfer_learning": ("torch.eye(2, 3, device=images.device)", "torch.eye(2, 3)"),
}


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.skipif(fake_accelerator.MISSING is not None, reason=str(fake_accelerator.MISSING))
def test_a_forgotten_device_is_caught(name, monkeypatch, tmp_path):
    fake_accelerator.install(monkeypatch)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        walk(name, monkeypatch, tmp_path, PLANTS[name])
