"""Where the images come from: `HW3_DATA`, then `data/`, then the official source, then the built-in stand-in.

What a data set looks like on disk, and how it is read, each notebook says of its own; see `DataSet`.
"""

import atexit
import contextlib
import errno
import functools
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from src import ROOT, ProjectError, standin

DATA = ROOT / "data"  # downloads and the stand-in's files go here
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}
_NETWORK_ERRORS = (OSError, http.client.HTTPException, futures.TimeoutError)
_TIMEOUT = 20  # seconds without a byte before a download counts as broken


class DataError(ProjectError):
    """Data that are missing, damaged or cannot be stored; the message says what to do."""


class DownloadError(DataError):
    """The network failed; what has arrived is kept for the next try."""


@dataclass(frozen=True)
class DataSet:
    """How a data set is recognised on disk, and fetched where it is not."""

    title: str  # such as "CIFAR-10"
    is_in: Callable[[Path], bool]  # whether a folder holds it
    urls: tuple[str, ...]  # its files at the official source
    fetch: Callable[
        [str, Path], None
    ]  # stores what lies at one of the `urls` in a folder; see `download`, `download_zip`


@dataclass(frozen=True)
class Source:
    """Where a data set was found: `name` is "HW3_DATA", "data/", "download" or "stand-in"."""

    title: str  # of the data set
    name: str
    path: Path | None = field(
        default=None, repr=False
    )  # folder that holds the data set; None for the stand-in
    counts: str = ""  # such as "10000 train, 2000 test", once loaded

    @property
    def is_standin(self) -> bool:
        return self.name == "stand-in"

    def describe(self) -> str:
        """One line for banners that names no folder of the machine."""
        origin = (
            "STAND-IN images drawn by this project's own code"
            if self.is_standin
            else f"real images from {self.name}"
        )
        counts = f" ({self.counts})" if self.counts else ""
        warning = "; results say nothing about the real data" if self.is_standin else ""
        return f"{self.title}: {origin}{counts}{warning}"


# --- finding --------------------------------------------------------------------------------------
def find_source(dataset: DataSet, allow_download: bool = True) -> Source:
    """Choose where a data set comes from, and print the choice and its reasons.

    `HW3_PROFILE=smoke` always takes the stand-in; `HW3_PROFILE=demo` takes what is on disk but downloads nothing.

    Raises:
        DataError: `HW3_DATA` is not a folder, or a download cannot be stored or has a wrong checksum.
    """
    notes, profile, title = [], os.environ.get("HW3_PROFILE"), dataset.title

    def choose() -> Source:
        if profile == "smoke":
            notes.append("the smoke profile always takes the stand-in")
            return Source(title, "stand-in")
        for name, folder in (("HW3_DATA", _user_folder()), ("data/", DATA)):
            if folder and dataset.is_in(folder):
                return Source(title, name, folder)
            notes.append(f"{name} holds none" if folder else "HW3_DATA is not set")
        if not allow_download or profile == "demo":
            notes.append(
                "nothing is downloaded for it" + " in the demo profile" * (profile == "demo")
            )
            return Source(title, "stand-in")
        try:
            _check_reachable(dataset.urls[0])
            for url in dataset.urls:
                dataset.fetch(url, DATA)
            return Source(title, "download", DATA)
        except DownloadError as error:
            notes.append(str(error))
            return Source(title, "stand-in")

    source = choose()
    print(*(f"{title}: {note}" for note in notes), source.describe(), sep="\n")
    return source


def _user_folder() -> Path | None:
    """The folder `HW3_DATA` names, if it is set: relative to the working directory or else to the project."""
    value = os.environ.get("HW3_DATA")
    folders = [Path(value).expanduser(), ROOT / value] if value else []
    for folder in folders:
        if folder.is_dir():
            return folder.resolve()
    if folders:
        raise DataError(
            f"HW3_DATA={value} is not a folder: correct it, or unset it to use data/ or a download"
        )
    return None


