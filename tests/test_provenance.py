"""The fingerprint of code, and the digest by which checkpoints know what they belong to."""

import functools
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from src import ROOT, provenance


@pytest.fixture
def project(tmp_path):
    (tmp_path / "src").mkdir()

    def fingerprint(code, cell="y = 2", newline="\n"):
        text = code.replace("\n", newline)
        (tmp_path / "src" / "a.py").write_bytes(text.encode())
        cells = [
            {"cell_type": "markdown", "source": ["# Title"]},
            {"cell_type": "code", "source": [cell], "outputs": [str(newline)]},
        ]
        path = tmp_path / "toy.ipynb"
        path.write_text(json.dumps({"cells": cells}))
        return provenance.code_fingerprint(path, folder=tmp_path)

    return fingerprint


CODE = 'def area(r):\n    """Old words."""\n    return 3 * r\n'


def test_words_layout_and_line_endings_make_no_result_stale(project):
    same = [
        CODE,
        CODE.replace("Old", "New"),
        CODE.replace('    """Old words."""\n', "    # a comment\n"),
        CODE.replace("3 * r", "(3\n            * r)"),
    ]
    assert len({project(code) for code in same}) == 1
    assert project(CODE, newline="\r\n") == project(CODE)
    assert project(CODE, cell="y = 2  # two") == project(CODE)


def test_other_code_has_another_fingerprint(project):
    others = [
        project(CODE),
        project(CODE.replace("3", "4")),
        project(CODE.replace("area", "size")),
        project(CODE, cell="y = 3"),
        project(CODE, cell="%matplotlib inline"),
        project(CODE.replace("3 * r", '"""Old words."""')),
    ]
    assert len(set(others)) == len(others)


def test_data_files_beside_the_code_count(project, tmp_path):
    before, sample = project(CODE), tmp_path / "src" / "sample.json"
    sample.write_bytes(b'{"train": [\n1, 2]}')
    first = project(CODE)
    sample.write_bytes(b'{"train": [\r\n1, 2]}')
    assert project(CODE) == first != before
    sample.write_bytes(b'{"train": [\n1, 3]}')
    assert project(CODE) != first


@pytest.mark.parametrize("copy", [".ipynb_checkpoints/a-checkpoint.py", "._a.py"])
def test_hidden_copies_beside_the_code_do_not_count(project, tmp_path, copy):
    """What JupyterLab and macOS leave there."""
    before, path = project(CODE), tmp_path / "src" / copy
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x00\x05\x16\x07\xff")
    assert project(CODE) == before


def test_no_file_in_src_is_left_out():
    files = [p for p in (ROOT / "src").rglob("[!.]*.*") if p.suffix != ".pyc"]
    assert {path.suffix for path in files} == set(provenance.FINGERPRINTED)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("git"),
        PermissionError("git"),
        subprocess.TimeoutExpired("git", 1),
        subprocess.CalledProcessError(128, "git", "", "fatal: detected dubious ownership"),
        subprocess.CalledProcessError(128, "git", "", "fatal: not a git repository"),
    ],
    ids=str,
)
def test_without_git_the_commit_is_unknown(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance.commit() == "unknown"


def test_the_commit_is_this_projects_own(monkeypatch, tmp_path):
    """Not that of a repository in whose folder it was unpacked."""
    inner = tmp_path / "repository" / "HW3"
    inner.mkdir(parents=True)
    git = ["git", "-C", str(inner.parent), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "Begin"], check=True)
    monkeypatch.setattr(provenance, "ROOT", inner)
    assert provenance.commit() == "unknown"
    monkeypatch.setattr(provenance, "ROOT", inner.parent)
    assert len(provenance.commit()) == 40


# --- object_digest
@dataclass
class Settings:
    lr: float = 0.1


def loss(x):
    return (x * FACTOR).sum() + helper(x)


def helper(x):
    return x.mean()


FACTOR = 2.0


def make(data, settings):
    def step(index):
        return loss(data[index]) * settings.lr

    return step


X = torch.arange(12.0).view(3, 4)


def test_the_same_function_on_the_same_data_has_the_same_digest():
    assert provenance.object_digest(make(X, Settings())) == provenance.object_digest(
        make(X.clone(), Settings())
    )


@pytest.mark.parametrize("change", ["data", "settings", "global", "function", "dtype"])
def test_what_a_function_uses_changes_its_digest(change, monkeypatch):
    before = provenance.object_digest(make(X, Settings()))
    data, settings = X, Settings()
    if change == "data":
        data = X.clone()
        data[2, 3] += 1
    elif change == "settings":
        settings = Settings(0.2)
    elif change == "global":
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
    elif change == "function":
        monkeypatch.setitem(globals(), "helper", lambda x: x.amax())
    elif change == "dtype":
        data = X.double()
    assert provenance.object_digest(make(data, settings)) != before


def test_networks_count_with_their_weights_and_settings():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    before = provenance.object_digest(network)
    assert provenance.object_digest(network) == before
    network[1].p = 0.2
    assert provenance.object_digest(network) != before
    network[1].p = 0.1
    with torch.no_grad():
        network[0].bias[0] += 1
    assert provenance.object_digest(network) != before


def test_a_large_tensor_is_told_apart_by_its_sum():
    large = torch.zeros(2**23)
    before = provenance.object_digest(large)
    large[12_345] = 1
    assert provenance.object_digest(large) != before


class Largest(TorchDispatchMode):
    """Notices the largest tensor in double precision."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dtype == torch.float64:
            self.size = max(self.size, out.nbytes)
        return out


def test_a_large_tensor_is_never_copied_whole_in_double_precision():
    large = torch.zeros(2**25, dtype=torch.uint8)
    with Largest() as seen:
        provenance.object_digest(large)
    assert 0 < seen.size <= 2**23


def test_objects_that_refer_to_themselves_end():
    circle = {"a": 1}
    circle["self"] = circle
    assert provenance.object_digest(circle)


def scaled(x, factor):
    return factor * x


def made(base=object, **parts):
    """A class of this project."""
    return type("Made", (base,), {"__module__": __name__} | parts)


@pytest.mark.parametrize(
    "one, other",
    [
        [functools.partial(scaled, factor=factor) for factor in (2.0, 3.0)],
        [made(margin=margin) for margin in (0.2, 0.3)],
        [made(margin=margin)() for margin in (0.2, 0.3)],
        [made(width=property(width)) for width in (lambda self: 1, lambda self: 2)],
        [made(base=made(f=f)) for f in (lambda self: 1, lambda self: 2)],
        [nn.Sequential(made(nn.Module, margin=margin)()) for margin in (0.2, 0.3)],
        [nn.Sequential(made(nn.Module, forward=f)()) for f in (lambda s, x: x, lambda s, x: -x)],
        [TensorDataset(X), TensorDataset(X + 1)],
        [np.float32(1), np.float32(2)],
        [np.int64(1), np.int64(2)],
        [range(10), range(20)],
        [Path("a"), Path("b")],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_every_kind_count(one, other):
    assert provenance.object_digest(one) != provenance.object_digest(other)


def test_addresses_do_not_count():
    one, other = (
        [object(), np.random.default_rng(0), [].append, functools.cache(loss)] for _ in range(2)
    )
    assert repr(one) != repr(other)
    assert provenance.object_digest(one) == provenance.object_digest(other)
