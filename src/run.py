"""One door for a notebook: profile, data, device; figures, tables, prose; results."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from tabulate import tabulate

from src import ROOT, ProjectError, data, device, show
from src.files import replacing, write_whole
from src.stats import Estimate

PROFILES = ("smoke", "demo", "cpu", "gpu")
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pycocotools")
MEASURED = {"voice": "measured"}  # tells the page that an output's text comes from this run


# --- the environment ------------------------------------------------------------------------------
def setting(name, allowed=()):
    """An environment variable without the quotes and blanks that some shells leave around it.

    A ProjectError if its value is not one of the allowed ones.
    """
    value = os.environ.get(name, "").strip().strip("\"'").strip() or None
    if value and allowed and value not in allowed:
        one = ", ".join(allowed)
        raise ProjectError(f"{name}={value} is not one of {one}: correct or unset it.")
    return value


def data_folder():
    """The folder of `HW3_DATA`: relative to where the program was started, or to the project.

    A notebook's kernel works in the notebook's folder, so the shell's own folder (`PWD`) counts. A
    ProjectError if there is no such folder, or there are two.
    """
    value = setting("HW3_DATA")
    if value is None:
        return None
    path = Path(os.path.expanduser(value))
    places = {(Path(base) / path).resolve() for base in (os.environ.get("PWD", "."), ROOT)}
    folders = [place for place in places if place.is_dir()]
    if len(folders) == 1:
        return folders[0]
    problem = "is not a folder" if not folders else "could be two folders; give its full path"
    raise ProjectError(f"HW3_DATA={value} {problem}: correct it, or unset it to use data/.")


# --- what made a result ---------------------------------------------------------------------------
def src_digest(folder=ROOT):
    """Digest the bytes of all that `src` holds, whatever a system's line ends."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("src/**/*")):
        if path.suffix in (".py", ".gz") and not path.name.startswith("."):
            digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def cell_digest(source):
    """Digest a code cell; None for one that holds only comments and commands (`!pip`, `%cd`)."""
    lines = [line.rstrip() for line in source.strip().splitlines()]
    if all(not line or line.lstrip()[0] in "#!%" for line in lines):
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def executed_cells():
    """Digests of the code cells that this kernel has executed, the present one included."""
    shell = get_ipython()
    sources = shell.history_manager.input_hist_raw if shell else []
    return sorted({digest for source in sources if (digest := cell_digest(source))})


