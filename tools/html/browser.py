"""A headless Chromium or Chrome, for printing and for tests."""

import shutil
import subprocess
import tempfile

from src import ProjectError

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    *(f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")),
)
_FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars"
).split()


def run_chromium(*arguments: str) -> subprocess.CompletedProcess:
    """Run a headless browser on local files, without its background traffic; capture its output.

    Raises:
        ProjectError: None is installed, or it fails.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ProjectError(
            "no Chromium or Chrome is installed: apt-get install chromium "
            "(macOS: brew install --cask chromium)"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*(f"--{flag}" for flag in _FLAGS), f"--user-data-dir={profile}"]
        command = [browser, *flags, *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProjectError(f"{browser} failed: {error}") from error
