"""Whatever runs on a GPU runs on the fake accelerator, which refuses to mix devices."""

import dataclasses
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from src import backbones, data, device, plotting, results, session, training
from tests import fake_accelerator
from tests.test_training import Interrupt
from tools import bench, notebooks

pytestmark = pytest.mark.skipif(
    fake_accelerator.MISSING is not None, reason=str(fake_accelerator.MISSING)
)
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


@pytest.fixture
def gpu(monkeypatch):
    return fake_accelerator.install(monkeypatch)


# --- the fake device itself -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.arange(3),
        lambda x: torch.arange(3)[x.long()],
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: x.copy_(x * torch.ones(3)),
        lambda x: x.index_put_((x.long(),), torch.ones(3)),
        lambda x: nn.Linear(3, 2)(x),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.meshgrid(x, torch.ones(2), indexing="ij"),
    ],
)
def test_mixed_devices_are_refused(gpu, mistake):
    with pytest.raises((RuntimeError, TypeError), match="device|numpy|slow_conv"):
        mistake(torch.ones(3, device=gpu))


def test_what_cuda_allows_is_allowed(gpu):
    x = torch.arange(3.0, device=gpu)
    x = x[torch.tensor([2, 1])] * torch.tensor(2.0) + torch.tensor([1.0, 2.0], device=gpu)
    x[torch.tensor([0])] = x.new_tensor([7.0])
    assert x.device.type == "fake" and x.tolist() == [7.0, 4.0]
    assert f"{x.sum():.1f}" == "11.0" and np.allclose(x.cpu(), [7, 4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_follows_cudas_lists(gpu, dtype):
    x = torch.ones(2, 2, device=gpu)
    with torch.autocast(gpu.type, dtype):
        product = x @ x
        assert product.dtype == (product * product).dtype == dtype
        assert product.exp().dtype == product.sum().dtype == (product + x).dtype == torch.float32
        with pytest.raises(RuntimeError, match="unsafe"):
            nn.functional.binary_cross_entropy(product, x)
    assert (x @ x).dtype == torch.float32


# --- the library ----------------------------------------------------------------------------------
def train(runtime, limit=100, epochs=3, stop=None, ema_decay=None):
    """Train on 24 points; `limit` is the largest batch that fits the memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    runtime.place(model)
    x, y, interrupt = X.to(runtime.device), Y.to(runtime.device), Interrupt(stop)
    optimizer, lr_scheduler = training.make_optimizer([(model, 0.02)], 0.01, 3 * epochs)

    def step(index, epoch):
        interrupt.count()
        if len(index) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits = model(x[index])
        loss = nn.functional.cross_entropy(logits, y[index])
        return loss, {"accuracy": (logits.argmax(1) == y[index]).float().mean()}, len(index)

    def validate():
        return {"loss": nn.functional.cross_entropy(model(x), y)}

    history = training.fit(
        "toy",
        model,
        optimizer,
        lr_scheduler,
        lambda epoch: torch.randperm(24).split(8),
        step,
        validate,
        epochs=epochs,
        seed=1,
        runtime=runtime,
        ema_decay=ema_decay,
    )
    return model, history


@pytest.fixture
def runtime(gpu, monkeypatch, tmp_path):
    """A function that starts the project's `gpu` profile on a card of a capability."""
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path)

    def start(capability):
        fake_accelerator.install(monkeypatch, capability)
        place = device.choose_device()
        assert place == gpu
        return device.start(place, device.choose_profile(place))

    return start


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_training_in_mixed_precision_comes_near_float32(runtime, capability, recwarn):
    model, history = train(runtime(capability))
    _, exact = train(device.Runtime(torch.device("cpu")))
    assert history.column("train_loss") == pytest.approx(exact.column("train_loss"), abs=0.02)
    assert next(model.parameters()).device.type == "fake"
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_an_interrupted_training_goes_on(runtime, capsys):
    _, whole = train(runtime((7, 5)), ema_decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(runtime((7, 5)), stop=4, ema_decay=0.9)
    _, history = train(runtime((7, 5)), ema_decay=0.9)
    assert "continues after epoch 1" in capsys.readouterr().out
    assert history.column("val_loss") == whole.column("val_loss")


def test_a_step_that_does_not_fit_is_taken_in_parts(runtime, capsys):
    train(runtime((7, 5)), limit=3)
    assert "in 4 parts" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_backbones(runtime, name):
    run = runtime((7, 5))
    network = run.place(backbones.load_backbone(name, pretrained=False))
    with run.precision():
        features = network(torch.rand(2, 3, 32, 32, device=run.device))
        features.float().square().mean().backward()
    assert features.shape == (2, network.feature_size)
    assert all(p.grad is not None and p.grad.device == p.device for p in network.parameters())


def test_the_operator_and_those_it_is_compared_with(runtime):
    config = dataclasses.replace(bench.Config(), shapes=((2, 4, 6, 5),))
    run, gradients = runtime((8, 0)), {}
    for name, function in bench.contenders().items():
        tensors = bench.inputs(config.shapes[0], config, run)
        if name != "torchvision":  # an operation of C++ that knows only real devices
            out = function(*tensors)
            gradients[name] = torch.autograd.grad(out.square().sum(), tensors[0])[0].cpu()
    assert torch.allclose(gradients["ours"], gradients["readable"], atol=1e-4)


# --- the notebooks --------------------------------------------------------------------------------
SIZES = {  # how profile `gpu` differs here from the smoke profile
    "transfer_learning": {
        "backbone": "resnet50",
        "study_labels": (5,),
        "study_steps": (2,),
        "study_seeds": (0, 1),
        "mining_seeds": (0,),
        "fc_steps": 10,
    },
    "deformable_convolution": {"per_class": 12, "views": 1, "epochs": 1, "fine_images": 8},
    "detect_change": {},
}
PLANTS = {  # a part of a cell that defines something, and the same without its device
    "transfer_learning": ("torch.eye(2, 3, device=images.device)", "torch.eye(2, 3)"),
    "deformable_convolution": (", device=offset.device)", ")"),
    "detect_change": (
        "torch.arange(a.shape[self.axis], device=a.device)",
        "torch.arange(a.shape[self.axis])",
    ),
}


def small_resnet():
    """A network of a tenth of ResNet-50's layers."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def run_notebook(name, monkeypatch, folder, plant=None):
    """Run all cells of a notebook in this process, on the stand-in, as profile `gpu`.

    Args:
        folder: where its files go.
        plant: (text, other text) to replace in a cell that defines something.
    """
    module = types.ModuleType(f"notebooks.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.setenv("HW3_PROFILE", "gpu")
    monkeypatch.setattr(training, "CHECKPOINTS", folder)
    monkeypatch.setattr(results, "reports_folder", lambda *_: folder)
    drawn = data.Source("drawn images", "stand-in")
    monkeypatch.setattr(data, "find_source", lambda *_, **__: drawn)
    monkeypatch.setattr(plotting, "show", lambda fig, *_: plt.close(fig))
    for network in ("resnet18", "resnet50"):  # small, and not downloaded
        monkeypatch.setattr(torchvision.models, network, small_resnet)
    weights = small_resnet().state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: weights)
    start = session.start

    def start_small(name, dataset, configs):
        small = dataclasses.replace(configs["smoke"], **SIZES[name])
        return start(name, dataset, configs | {"gpu": small})

    monkeypatch.setattr(session, "start", start_small)
    planted = 0
    for number, cell in enumerate(notebooks.read(name).cells, 1):
        if cell.cell_type == "code":
            source = cell.source
            if plant and "define" in cell.metadata.get("tags", []):
                planted += source.count(plant[0])
                source = source.replace(*plant)
            exec(compile(source, f"<{name}, cell {number}>", "exec"), module.__dict__)
    assert plant is None, f"not caught ({planted} planted)"
    return module


@pytest.mark.parametrize("name", notebooks.names())
def test_notebook(gpu, name, monkeypatch, tmp_path):
    module = run_notebook(name, monkeypatch, tmp_path)
    assert module.run.runtime.autocast == torch.bfloat16 and module.run.runtime.device == gpu


@pytest.mark.parametrize("name", PLANTS)
def test_a_forgotten_device_is_caught(gpu, name, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        run_notebook(name, monkeypatch, tmp_path, PLANTS[name])