def commit():
    """The commit of this code, `-dirty` where files have changed; "unknown" without git."""
    command = ["git", f"--git-dir={ROOT / '.git'}", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def versions():
    """Python's version and those of the packages that decide numbers."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # only one notebook needs each
            known[name] = metadata.version(name)
    return known


# --- showing --------------------------------------------------------------------------------------
def markdown_table(headings, rows):
    """A markdown table; estimates in short form, columns of numbers aligned to the right."""

    def text(cell):
        if isinstance(cell, Estimate):
            return f"{cell:short}"
        if isinstance(cell, (float, np.floating)):
            return f"{cell:.3g}" if math.isfinite(cell) else "–"
        number = isinstance(cell, (int, np.integer)) and not isinstance(cell, bool)
        return (f"{cell:,}" if number else str(cell)).replace("|", "\\|")

    rows = [[text(cell) for cell in row] for row in rows]
    numeric = [all(re.match(r"[-+–—−]?(\d|$)", cell) for cell in column) for column in zip(*rows)]
    align = ["right" if is_number else "left" for is_number in numeric] or None
    return tabulate(rows, headings, "pipe", disable_numparse=True, colalign=align)


def _say(text, **options):
    """Display markdown in a notebook, print it elsewhere."""
    if get_ipython():
        return display(Markdown(text), metadata=MEASURED, **options)
    print(text)


class Answers:
    """The table at the top of a notebook: what is asked, where it is answered, what came out.

    It is displayed when it is made, and completed in place by `fill` at the end of the same run.
    Its rows are (item of the assignment, question in a few words, heading of the section).
    """

    def __init__(self, rows):
        self.rows = list(rows)
        table = self._table(["*filled in at the end of this run*"] * len(self.rows))
        self.handle = _say(table, display_id=True)

    def _table(self, answers):
        links = [f"[{heading}](#{heading.replace(' ', '-')})" for *_, heading in self.rows]
        rows = [(*row[:2], link, answer) for row, link, answer in zip(self.rows, links, answers)]
        return markdown_table(["item", "question", "section", "answer"], rows)

    def fill(self, *answers):
        """Complete the table: one markdown text for each row, in order."""
        if self.handle:  # there is none outside of a notebook
            self.handle.update(Markdown(self._table(answers)), metadata=MEASURED)


class Run:
    """What all cells of one run share; `start` makes it.

    Attributes:
        name: of the notebook.
        profile, config: one of `PROFILES`, and its configuration.
        source: where the images come from, or None.
        device: the CPU or the GPU.
        autocast: type of mixed precision, or None.
    """

    def __init__(self, name, profile, config, source, place):
        self.name, self.profile, self.config, self.source = name, profile, config, source
        self.device, self.autocast = place, device.autocast_type(place, profile)
        self.kind = {
            "profile": profile,
            "data_source": source.name if source else "none",
            "standin": bool(source and source.is_standin),
        }
        self.figures = self.tables = 0
        self.clock, self.src = device.Stopwatch(place), src_digest()

    @property
    def is_standin(self):
        return self.kind["standin"]

    @property
    def reports(self):
        """Where results and models go: only real data at full size reach the committed ones."""
        if self.is_standin or self.profile == "smoke":
            return ROOT / "reports" / "standin"
        return ROOT / "reports" / "demo" if self.profile == "demo" else ROOT / "reports"

    def precision(self):
        """The context in which forward passes and losses are computed."""
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.autocast is not None)

    def place(self, module):
        """Move a module to the device, its channels last."""
        return module.to(self.device, memory_format=torch.channels_last)

    def describe(self):
        """Machine and precision in words."""
        kind = str(self.autocast or torch.float32).removeprefix("torch.")
        return f"{device.machine(self.device)}, {kind}{' autocast' * bool(self.autocast)}"

    def figure(self, fig, caption, alt):
        """Display a figure with its number, caption and alt text, and close it."""
        self.figures += 1
        show.display_figure(fig, f"**Figure {self.figures}.** {caption}", alt, self.is_standin)

    def table(self, headings, rows, caption):
        """Display a table with its number and caption."""
        self.tables += 1
        _say(f"**Table {self.tables}.** {caption}\n\n{markdown_table(headings, rows)}")

    def say(self, text):
        """Display prose that holds this run's numbers."""
        _say(text)

    def save(self, metrics, seeds, curves=None, arrays=None):
        """Write `results/<name>.json`: the numbers with all that made them; and give its content.

        Args:
            metrics: {name: Estimate}; those that could not be measured are left out.
            seeds: all seeds of the run.
            curves: {training: `src.train.History`}.
            arrays: raw scores by name, written beside as `<name>.npz`.
        """
        measured = {key: value for key, value in metrics.items() if math.isfinite(value.value)}
        content = self.kind | {
            "device": self.device.type,
            "machine": self.describe(),
            "seeds": [int(seed) for seed in seeds],
            "versions": versions(),
            "commit": commit(),
            "code": {"src": self.src, "cells": executed_cells()},
            "date": datetime.date.today().isoformat(),
            "seconds": round(self.clock.lap(), 1),
            "config": dataclasses.asdict(self.config),
            "metrics": {key: dataclasses.asdict(value) for key, value in measured.items()},
            "curves": {key: dataclasses.asdict(value) for key, value in (curves or {}).items()},
        }
        path = self.reports / "results" / f"{self.name}.json"
        if arrays:
            with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
        write_whole(path, json.dumps(content, indent=1, default=str) + "\n")
        return content | {"metrics": measured}


def load_results(path):
    """Read a results file, its "metrics" as {name: Estimate}; None where none can be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        content["metrics"] = {
            key: Estimate(**entry | {"ci95": entry["ci95"] and tuple(entry["ci95"])})
            for key, entry in content["metrics"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return content


# --- the door -------------------------------------------------------------------------------------
def start(name, configs, dataset=None):
    """Decide profile, data and device, once; print them, and give the `Run`.

    `HW3_PROFILE` decides the profile where it is set. Otherwise: `demo` where only the drawn
    stand-in is at hand, `gpu` where the GPU is large enough, else `cpu`. A ProjectError if a
    setting or the user's data are not right; nothing is downloaded then.

    Args:
        name: of the notebook, without ending.
        configs: {profile: configuration}.
        dataset: what it needs, such as `data.COCO`.
    """
    asked, folder = setting("HW3_PROFILE", PROFILES), data_folder()
    place = device.choose(setting("HW3_DEVICE", ("cpu", "cuda")))
    profile, source = asked or device.profile_for(place), None
    if dataset:
        source = data.find(dataset, profile, folder, setting("HW3_MIRROR"))
        profile = "demo" if source.is_standin and not asked else profile
    device.prepare()
    show.setup()
    run = Run(name, profile, configs[profile], source, place)
    probe = run.reports / f".{name}"  # if nothing can be written there, better now than at the end
    write_whole(probe, "")
    probe.unlink()
    if run.is_standin or profile in ("smoke", "demo"):
        images = "drawn by the project's own code" if run.is_standin else "real"
        run.say(
            f"> **A demonstration.** Profile `{profile}`: few steps on few images, and these are "
            f"{images}. It shows that everything works; its numbers say nothing about the methods."
        )
    text = f"profile {profile}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
    text += run.describe()
    for field, value in dataclasses.asdict(run.config).items():
        if value != getattr(type(run.config)(), field):
            text += f"\n  {field} = {value}"
    if get_ipython():  # the tools read from the output itself what kind of run it shows
        display({"text/plain": text}, raw=True, metadata={"hw3": run.kind})
    else:
        print(text)
    return run
