"""The counting of operations and memory, and the budgets of profile `gpu`."""

import pytest
import torch
from torch import nn

from src import accounting, backbones, session
from tools import estimate


def resnet():
    return backbones.load_backbone("resnet50", pretrained=False)


def test_a_forward_pass_has_two_operations_per_multiplication():
    cost = estimate.forward(resnet, lambda: (torch.rand(2, 3, 64, 64),))
    macs = accounting.summary(resnet(), (3, 64, 64)).macs
    assert cost.flops == pytest.approx(2 * 2 * macs, rel=0.01)
    assert all(half for flops, _, half in cost.operations if flops)


def test_operations_in_place_count_and_views_do_not():
    class Product(nn.Module):
        def forward(self, x):
            return torch.zeros(4, 4).addmm_(x, x.t()).t()

    cost = estimate.forward(Product, lambda: (torch.rand(4, 4),), half=False)
    assert cost.flops == 2 * 4 * 4 * 4
    assert [moved for _, moved, _ in cost.operations] == [64, 4 * 64]  # bytes


def test_memory_of_a_training_step():
    with estimate.without_numbers(half=False) as meter:
        network, x = resnet().train(), torch.rand(64, 3, 224, 224)
        network(x).sum().backward()
    assert meter.cost.peak == pytest.approx(5.5 * 2**30, rel=0.05)  # as known of real cards
    with estimate.without_numbers(half=False) as meter:
        x = torch.ones(1000)
        for _ in range(5):
            x = x + 1
    assert meter.cost.peak == 2 * 4000


def test_the_slowest_of_computing_memory_and_launching_counts():
    card = estimate.Card(half=10.0, single=1.0, bandwidth=1.0)
    cost = estimate.Cost(
        [(100.0, 1.0, True), (100.0, 1.0, False), (1.0, 7.0, False), (0, 0, False)]
    )
    assert cost.seconds(card) == pytest.approx(10 + 100 + 7 + estimate.LAUNCH)


@pytest.mark.parametrize("name", estimate.NOTEBOOKS)
def test_profile_gpu_keeps_its_budgets(name):
    work = estimate.estimate(name, "gpu")
    found = (
        work.minutes(estimate.CARDS["T4"]),
        work.gpu_memory / estimate.GIGABYTE,
        (estimate.PROCESS + work.main_memory) / estimate.GIGABYTE,
    )
    for value, (what, budget) in zip(found, estimate.BUDGETS.items()):
        assert 0.1 * budget < value < budget, f"{name}: {value:.1f} {what}"


@pytest.mark.parametrize("name", estimate.NOTEBOOKS)
def test_the_main_memory_that_a_run_announces_is_the_counted_one(name, monkeypatch):
    for costly in ("training_step", "forward"):  # the main memory does not hang on them
        monkeypatch.setattr(estimate, costly, lambda *_, **__: estimate.Cost())
    monkeypatch.setattr(estimate.registration, "align", lambda *_: None)
    configs = estimate.module(name).CONFIGS
    for profile in estimate.PROFILES:
        work = estimate.NOTEBOOKS[name](configs[profile])
        counted = (estimate.PROCESS + work.main_memory) / estimate.GIGABYTE
        assert session.MAIN_MEMORY[name][profile] == pytest.approx(counted, rel=0.05)


def test_all_notebooks_are_counted():
    assert sorted(estimate.NOTEBOOKS) == estimate.notebooks.names()
