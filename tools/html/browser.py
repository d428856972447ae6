"""A headless Chromium or Chrome, for printing and for tests."""

import shutil
import subprocess
import tempfile

from src import ProjectError

_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    *(f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")),
)


def run_chromium(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a headless Chromium (or Chrome) on local files, without its background traffic; text output captured.

    Raises:
        ProjectError: None is installed, or it fails.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise ProjectError(
            "no Chromium or Chrome is installed: apt-get install chromium (macOS: brew install --cask chromium)"
        )
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars"
    ).split()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser,
            *(f"--{flag}" for flag in flags),
            f"--user-data-dir={profile}",
            *arguments,
        ]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProjectError(f"{browser} failed: {error}") from error
