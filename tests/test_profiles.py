import pytest

from src import ProjectError
from src.profiles import PROFILES, choose_profile


@pytest.mark.parametrize(
    "standin, cuda, expected",
    [(True, False, "demo"), (True, True, "demo"), (False, False, "cpu"), (False, True, "gpu")],
)
def test_default_follows_data_and_device(standin, cuda, expected):
    assert choose_profile(standin, cuda) == expected


@pytest.mark.parametrize("name", PROFILES)
def test_the_environment_decides(monkeypatch, name):
    monkeypatch.setenv("HW3_PROFILE", name)
    assert choose_profile(standin=True, cuda=False) == name


def test_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "fast")
    with pytest.raises(
        ProjectError, match="'fast' is no profile: set it to one of smoke, demo, cpu, gpu"
    ):
        choose_profile(standin=False, cuda=False)
