"""Shared plumbing of the three notebooks; the assessed ideas stand in the notebooks themselves."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ProjectError(RuntimeError):
    """An error meant for the reader: one line that says what is wrong and what to do."""
