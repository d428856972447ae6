"""What all tests share: the real data where they are at hand, and a neutral environment."""

import os
from pathlib import Path

import pytest

from tests import mirror as mirrors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch):
    """A developer's own HW3_* settings must not change what a test sees."""
    for name in [name for name in os.environ if name.startswith("HW3_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def mirror():
    """A server on this machine that stands for the official ones."""
    with mirrors.running() as server:
        yield server


@pytest.fixture
def real_data() -> Path:
    """The folder with the real CIFAR-10 and COCO images; skips the test where there is none."""
    candidates = [Path(_REAL_DATA)] if _REAL_DATA else [ROOT.parent / "shared" / "data"]
    folder = next((folder for folder in candidates if (folder / "cifar10").is_dir()), None)
    if folder is None:
        pytest.skip("no real data: HW3_DATA is not set and ../shared/data does not exist")
    return folder


_REAL_DATA = os.environ.get("HW3_DATA")  # read before the fixture above clears it
