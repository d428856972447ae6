"""The environment variables of the project, read, stripped and checked in one place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from src import ROOT, ProjectError

PROFILES = ("smoke", "demo", "cpu", "gpu", "gpu_full")


@dataclass(frozen=True)
class Settings:
    """What the user asked for; None where a variable is unset or empty."""

    profile: str | None = None  # HW3_PROFILE, one of `PROFILES`
    data: Path | None = None  # HW3_DATA, an existing folder
    device: str | None = None  # HW3_DEVICE, "cpu" or "cuda"
    mirror: str | None = (
        None  # HW3_MIRROR, the address that replaces the official hosts, without a final slash
    )


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    White space and quotation marks around a value are dropped: `set X=v && ...` in a Windows
    prompt leaves the one, a copied `X="v"` the other.

    Raises:
        ProjectError: if a value is not allowed; one line says which are.
    """

    def value(name: str) -> str | None:
        return environment.get(name, "").strip().strip("\"'").strip() or None

    def one_of(name: str, allowed: tuple[str, ...]) -> str | None:
        chosen = value(name)
        if chosen is not None and chosen not in allowed:
            known = ", ".join(allowed)
            raise ProjectError(f"{name}={chosen!r} is not one of {known}: correct or unset it.")
        return chosen

    mirror = value("HW3_MIRROR")
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise ProjectError(f"HW3_MIRROR={mirror!r} is not an address: begin it with https://.")
    return Settings(
        profile=one_of("HW3_PROFILE", PROFILES),
        data=_folder(value("HW3_DATA")),
        device=one_of("HW3_DEVICE", ("cpu", "cuda")),
        mirror=mirror.rstrip("/") if mirror else None,
    )


def _folder(value: str | None) -> Path | None:
    """The folder of `HW3_DATA`, relative to the working directory or else to the project."""
    if value is None:
        return None
    try:
        for folder in (Path(value).expanduser(), ROOT / value):
            if folder.is_dir():
                return folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, an unknown ~user, a NUL
        pass
    shown = value if len(value) <= 80 else value[:77] + "..."
    raise ProjectError(
        f"HW3_DATA={shown} is not a folder: correct it, or unset it to use data/ or a download."
    )
