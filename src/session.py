"""One door for a notebook: profile, data, device, clock, metrics, figures, results."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from IPython import get_ipython
from IPython.display import Markdown, display

from src import ROOT, ProjectError, data, device, plotting, provenance, results, settings

# Main memory in GB that the profiles for GPUs need, as `make estimate` counts it.
MAIN_MEMORY = {
    "transfer_learning": {"gpu": 3.3, "gpu_full": 3.3},
    "deformable_convolution": {"gpu": 9.5, "gpu_full": 22.6},
    "detect_change": {"gpu": 5.4, "gpu_full": 11.9},
}
OUT_OF_MEMORY = (
    "The memory of this machine or its GPU does not suffice: close other programs and notebooks, "
    "or set HW3_PROFILE=cpu (or demo) or HW3_DEVICE=cpu, then restart the kernel and run again."
)
_MEASURED = {"voice": "measured"}  # tells the page that an output's text comes from this run


class _Lines(str):
    """Text that a notebook displays as it would be printed."""

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))


class Answers:
    """The table at the top of a notebook: what is asked, where it is answered, what came out.

    It is displayed when it is made and completed in place by `fill`, at the end of the same run.

    Args:
        rows: (item of the assignment, question in a few words, heading of the section that answers
            it, template of the answer for `results.render`).
    """

    def __init__(self, rows: Sequence[tuple[str, str, str, str]]):
        self.rows = list(rows)
        waiting = ["*filled in at the end of this run*"] * len(self.rows)
        self.handle = display(Markdown(self._table(waiting)), metadata=_MEASURED, display_id=True)

    def _table(self, answers: Sequence[str]) -> str:
        def link(heading: str) -> str:
            return f"[{heading}](#{heading.replace(' ', '-')})"

        rows = [
            (item, question, link(heading), answer)
            for (item, question, heading, _), answer in zip(self.rows, answers)
        ]
        return results.table(["item", "question", "section", "answer"], rows)

    def fill(self, stored: Mapping, **values) -> None:
        """Complete the table from a results file and further values."""
        answers = [results.render(row[3], stored, **values) for row in self.rows]
        if self.handle:  # there is none outside of a notebook
            self.handle.update(Markdown(self._table(answers)), metadata=_MEASURED)


class Run:
    """What all cells of one run share; `start` makes it.

    Attributes:
        name: of the notebook.
        profile: one of `settings.PROFILES`.
        config: the profile's configuration.
        source: where the images come from.
        runtime: device and precision.
        metrics: {name: Metric}, filled section by section.
    """

    def __init__(self, name: str, profile: str, config, source: data.Source, runtime):
        self.name, self.profile, self.config = name, profile, config
        self.source, self.runtime = source, runtime
        self.metrics: dict[str, results.Metric] = {}
        self.figures = self.tables = 0
        self.clock = device.Stopwatch(runtime)
        path = ROOT / "notebooks" / f"{name}.ipynb"
        self.fingerprint = provenance.code_fingerprint(*([path] if path.is_file() else []))

    @property
    def reports(self) -> Path:
        """The folder where this run writes its results and models."""
        return results.reports_folder(self.source.is_standin, self.profile)

    def digest_parts(self) -> tuple:
        """What a checkpoint depends on; clock and metrics are not part of it."""
        return self.profile, self.config, self.source.name

    def show(self, fig, caption: str, alt: str) -> None:
        """Display a figure with its number, caption and alt text; see `plotting.show`."""
        self.figures += 1
        caption = f"**Figure {self.figures}.** {caption}"
        plotting.show(fig, caption, alt, self.source.is_standin)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence], caption: str) -> None:
        """Display a table with its number and caption; see `results.table`."""
        self.tables += 1
        text = f"**Table {self.tables}.** {caption}\n\n{results.table(headings, rows)}"
        display(Markdown(text), metadata=_MEASURED)

    def say(self, text: str, **values) -> None:
        """Display prose with this run's numbers; see `results.render`."""
        display(Markdown(results.render(text, self.metrics, **values)), metadata=_MEASURED)

    def save(
        self,
        *,
        seeds: Iterable[int],
        curves: Mapping | None = None,
        arrays: Mapping | None = None,
        config=None,
    ) -> dict:
        """Write the results file and load it again; see `results.save_results`.

        Args:
            config: takes the place of the run's own where a setting could not be kept.
        """
        path = results.save_results(
            self.name,
            self.metrics,
            profile=self.profile,
            source=self.source,
            runtime=self.runtime,
            seeds=seeds,
            seconds=self.clock.lap(),
            config=config or self.config,
            curves=curves,
            arrays=arrays,
            fingerprint=self.fingerprint,
        )
        return results.load_results(path)


