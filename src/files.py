"""Write a file whole or not at all."""

import contextlib
import os
import time
from pathlib import Path

from src import ProjectError

WAITS = (0.1, 0.5, 2, 5)  # seconds; virus scanners and synchronized folders hold a file for moments


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path`, which takes its place when the block ends well.

    A ProjectError with the system's own reason if it cannot be written. The old file stays; where
    only the last step is refused, the new content stays beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        _remove(temporary)
        raise ProjectError(f"{path} cannot be written: {error.strerror or error}.") from error
    except BaseException:
        _remove(temporary)
        raise
    _replace(temporary, path)


def _replace(temporary, path):
    for wait in (*WAITS, None):
        try:
            return os.replace(temporary, path)
        except OSError as error:
            if wait is None:
                raise ProjectError(
                    f"{path} cannot be replaced ({error.strerror or error}): its new content is "
                    f"in {temporary.name} beside it; close what holds the old file."
                ) from error
            time.sleep(wait)


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def write_whole(path, content):
    """Write a file in one step; text as UTF-8 with line feeds on every system."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
