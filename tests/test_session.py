"""Settings, sessions, files: what every notebook begins with."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from IPython.core.events import EventManager

from src import ROOT, ProjectError, data, device, files, plotting, results, session, settings


# --- settings
@pytest.mark.parametrize("value", ["smoke", " smoke", "smoke ", '"smoke"', "'smoke' ", "smoke\r"])
def test_settings_are_stripped(value):
    assert settings.read({"HW3_PROFILE": value}).profile == "smoke"


def test_every_setting_is_stripped(tmp_path):
    """As `set X=v && ...` in a Windows prompt, a copied line or a file of settings leaves them."""
    for form in ("{} ", ' "{}" ', "'{}'\n", "{}\r\n", "\t{}"):
        values = {"HW3_DATA": tmp_path, "HW3_DEVICE": "cpu", "HW3_MIRROR": "http://x/y/"}
        read = settings.read({name: form.format(value) for name, value in values.items()})
        assert read == settings.Settings(None, tmp_path.resolve(), "cpu", "http://x/y")


def test_unset_and_empty_settings_are_none():
    empty = settings.Settings()
    assert settings.read({}) == settings.read({"HW3_PROFILE": " ", "HW3_DATA": ""}) == empty


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("HW3_PROFILE", "smok", "HW3_PROFILE='smok' is not one of smoke, demo, cpu, gpu, gpu_full"),
        ("HW3_PROFILE", "Smoke", "correct or unset it"),
        ("HW3_PROFILE", " CPU ", "HW3_PROFILE='CPU' is not one of smoke, demo, cpu"),
        ("HW3_DEVICE", "gpu", "HW3_DEVICE='gpu' is not one of cpu, cuda"),
        ("HW3_DEVICE", "cuda:1", "HW3_DEVICE='cuda:1' is not one of cpu, cuda"),
        ("HW3_MIRROR", "example.org", "is not an address: begin it with https://"),
        ("HW3_DATA", "no/such/folder", "HW3_DATA=no/such/folder is not a folder"),
        ("HW3_DATA", "~nosuchuser", "HW3_DATA=~nosuchuser is not a folder"),
        ("HW3_DATA", "x" * 300, "x... is not a folder"),
        ("HW3_DATA", "a\0b", "is not a folder"),
        ("HW3_DATA", __file__, "is not a folder"),
        ("HW3_MIRROR", "file:///data", "is not an address: begin it with https://"),
    ],
)
def test_wrong_settings_get_one_line(name, value, message):
    with pytest.raises(ProjectError) as error:
        settings.read({name: value})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_folder_relative_to_working_directory_then_project(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings.read({"HW3_DATA": "mine"}).data == tmp_path / "mine"
    assert settings.read({"HW3_DATA": "theory"}).data == ROOT / "theory"
    assert settings.read({"HW3_MIRROR": "http://x/y/"}).mirror == "http://x/y"


# --- start
@dataclass(frozen=True)
class Config:
    epochs: int = 3  # passes
    lr: float = 0.1


CONFIGS = {"smoke": Config(epochs=1), "demo": Config(epochs=2), "cpu": Config(), "gpu": Config()}


class Fetching:
    """A data set that tells how often it was asked for."""

    def __init__(self, holds):
        self.fetched, self.holds = 0, holds
        self.dataset = data.DataSet("Toys", lambda folder, profile: self.holds, self.fetch)

    def fetch(self, folder, profile, mirror):
        self.fetched += 1


@pytest.fixture
def toys(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA", tmp_path)
    return Fetching(holds=False)


def test_a_misspelt_profile_stops_before_anything_is_downloaded(toys, monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "smok")
    with pytest.raises(ProjectError, match="HW3_PROFILE='smok' is not one of"):
        session.start("toy", toys.dataset, CONFIGS)
    assert toys.fetched == 0


@pytest.mark.parametrize("value", [" smoke", "smoke "])
def test_smoke_with_a_blank_takes_the_standin_although_real_data_are_there(
    toys, monkeypatch, value
):
    toys.holds = True
    monkeypatch.setenv("HW3_PROFILE", value)
    run = session.start("toy", toys.dataset, CONFIGS)
    assert run.profile == "smoke" and run.source.is_standin and toys.fetched == 0
    assert run.reports == ROOT / "reports" / "standin"


def test_real_data_without_a_gpu_run_at_full_size(toys, capsys):
    toys.holds = True
    run = session.start("toy", toys.dataset, CONFIGS)
    assert (run.profile, run.source.name, run.reports) == ("cpu", "data/", ROOT / "reports")
    assert "epochs" not in capsys.readouterr().out, "what is as in the class is not printed"


def test_demo_on_real_data_leaves_the_results_of_the_full_size(toys, monkeypatch, capsys):
    toys.holds = True
    monkeypatch.setenv("HW3_PROFILE", "demo")
    run = session.start("toy", toys.dataset, CONFIGS)
    assert run.reports == ROOT / "reports" / "demo"
    assert "  epochs = 2\n" in capsys.readouterr().out


def test_without_data_and_network_the_demo_runs(toys, monkeypatch):
    def unreachable(*_):
        raise data.DownloadError("no network")

    broken = data.DataSet("Toys", lambda folder, profile: False, unreachable)
    run = session.start("toy", broken, CONFIGS)
    assert run.profile == "demo" and run.source.is_standin


def test_a_profile_that_the_notebook_lacks(toys, monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "gpu_full")
    toys.holds = True
    with pytest.raises(ProjectError, match="toy has no profile gpu_full"):
        session.start("toy", toys.dataset, CONFIGS)


@pytest.mark.parametrize(
    "gigabytes, text",
    [(33.5, "this machine has 34;"), (12.7, "this machine has only 13;"), (None, "memory; HW3_")],
)
def test_how_much_main_memory_a_run_needs_is_said_first(toys, monkeypatch, capsys, gigabytes, text):
    toys.holds = True
    monkeypatch.setenv("HW3_PROFILE", "gpu_full")
    total = gigabytes and gigabytes * 1e9
    monkeypatch.setattr(device, "main_memory", lambda: total)
    session.start("deformable_convolution", toys.dataset, CONFIGS | {"gpu_full": Config()})
    printed = capsys.readouterr().out
    assert "Profile gpu_full needs about 23 GB of main memory" in printed and text in printed
    assert "HW3_PROFILE=demo asks for less" in printed
    monkeypatch.setenv("HW3_PROFILE", "cpu")
    session.start("deformable_convolution", toys.dataset, CONFIGS)
    assert "main memory" not in capsys.readouterr().out


def test_this_machine_tells_its_main_memory(monkeypatch):
    assert device.main_memory() is None or device.main_memory() > 5e8
    monkeypatch.delattr(os, "sysconf", raising=False)  # as on Windows
    assert device.main_memory() is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 9.3 GiB for an array"),
    ],
)
def test_a_cell_that_runs_out_of_memory_is_told_what_to_do(toys, monkeypatch, capsys, error):
    toys.holds = True
    shell = SimpleNamespace(events=EventManager(None, {"post_run_cell": lambda result: None}))
    monkeypatch.setattr(session, "get_ipython", lambda: shell)
    for _ in range(2):  # the cell may be run again
        session.start("toy", toys.dataset, CONFIGS)
    capsys.readouterr()
    other = ValueError("shapes do not match")
    for harmless in (None, other):
        shell.events.trigger("post_run_cell", SimpleNamespace(error_in_exec=harmless))
    assert not capsys.readouterr().out and str(other) == "shapes do not match"
    shell.events.trigger("post_run_cell", SimpleNamespace(error_in_exec=error))
    assert capsys.readouterr().out.splitlines() == [session.OUT_OF_MEMORY] == [str(error)]


# --- a run's figures, tables and results
@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    source, runtime = data.Source("Toys", "HW3_DATA"), device.Runtime(torch.device("cpu"))
    return session.Run("toy", "cpu", Config(), source, runtime)


@pytest.fixture
def shown(monkeypatch):
    class Outputs(list):
        about: list

    def display(output, metadata=None, **_):
        outputs.append(output)
        outputs.about.append(metadata or {})

    outputs = Outputs()
    outputs.about = []
    for module in (session, plotting):
        monkeypatch.setattr(module, "display", display)
    return outputs


def figure(xlabel="x"):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.set(xlabel=xlabel, ylabel="y", title="t")
    return fig


def test_figures_and_tables_are_numbered(run, shown):
    run.show(figure(), "One.", "A line.")
    run.show(figure(), "Two.", "A line.")
    run.table(["a"], [[1]], "Numbers.")
    assert [about.get("image/png") for about in shown.about][0] == {"alt": "A line."}
    assert shown.about[-1] == {"voice": "measured"}
    captions = [output.data for output in (shown[1], shown[3], shown[4])]
    assert captions[:2] == ["**Figure 1.** One.", "**Figure 2.** Two."]
    assert captions[2].startswith("**Table 1.** Numbers.\n\n|")
    with pytest.raises(ProjectError, match="axis 't' needs labels"):
        run.show(figure(xlabel=""), "Three.", "A line.")
    with pytest.raises(ProjectError, match="needs a caption, and alt text"):
        run.show(figure(), "Three.", " ")
    plt.close("all")


def test_answers_are_completed_from_the_stored_results(run, monkeypatch):
    class Handle:
        def update(self, output, metadata):
            assert metadata == {"voice": "measured"}
            self.text = output.data

    handle, first = Handle(), []
    monkeypatch.setattr(session, "display", lambda x, **_: first.append(x.data) or handle)
    rows = [("1b", "Accuracy", "4. Cross-entropy", "{ce.accuracy:short}, {word}")]
    answers = session.Answers(rows)
    assert "filled in at the end" in first[0] and "(#4.-Cross-entropy)" in first[0]
    run.metrics["ce.accuracy"] = results.single(0.5, "fraction")
    answers.fill(run.save(seeds=[0]), word="half")
    assert "50.0 %, half" in handle.text and "filled in" not in handle.text


def test_saved_results_know_the_fingerprint_of_the_code(run):
    run.metrics["a"] = results.single(1, "px")
    stored = run.save(seeds=[1])
    assert stored["fingerprint"] == run.fingerprint and len(run.fingerprint) == 16


# --- files
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "a.txt"
    files.write_whole(target, "é\n")
    assert target.read_bytes() == "é\n".encode()
    with pytest.raises(ZeroDivisionError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text(encoding="utf-8") == "é\n"
    assert os.listdir(target.parent) == ["a.txt"]


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ProjectError, match="a.txt cannot be written in file/"):
        files.write_whole(tmp_path / "file" / "a.txt", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_gets_one_line_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ProjectError, match="No space left"), files.replacing(target) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