def start(name: str, dataset: data.DataSet, configs: Mapping) -> Run:
    """Decide profile, data source and device, once; print them, and give the run.

    `HW3_PROFILE` decides the profile where it is set. Otherwise: `demo` where only the drawn
    stand-in is at hand, `gpu` or `gpu_full` where the GPU is large enough, else `cpu`.

    Args:
        name: of the notebook, without ending.
        dataset: what it needs.
        configs: {profile: configuration}.

    Raises:
        ProjectError: if a setting or the data are not right; nothing is downloaded then.
    """
    chosen = settings.read()
    place = device.choose_device(chosen.device)
    wanted = chosen.profile or device.choose_profile(place)
    source = data.find_source(dataset, profile=wanted, folder=chosen.data, mirror=chosen.mirror)
    profile = "demo" if source.is_standin and not chosen.profile else wanted
    if profile not in configs:
        raise ProjectError(f"{name} has no profile {profile}: set HW3_PROFILE to another one.")
    _say_memory(name, profile)
    runtime = device.start(place, profile)
    plotting.setup()
    if shell := get_ipython():
        shell.events.register("post_run_cell", _explain_lack_of_memory)
    if source.is_standin:
        display(
            Markdown(
                f"> **{plotting.STANDIN_MARK}.** The images of this run are drawn by the project's "
                "own code, because the real ones are not at hand (or the profile is `smoke`). It "
                "shows that everything works, and no more."
            )
        )
    run = Run(name, profile, configs[profile], source, runtime)
    versions = provenance.versions()
    shown = f"Python {versions['python']}, PyTorch {torch.__version__}, {runtime.describe()}"
    lines, defaults = [f"profile {profile}; {shown}"], type(run.config)()
    for field in dataclasses.fields(run.config):
        value = getattr(run.config, field.name)
        if value != getattr(defaults, field.name):
            lines.append(f"  {field.name} = {value}")
    about = {
        "profile": profile,
        "data_source": source.name,
        "standin": source.is_standin,
        "fingerprint": run.fingerprint,
    }
    # The tools read from the output itself what kind of run it shows.
    display(_Lines("\n".join(lines)), metadata={"hw3": about})
    return run


def _say_memory(name: str, profile: str) -> None:
    """Say before the work begins how much main memory it needs, where that has been counted."""
    needed, total = MAIN_MEMORY.get(name, {}).get(profile), device.main_memory()
    if needed:
        text = f"Profile {profile} needs about {needed:.0f} GB of main memory"
        if total:
            too_little = total < needed * device.GIGABYTE
            text += f", this machine has {'only ' * too_little}{total / device.GIGABYTE:.0f}"
        print(f"{text}; HW3_PROFILE=demo asks for less.")


def _explain_lack_of_memory(result) -> None:
    """Say what to do after a cell that ran out of memory; IPython calls it after every cell."""
    error = result.error_in_exec
    if error and device.is_out_of_memory(error):
        error.args = (OUT_OF_MEMORY,)  # what the runner of the notebook reports
        print(OUT_OF_MEMORY)
