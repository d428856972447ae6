"""Run notebooks top to bottom and write their pages: `python -m tools.run [NAME ...]`.

A run on real data with profile cpu, gpu or gpu_full goes into `notebooks/` and `reports/`; one on
the stand-in into `reports/standin/`, a demonstration on real data into `reports/demo/`.
"""

import argparse
import asyncio
import atexit
import contextlib
import re
import signal
import sys
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from src import ROOT, ProjectError, results, settings
from tools import notebooks
from tools.html import notebook_to_html, theory_to_html

UNFINISHED = "reports/unfinished"  # a notebook's outputs while it runs, and after it was cut off


class _Client(NotebookClient):
    """Run a notebook; show its progress bars in the runner's own bar and do not store them."""

    bar: tqdm
    stopped = False  # by a signal

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream" and content["name"] == "stderr" and "\r" in content["text"]:
            states = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", content["text"]).split("\r")
            last = next((state.strip() for state in reversed(states) if state.strip()), "")
            self.bar.set_postfix_str(last[:80])
            return None
        return super().process_message(msg, cell, cell_index)


class _Kernel(AsyncKernelManager):
    """Start kernels of this environment, wherever an installed kernelspec may lead."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(["--log-level=ERROR"]))


def run(name: str, folder: Path | None = None) -> nbformat.NotebookNode:
    """Run a notebook top to bottom in a fresh kernel and give it back with its outputs.

    After every cell, the outputs so far are written to `reports/unfinished/`.

    Args:
        name: The notebook's, without folder and ending.
        folder: The kernel's working directory, `notebooks/` by default; `make robustness` asks
            for others.

    Raises:
        ProjectError: A cell fails, or the kernel does; names the cell and the error. The traceback
            is printed.
        KeyboardInterrupt: The user or the system stopped it.
    """
    notebook, unfinished = notebooks.read(name), ROOT / UNFINISHED / f"{name}.ipynb"
    for cell in notebook.cells:  # a cell that is not reached must not keep an earlier run's output
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("hw3", None)
    client = _Client(
        notebook,
        timeout=None,
        record_timing=False,
        kernel_name="python3",
        kernel_manager_class=_Kernel,
        resources={"metadata": {"path": str(folder or notebooks.FOLDER)}},
    )
    total = sum(cell.cell_type == "code" for cell in notebook.cells)
    form = "{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}{postfix}"
    with tqdm(total=total, desc=name, bar_format=form, mininterval=1) as client.bar:

        def executed(cell, **_):
            client.bar.set_postfix_str("", refresh=False)
            client.bar.update(cell.cell_type == "code")
            try:
                notebooks.write(notebook, unfinished)
            except ProjectError as error:  # such as a full disk: no reason to end the run
                client.bar.set_postfix_str(str(error)[:80])

        def started(**_):
            loop, task = asyncio.get_running_loop(), asyncio.current_task()

            def stop():
                client.stopped = True
                task.cancel()

            # nbclient's own handler only stops the kernel, and the error that follows tells not why
            with contextlib.suppress(RuntimeError):  # Windows raises KeyboardInterrupt by itself
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, stop)

        client.on_notebook_start, client.on_cell_executed = started, executed
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"\n{error}", file=sys.stderr)
            outputs = [cell.get("outputs", []) for cell in notebook.cells]
            broken = [any(one.output_type == "error" for one in shown) for shown in outputs]
            failed = f"cell {broken.index(True) + 1} failed: {error.ename}: {error.evalue}"
        except (DeadKernelError, asyncio.CancelledError):
            if client.stopped:
                raise KeyboardInterrupt from None
            failed = "the kernel died (out of memory?)."
        except RuntimeError as error:  # it did not start
            atexit.unregister(client._cleanup_kernel)  # which would fail, too
            failed = f"no kernel in {sys.prefix} ({error}): pip install ipykernel"
        else:
            with contextlib.suppress(OSError):  # other notebooks may have left something there
                unfinished.unlink(missing_ok=True)
                unfinished.parent.rmdir()
            return notebook
    kept = f" What ran before is in {UNFINISHED}/{name}.ipynb." if unfinished.is_file() else ""
    raise ProjectError(f"{name}, {failed.rstrip('. ')}.{kept}")


def store(name: str, notebook: nbformat.NotebookNode) -> list[str]:
    """Write an executed notebook, then its page, to where a run of its kind goes.

    Returns:
        One line for every output that the page could not show.

    Raises:
        ProjectError: The page cannot be made; the notebook is written.
    """
    about = notebooks.about(notebook)
    profile = about.get("profile", settings.read().profile)
    notebook.metadata["hw3"] = about
    _hide_home(notebook)
    reports = results.reports_folder(about.get("standin") or profile == "smoke", profile)
    real = reports == results.reports_folder()
    path = (notebooks.FOLDER if real else reports) / f"{name}.ipynb"
    page = reports / f"{name}.html"
    notebooks.write(notebook, path)
    print(f"{name}: its outputs are in {path.relative_to(ROOT)}")
    try:
        left_out = notebook_to_html(path, page)
    except ProjectError:
        raise
    except Exception as error:  # whatever it stumbled over: the other notebooks are still to run
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ProjectError(f"{name}: its page cannot be made ({reason}).") from error
    print(f"{name}: wrote {page.relative_to(ROOT)}")
    return left_out


def _hide_home(notebook: nbformat.NotebookNode) -> None:
    """Write `~` for the user's folder, which libraries print when they download or warn."""
    home = str(Path.home())
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if len(home) > 1 else []:
            if output.output_type == "stream":
                output.text = re.sub(re.escape(home) + r"(?![\w-])", "~", output.text)


def main(arguments: list[str] | None = None) -> int:
    """Run notebooks; keep what has run, whatever fails later."""
    parser = argparse.ArgumentParser(prog="python -m tools.run", description=__doc__.split(":")[0])
    parser.add_argument("name", nargs="*", help="the notebooks to run (default: all)")
    chosen = parser.parse_args(arguments).name or notebooks.names()
    try:
        settings.read()
        for name in chosen:
            notebooks.read(name)
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    failed = []
    for name in [*chosen, "theory"]:
        try:
            if name in chosen:
                print("".join(f"{line}\n" for line in store(name, run(name))), end="", flush=True)
            else:
                theory_to_html(ROOT / "reports" / "theory.html")
                print("theory: wrote reports/theory.html")
        except ProjectError as error:
            failed.append(name)
            print(f"Error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"{name}: interrupted; what ran is in {UNFINISHED}/", file=sys.stderr)
            return 130
    if failed:
        print(f"Failed: {', '.join(failed)}. All else is written.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
