"""Which profile a run uses: how much data, which network, how long."""

import os

from src import ProjectError

PROFILES = ("smoke", "demo", "cpu", "gpu")


def choose_profile(standin: bool, cuda: bool) -> str:
    """Names the profile of this run.

    `HW3_PROFILE` decides where it is set. Otherwise: `demo` where only the drawn stand-in
    images are at hand, `gpu` with CUDA, `cpu` with real data and no CUDA.

    Args:
        standin: whether the images are the project's own stand-in.
        cuda: whether a CUDA device is usable.

    Raises:
        ProjectError: if `HW3_PROFILE` names no profile.
    """
    requested = os.environ.get("HW3_PROFILE", "").strip()
    if requested:
        if requested not in PROFILES:
            raise ProjectError(
                f"HW3_PROFILE={requested!r} is no profile: set it to one of {', '.join(PROFILES)}, or unset it."
            )
        return requested
    return "demo" if standin else "gpu" if cuda else "cpu"