# --- downloading ----------------------------------------------------------------------------------
@contextlib.contextmanager
def storing(target: Path, *unfinished: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one DataError, and remove the unfinished files then."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.unlink()
        raise DataError(
            f"cannot write {target} ({error.strerror}): free space or make the folder writable, point "
            "HW3_DATA at data elsewhere, or set HW3_PROFILE=demo to go on without a download"
        ) from error


def download(url: str, target: Path, md5: str | None = None, attempts: int = 3) -> None:
    """Fetch `url` into `target` through `target`.part, going on where an earlier try stopped.

    Raises:
        DownloadError: the network failed `attempts` times; the part is kept.
        DataError: wrong checksum, full disk or unwritable folder; no file is left.
    """
    part = target.with_name(target.name + ".part")
    with storing(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, attempts + 1):
            try:
                _fetch_rest(url, part)
                break
            except _NETWORK_ERRORS as error:
                if getattr(error, "errno", None) in _DISK_ERRORS:
                    raise
                if attempt == attempts:
                    kept = (
                        "; the part that arrived is kept, run again to go on"
                        if part.exists()
                        else ""
                    )
                    raise DownloadError(f"download of {url} failed ({error}){kept}") from error
        if md5 and not check_integrity(part, md5):
            part.unlink()
            raise DataError(
                f"{url} arrived with a wrong checksum (MD5 is not {md5}) and was removed: run again, or set "
                "HW3_PROFILE=demo to go on without a download"
            )
        os.replace(part, target)


def _fetch_rest(url: str, part: Path) -> None:
    """Append to `part` what is missing of `url`; start over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond `have`: the next attempt starts over
            part.unlink()
        raise
    with response:
        have = have if response.status == 206 else 0
        missing = int(response.headers.get("Content-Length") or 0)
        if missing > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, f"{missing / 1e6:.0f} MB more are needed")
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=have + missing,
                initial=have,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=missing < 5e6,
            ) as bar,
        ):
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < have + missing:
        raise ConnectionError(
            f"connection lost after {part.stat().st_size} of {have + missing} bytes"
        )


def _check_reachable(url: str, seconds: float = 5) -> None:
    """Raise DownloadError unless the server answers soon; in a thread, as name look-up knows no time limit."""
    pool = futures.ThreadPoolExecutor(1)
    request = urllib.request.Request(url, method="HEAD")
    try:
        pool.submit(lambda: urllib.request.urlopen(request, timeout=seconds).close()).result(
            seconds
        )
    except _NETWORK_ERRORS as error:
        raise DownloadError(f"{url} cannot be reached ({str(error) or 'no answer'})") from error
    finally:
        pool.shutdown(wait=False)


def download_zip(url: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Fetch an archive and unpack those of its files whose names are `wanted`; none lands in `folder` before all are whole.

    Raises:
        DownloadError: the network failed; the part is kept.
        DataError: the archive is damaged (it is removed), or the disk is full or the folder unwritable.
    """
    archive = folder / url.rpartition("/")[2]
    if not archive.is_file():  # an unpacking that was interrupted goes on with the archive it had
        download(url, archive)
    unpacked = folder / f"{archive.stem}.part"
    try:
        with storing(folder), zipfile.ZipFile(archive) as bundle:
            names = [name for name in bundle.namelist() if wanted(name)]
            if not names:
                raise zipfile.BadZipFile("none of the files is in it")
            for name in tqdm(names, desc=f"unpacking {archive.name}", disable=len(names) < 100):
                bundle.extract(
                    name, unpacked
                )  # never outside of the folder; reading to the end checks the CRC
            for path in [path for path in unpacked.rglob("*") if path.is_file()]:
                target = folder / path.relative_to(unpacked)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise DataError(f"{url} arrived damaged ({error}) and was removed: run again") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()


# --- reading files --------------------------------------------------------------------------------
@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file whose pixels need not be read; what goes wrong inside becomes a DataError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): replace or remove it") from error


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB; a missing or damaged file raises a DataError that names it."""
    with opened_image(path) as image:
        return image.convert("RGB")


def image_files(folder: Path) -> list[Path]:
    """The JPEG and PNG files of a folder in sorted order; DataError if there is none."""
    files = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    )
    if not files:
        problem = "holds no JPEG or PNG image" if folder.is_dir() else "is missing"
        raise DataError(
            f"the folder {folder} {problem}: fill it as data/README.md shows, or use another source"
        )
    return files


def standin_folder(kind: str, draw: Callable[[Path], None]) -> Path:
    """Folder of drawn files, which `draw` makes at first use; temporary where `data/` cannot be written."""
    return _drawn(kind, draw, DATA / f"standin-{standin.VERSION}" / kind)


@functools.cache
def _drawn(kind: str, draw: Callable[[Path], None], target: Path) -> Path:
    part = target.with_name(f"{kind}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            draw(part)
            os.rename(part, target)
    except OSError:
        pass  # an unwritable or full folder, or another program was quicker
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if target.is_dir():
        return target
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with storing(folder):
        draw(folder / kind)
    return folder / kind


# --- splits ---------------------------------------------------------------------------------------
def train_val_split(
    labels: Sequence[int], val_fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split sample indices into training and validation, each class in the same proportion.

    Returns:
        Two sorted int64 tensors without a common index; the same for the same seed.

    Raises:
        DataError: `val_fraction` outside (0, 1), or a class too small to be in both parts.
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    chosen = [
        _draw_validation(np.flatnonzero(labels == label), val_fraction, rng)
        for label in np.unique(labels)
    ]
    return _two_parts(np.isin(np.arange(len(labels)), np.concatenate(chosen)))


def split_groups(
    groups: Sequence[Hashable], val_fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `train_val_split`, but all samples of one group (a photo, an image id) fall on the same side."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    return _two_parts(
        np.isin(
            group,
            _draw_validation(np.arange(len(names)), val_fraction, np.random.default_rng(seed)),
        )
    )


def _draw_validation(items: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    n_val = max(1, round(fraction * len(items)))
    if not 0 < fraction < 1 or n_val >= len(items):
        raise DataError(
            f"cannot set a validation share of {fraction} aside from {len(items)} items: choose a share "
            "between 0 and 1, or load more data"
        )
    return rng.permutation(items)[:n_val]


def _two_parts(validates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.flatnonzero(~validates)), torch.from_numpy(np.flatnonzero(validates))
