"""Where the images come from, how an image file is read, and how samples are split.

A data set comes from `HW3_DATA`, then `data/`, then the official source, then the built-in
stand-in. What each one looks like on disk, `src/datasets` says.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from src import ROOT, standin
from src.download import DataError, DownloadError, storing

DATA = ROOT / "data"  # downloads and the stand-in's files go here


@dataclass(frozen=True)
class DataSet:
    """How a data set is recognised on disk, and fetched where it is missing."""

    title: str  # such as "CIFAR-10"
    is_in: Callable[[Path, str | None], bool]  # whether a folder holds it for a profile
    fetch: Callable[[Path, str | None, str | None], None]  # stores it: folder, profile, mirror
    layout: str = ""  # how a folder that holds it looks
    clues: tuple[str, ...] = ()  # patterns of files in a folder that holds it in another layout


@dataclass(frozen=True)
class Source:
    """Where a data set was found: `name` is "HW3_DATA", "data/", "download" or "stand-in"."""

    title: str  # of the data set
    name: str
    path: Path | None = field(default=None, repr=False)  # its folder; None for the stand-in
    counts: str = ""  # such as "10000 train, 2000 test", once loaded
    downloads: bool = False  # whether files that are missing in the folder may be downloaded
    mirror: str | None = field(default=None, repr=False)  # replaces the official hosts

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


# --- finding -------------------------------------------------------------------------------------
def find_source(
    dataset: DataSet,
    profile: str | None = None,
    folder: Path | None = None,
    mirror: str | None = None,
) -> Source:
    """Choose where a data set comes from, and print the choice and its reasons.

    Args:
        dataset: what is looked for.
        profile: of the run; None is as "cpu". "smoke" always takes the stand-in; "demo" takes
            what is on disk and downloads nothing.
        folder: the user's own data (`HW3_DATA`), looked into first.
        mirror: base address that replaces the official hosts (`HW3_MIRROR`).

    Raises:
        DataError: `folder` cannot be read, or holds it in another layout; a download cannot be
            stored or has a wrong checksum.
    """
    title = dataset.title

    def choose() -> Source:
        if profile == "smoke":
            print(f"{title}: the smoke profile always takes the stand-in")
            return Source(title, "stand-in")
        online = profile != "demo"
        if folder is None:
            print(f"{title}: HW3_DATA is not set")
        else:
            try:
                if dataset.is_in(folder, profile):
                    return Source(title, "HW3_DATA", folder)
                print(f"{title}: HW3_DATA holds none{_other_content(dataset, folder)}")
            except OSError as error:
                raise DataError(
                    f"HW3_DATA cannot be read ({error.strerror}): make it readable, or unset it"
                ) from error
        if dataset.is_in(DATA, profile):
            return Source(title, "data/", DATA, downloads=online, mirror=mirror)
        print(f"{title}: data/ holds none")
        if not online:
            print(f"{title}: nothing is downloaded for it in the demo profile")
            return Source(title, "stand-in")
        print(f"{title}: downloading what is missing (HW3_PROFILE=demo would download nothing)")
        try:
            dataset.fetch(DATA, profile, mirror)
            return Source(title, "download", DATA, downloads=True, mirror=mirror)
        except DownloadError as error:
            print(f"{title}: {error}")
            return Source(title, "stand-in")

    source = choose()
    print(source.describe())
    return source


def _other_content(dataset: DataSet, folder: Path) -> str:
    """What the user's folder holds instead; DataError where it looks like the data set's files."""
    clues = {path for clue in dataset.clues for path in folder.glob(clue)}
    found = sorted(path.relative_to(folder).as_posix() for path in clues)[:4]
    if found:
        raise DataError(
            f"HW3_DATA holds {', '.join(found)}, but {dataset.title} is read as {dataset.layout}: "
            "move or rename what is there (data/README.md lists all layouts), or unset HW3_DATA"
        )
    names = sorted(path.name for path in folder.iterdir())
    return f", only {', '.join(names[:6])}{' ...' * (len(names) > 6)}" if names else ""


# --- reading files -------------------------------------------------------------------------------
@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file; what goes wrong inside becomes a DataError that names the file."""
    with _decoding(str(path)), Image.open(path) as image:
        yield image


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's decoders raise of all kinds for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read the image {name} ({reason}): replace or remove it") from error


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB, transparent parts white.

    Raises:
        DataError: a missing or damaged file; names it.
    """
    with opened_image(path) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as `read_image` gives it: upright 8-bit RGB, transparent parts white."""
    return as_rgb(ImageOps.exif_transpose(image))


def as_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as 8-bit RGB, transparent parts white, its pixels where they are stored."""
    if image.mode[0] == "I":  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def central_square(image, side: int, least: int = 16) -> tuple[torch.Tensor, int]:
    """The central square of a photo, resized.

    Args:
        image: a Pillow image or a file name.
        side: of the result, in pixels.
        least: the shortest side that is accepted.

    Returns:
        (1, 3, side, side) in [0, 1], and the photo's shorter side.

    Raises:
        ProjectError: for what is not an image, cannot be read, or is too small.
    """
    if isinstance(image, (str, os.PathLike)):
        image = read_image(Path(image))
    elif isinstance(image, Image.Image):
        with _decoding(getattr(image, "filename", "") or "that was given"):
            image = upright_rgb(image)
    else:
        raise DataError(f"Give a Pillow image or a file name, not {type(image).__name__}.")
    short = min(image.size)
    if short < least:
        raise DataError(
            f"The image is {image.width}x{image.height} pixels; at least {least}x{least} are "
            "needed."
        )
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    pixels = np.array(image.resize((side, side), Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, short


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
    """Folder that `draw` fills at first use; temporary where `data/` cannot be written."""
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


# --- splits --------------------------------------------------------------------------------------
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
    """As `train_val_split`, but all samples of one group (such as a photo) stay together."""
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
            f"cannot set a validation share of {fraction} aside from {len(items)} items: choose "
            "a share between 0 and 1, or load more data"
        )
    return rng.permutation(items)[:n_val]


def _two_parts(validates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.flatnonzero(~validates)), torch.from_numpy(np.flatnonzero(validates))
