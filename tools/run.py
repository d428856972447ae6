"""Run notebooks top to bottom and write their pages: `python -m tools.run [NAME ...]`.

A run on real data with profile cpu or gpu goes into `notebooks/` and `reports/`, a demonstration on
real data into `reports/demo/`, everything else into `reports/standin/`.
"""

import asyncio
import os
import re
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.preprocessors import ClearOutputPreprocessor, CoalesceStreamsPreprocessor
from tqdm import tqdm

from src import ROOT, ProjectError
from src.files import write_whole
from tools import notebooks
from tools.page import notebook_to_html, theory_to_html

UNFINISHED = "reports/unfinished"  # what has run of a notebook, while it runs or after it failed
STARTUP = 300  # seconds that a kernel may take to start, on a slow machine
QUIET = ["--log-level=CRITICAL"]  # else the kernel complains when a run is stopped
BAR = "{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}{postfix}"
BARS = re.compile(r"[^\n]*\r(?!\n)|[^\n]*?(%\||it \[)[^\n]*?\]")  # of tqdm, and what they overwrite
HOME = re.compile(re.escape(str(Path.home())) + r"(?![\w-])" if Path.home().name else r"(?!)")
FOLDERS = {"cpu": "", "gpu": "", "demo": "demo"}  # of reports/, by profile, for real data


class _Client(NotebookClient):
    """Shows the kernel's progress bars beside the runner's own, and does not store them."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            text = HOME.sub("~", msg["content"]["text"])
            if msg["content"]["name"] == "stderr":
                self.bar.set_postfix_str(text.strip().rpartition("\r")[2][:80])
                text = BARS.sub("", text).lstrip("\n")
                if not text.strip():
                    return None
            msg["content"]["text"] = text
        return super().process_message(msg, cell, cell_index)


async def execute(path: Path, kept: Path) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel; after every cell, write what has run into `kept`.

    A ProjectError, which names the cell, if the kernel does not start or dies, or a cell fails.
    """
    section, start = "beginning", time.monotonic()
    # A cell that is not reached must not keep an earlier run's outputs.
    notebook, _ = ClearOutputPreprocessor().preprocess(notebooks.read(path), {})
    # Of this environment, wherever an installed kernelspec may lead.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = _Client(notebook, km=kernel, startup_timeout=STARTUP, record_timing=False)
    client.bar = tqdm(
        None, path.stem, len(notebook.cells), bar_format=BAR, file=sys.stdout, disable=None
    )
    try:
        try:
            await kernel.start_kernel(cwd=str(path.parent), extra_arguments=QUIET)
            await client.async_start_new_kernel_client()
        except (RuntimeError, KeyError) as error:
            hint = "" if find_spec("ipykernel") else ": run `pip install ipykernel`"
            raise ProjectError(f"{path.stem}: the kernel did not start: {error}{hint}") from error
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "markdown" and cell.source.startswith("## "):
                section = cell.source.splitlines()[0][3:]
                tqdm.write(f"{path.stem}, {time.monotonic() - start:.0f} s: {section}")
            try:
                await client.async_execute_cell(cell, index)
            finally:
                write_whole(kept, nbformat.writes(notebook) + "\n")
            client.bar.update()
        return CoalesceStreamsPreprocessor().preprocess(notebook, {})[0]
    except CellExecutionError as error:
        reason = f"{error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        if await kernel.is_alive():  # so nbclient calls a run that is cancelled
            raise asyncio.CancelledError from None
        reason = f"the kernel died (status {await kernel.provisioner.poll()}); memory may be short"
    finally:
        client.bar.close()
        if client.kc:
            client.kc.stop_channels()
        if kernel.has_kernel:
            await kernel.shutdown_kernel()
    reason += f"; what ran is in {kept}"
    raise ProjectError(f"{path.stem}, cell {index + 1} ({section}): {reason}")


def produce(name, root):
    """Run a notebook; write it and its page to where a run of its kind goes; give the page."""
    if name == "theory":
        page = root / "reports" / "theory.html"
        theory_to_html(page, root / "theory")
        return page
    path, kept = (root / place / f"{name}.ipynb" for place in ("notebooks", UNFINISHED))
    notebook = asyncio.run(execute(path, kept))
    about = notebooks.about(notebook)
    kind = "standin" if about.get("standin", True) else FOLDERS.get(about["profile"], "standin")
    page = root / "reports" / kind / f"{name}.html"
    path = page.with_suffix(".ipynb") if kind else path
    write_whole(path, nbformat.writes(notebook) + "\n")
    kept.unlink()
    notebook_to_html(path, page)
    return page


def main(names, root=ROOT):
    """Run notebooks, then write the theory's page; if one fails, the others still run."""
    notebooks.print_anything()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("HW3_ROOT", None)  # it may name another copy of the project
    os.environ.setdefault("PWD", os.getcwd())  # where a relative HW3_DATA begins, in kernels too
    code = 0
    for name in [*(names or notebooks.names(root / "notebooks")), "theory"]:
        try:
            print(f"{name}: wrote {produce(name, root)}")
        except KeyboardInterrupt:
            print(f"{name}: interrupted; what ran is in {UNFINISHED}", file=sys.stderr)
            return 130
        except Exception as error:  # whatever a page stumbles over
            reason = error if isinstance(error, ProjectError) else f"{name}: {error!r}"
            print(f"Error: {reason}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
