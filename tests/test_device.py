"""The choice of device, profile and precision, on cards that are pretended."""

from types import SimpleNamespace

import pytest
import torch

from src import device


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a CUDA card."""

    def pretend(gigabytes=16.0, free=None, capability=(7, 5), kernels=True):
        free = gigabytes if free is None else free
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "get_device_name", lambda *_: "Pretended T4")
        total = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(cuda, "get_device_properties", lambda *_: total)
        monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (free * 1e9, gigabytes * 1e9))
        monkeypatch.setattr(cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(cuda, "synchronize", lambda *_: None)

        def ones(*size, requires_grad=False, device=None, real=torch.ones):
            if not kernels:
                raise RuntimeError("no kernel image is available for execution on the device\nmore")
            return real(*size, requires_grad=requires_grad)

        monkeypatch.setattr(torch, "ones", ones)
        return torch.device("cuda")

    return pretend


def test_a_card_that_works_is_taken(card):
    card()
    assert device.choose_device().type == "cuda"
    assert device.choose_device("cpu").type == "cpu"


def test_a_card_without_kernels_falls_back_to_the_cpu_in_one_line(card, capsys):
    card(kernels=False)
    assert device.choose_device().type == "cpu"
    (line,) = capsys.readouterr().out.splitlines()
    assert "Pretended T4 cannot be used" in line and "no kernel image" in line


def test_a_card_that_does_not_even_tell_its_name_falls_back_to_the_cpu(card, monkeypatch, capsys):
    def busy(*_):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    card(kernels=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", busy)
    assert device.choose_device().type == "cpu"
    assert "The GPU cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("build, reason", [("13.0", "too old"), (None, "built without CUDA")])
def test_a_gpu_that_this_pytorch_cannot_use_is_said(monkeypatch, capsys, build, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device.os.path, "exists", lambda path: path == "/dev/nvidia0")
    monkeypatch.setattr(torch.version, "cuda", build)
    assert device.choose_device().type == "cpu"
    assert reason in capsys.readouterr().out


def test_no_gpu_no_word(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device.os.path, "exists", lambda path: False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.choose_device().type == "cpu" and not capsys.readouterr().out
    device.choose_device("cuda")
    assert "No GPU can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gigabytes, free, capability, profile",
    [
        (15.8, None, (7, 5), "gpu"),  # T4
        (8.5, None, (8, 6), "gpu"),  # RTX 3070
        (25.3, None, (8, 9), "gpu_full"),  # RTX 4090
        (42.4, None, (8, 0), "gpu_full"),  # A100
        (34.1, None, (7, 0), "gpu"),  # V100: no bfloat16
        (6.4, None, (7, 5), "cpu"),
        (17.1, None, (6, 0), "cpu"),  # P100
        (25.3, 8.0, (8, 9), "gpu"),  # others use most of it
        (15.8, 2.0, (7, 5), "cpu"),
    ],
)
def test_profile_by_card(card, gigabytes, free, capability, profile, capsys):
    assert device.choose_profile(card(gigabytes, free, capability)) == profile
    assert f"Profile {profile}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "capability, profile, wanted",
    [
        ((8, 0), "gpu", torch.bfloat16),
        ((12, 0), "gpu_full", torch.bfloat16),
        ((7, 5), "gpu", torch.float16),
        ((6, 1), "gpu", None),
        ((8, 0), "cpu", None),
        ((8, 0), "smoke", None),
    ],
)
def test_mixed_precision_by_capability(card, capability, profile, wanted):
    assert device.autocast_type(card(capability=capability), profile) == wanted
    assert device.autocast_type(torch.device("cpu"), profile) is None


def test_precision_contexts():
    runtime = device.Runtime(torch.device("cpu"), torch.bfloat16)
    x = torch.ones(2, 2)
    with runtime.precision():
        assert (x @ x).dtype == torch.bfloat16
        with runtime.full_precision():
            assert (x @ x).dtype == torch.float32
    with device.Runtime(torch.device("cpu")).precision():
        assert (x @ x).dtype == torch.float32
    assert runtime.describe().endswith("bfloat16 autocast")


@pytest.mark.parametrize(
    "plain, half, wanted",
    [
        ([4, 5, 50], [3, 9, 9], torch.bfloat16),  # the best of several laps decides
        ([4, 5, 5], [3.5, 9, 9], None),  # not faster by enough
        ([50, 50, 4], [3.9, 9, 9], None),
    ],
)
def test_bfloat16_is_taken_where_it_is_clearly_faster(plain, half, wanted, monkeypatch):
    laps = {None: plain + plain[-1:] * 9, torch.bfloat16: half + half[-1:] * 9}
    monkeypatch.setattr(device.Stopwatch, "lap", lambda watch: laps[watch.runtime.autocast].pop(0))
    monkeypatch.setattr(
        device.Stopwatch, "__init__", lambda w, runtime: setattr(w, "runtime", runtime)
    )
    kinds = []
    runtime = device.Runtime(torch.device("cpu"))
    chosen = device.faster_precision(
        runtime, lambda: kinds.append(torch.is_autocast_enabled("cpu"))
    )
    assert chosen.autocast is wanted
    assert kinds == [False, True] * 9  # in turns, the first two to warm up
