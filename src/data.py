"""Where the images come from: `HW3_DATA`, then `data/`, then the official source, then the built-in stand-in.

Data sets: "cifar10" (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009), "coco" (Lin et al.,
"Microsoft COCO: Common Objects in Context", 2014) and "photos" (ADE20K or COCO photographs as they lie on disk).
"""

import atexit
import contextlib
import errno
import functools
import http.client
import io
import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from src import ROOT, ProjectError, standin

DATA = ROOT / "data"  # downloads and the stand-in's files go here
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_URLS = {"cifar10": CIFAR10.url, "coco": "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"}
_TITLES = {"cifar10": "CIFAR-10", "coco": "MS COCO", "photos": "Photos"}
_COCO_SPLITS = ("train2017", "val2017")
_COCO_KEYS = {"images": {"id", "file_name", "width", "height"}, "categories": {"id", "name", "supercategory"},
              "annotations": {"id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd"}}
_PHOTO_LAYOUTS = ({"train": ("ADEChallengeData2016/images/training", "ADEChallengeData2016/images/validation"),
                   "test": ("release_test/testing",)},
                  {"train": ("coco/train2017", "photos"), "test": ("coco/val2017",)})
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NETWORK_ERRORS = (OSError, http.client.HTTPException, futures.TimeoutError)
_TIMEOUT = 20  # seconds without a byte before a download counts as broken


class DataError(ProjectError):
    """Data that are missing, damaged or cannot be stored; the message says what to do."""


class DownloadError(DataError):
    """The network failed; what has arrived is kept for the next try."""


@dataclass(frozen=True)
class Source:
    """Where a data set was found: `name` is "HW3_DATA", "data/", "download" or "stand-in"."""

    dataset: str
    name: str
    path: Path | None = field(default=None, repr=False)  # folder that holds the data set; None for the stand-in
    counts: str = ""  # such as "10000 train, 2000 test", once loaded

    @property
    def is_standin(self) -> bool:
        return self.name == "stand-in"

    def describe(self) -> str:
        """One line for banners that names no folder of the machine."""
        origin = "STAND-IN images drawn by this project's own code" if self.is_standin else f"real images from {self.name}"
        counts = f" ({self.counts})" if self.counts else ""
        warning = "; results say nothing about the real data" if self.is_standin else ""
        return f"{_TITLES[self.dataset]}: {origin}{counts}{warning}"


# --- finding --------------------------------------------------------------------------------------------------------
def find_source(dataset: str, allow_download: bool = True) -> Source:
    """Choose where `dataset` ("cifar10", "coco" or "photos") comes from, and print the choice and its reasons.

    `HW3_PROFILE=smoke` always takes the stand-in; `HW3_PROFILE=demo` takes what is on disk but downloads nothing.

    Raises:
        DataError: `HW3_DATA` is not a folder, or a download cannot be stored or has a wrong checksum.
    """
    notes, profile = [], os.environ.get("HW3_PROFILE")

    def choose() -> Source:
        if profile == "smoke":
            notes.append("the smoke profile always takes the stand-in")
            return Source(dataset, "stand-in")
        for name, folder in (("HW3_DATA", _user_folder()), ("data/", DATA)):
            if folder and _holds(dataset, folder):
                return Source(dataset, name, folder)
            notes.append(f"{name} holds none" if folder else "HW3_DATA is not set")
        if dataset not in _URLS or not allow_download or profile == "demo":
            notes.append("nothing is downloaded for it" + " in the demo profile" * (profile == "demo"))
            return Source(dataset, "stand-in")
        try:
            _check_reachable(_URLS[dataset])
            if dataset == "cifar10":
                download(_URLS[dataset], DATA / CIFAR10.filename, CIFAR10.tgz_md5)
            else:
                _download_annotations(DATA / "coco" / "annotations")
            return Source(dataset, "download", DATA)
        except DownloadError as error:
            notes.append(str(error))
            return Source(dataset, "stand-in")

    source = choose()
    print(*(f"{_TITLES[dataset]}: {note}" for note in notes), source.describe(), sep="\n")
    return source


def _user_folder() -> Path | None:
    """The folder `HW3_DATA` names, if it is set: relative to the working directory or else to the project."""
    value = os.environ.get("HW3_DATA")
    folders = [Path(value).expanduser(), ROOT / value] if value else []
    for folder in folders:
        if folder.is_dir():
            return folder.resolve()
    if folders:
        raise DataError(f"HW3_DATA={value} is not a folder: correct it, or unset it to use data/ or a download")
    return None


def _holds(dataset: str, folder: Path) -> bool:
    if dataset == "cifar10":
        return _cifar10_batches(folder) is not None or any((folder / "cifar10" / s).is_dir() for s in ("train", "test"))
    if dataset == "coco":
        return any(_annotation_file(folder, split).is_file() for split in _COCO_SPLITS)
    return _photo_layout(folder) is not None


# --- downloading ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _storing(target: Path, *unfinished: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one DataError, and remove the unfinished files then."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.unlink()
        raise DataError(f"cannot write {target} ({error.strerror}): free space or make the folder writable, point "
                        "HW3_DATA at data elsewhere, or set HW3_PROFILE=demo to go on without a download") from error


def download(url: str, target: Path, md5: str | None = None, attempts: int = 3) -> None:
    """Fetch `url` into `target` through `target`.part, going on where an earlier try stopped.

    Raises:
        DownloadError: the network failed `attempts` times; the part is kept.
        DataError: wrong checksum, full disk or unwritable folder; no file is left.
    """
    part = target.with_name(target.name + ".part")
    with _storing(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, attempts + 1):
            try:
                _fetch_rest(url, part)
                break
            except _NETWORK_ERRORS as error:
                if getattr(error, "errno", None) in _DISK_ERRORS:
                    raise
                if attempt == attempts:
                    kept = "; the part that arrived is kept, run again to go on" if part.exists() else ""
                    raise DownloadError(f"download of {url} failed ({error}){kept}") from error
        if md5 and not check_integrity(part, md5):
            part.unlink()
            raise DataError(f"{url} arrived with a wrong checksum (MD5 is not {md5}) and was removed: run again, or set "
                            "HW3_PROFILE=demo to go on without a download")
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
        with open(part, "ab" if have else "wb") as file, tqdm(
                total=have + missing, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=missing < 5e6) as bar:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < have + missing:
        raise ConnectionError(f"connection lost after {part.stat().st_size} of {have + missing} bytes")


def _check_reachable(url: str, seconds: float = 5) -> None:
    """Raise DownloadError unless the server answers soon; in a thread, as name look-up knows no time limit."""
    pool = futures.ThreadPoolExecutor(1)
    request = urllib.request.Request(url, method="HEAD")
    try:
        pool.submit(lambda: urllib.request.urlopen(request, timeout=seconds).close()).result(seconds)
    except _NETWORK_ERRORS as error:
        raise DownloadError(f"{url} cannot be reached ({str(error) or 'no answer'})") from error
    finally:
        pool.shutdown(wait=False)


def _download_annotations(folder: Path) -> None:
    """Store COCO's two instance files in `folder`; the images follow one by one as they are needed."""
    archive = folder / _URLS["coco"].rpartition("/")[2]
    download(_URLS["coco"], archive)
    parts = [folder / f"instances_{split}.json.part" for split in _COCO_SPLITS]
    with _storing(folder, archive, *parts):
        try:
            with zipfile.ZipFile(archive) as bundle:
                for part in parts:
                    with bundle.open(f"annotations/{part.stem}") as packed, open(part, "wb") as file:
                        shutil.copyfileobj(packed, file)  # reading to the end checks the CRC
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            for path in (archive, *parts):
                path.unlink(missing_ok=True)
            raise DataError(f"{_URLS['coco']} arrived damaged ({error}) and was removed: run again") from error
        for part in parts:
            os.replace(part, part.with_suffix(""))
        archive.unlink()


# --- reading files --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): replace or remove it") from error


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB; a missing or damaged file raises a DataError that names it."""
    with _opened(path) as image:
        return image.convert("RGB")


def _image_files(folder: Path) -> list[Path]:
    """The JPEG and PNG files of a folder in sorted order; DataError if there is none."""
    files = sorted(path for path in (folder.iterdir() if folder.is_dir() else ())
                   if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith("."))
    if not files:
        problem = "holds no JPEG or PNG image" if folder.is_dir() else "is missing"
        raise DataError(f"the folder {folder} {problem}: fill it as data/README.md shows, or use another source")
    return files


@functools.cache
def _standin_folder(kind: str, parent: Path) -> Path:
    """Folder of drawn files, "coco" or "photos", made at first use; temporary where `parent` cannot be written."""
    def draw(folder: Path) -> Path:
        if kind == "coco":
            standin.write_coco(folder, n_train=80, n_val=40, seed=0)
        else:
            standin.write_photos(folder / "train", 40, side=320, seed=0)
            standin.write_photos(folder / "test", 20, side=320, seed=1)
        return folder

    target = parent / f"standin-{standin.VERSION}" / kind
    part = target.with_name(f"{kind}.part-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            os.rename(draw(part), target)
    except OSError:
        pass  # an unwritable or full folder, or another program was quicker
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if target.is_dir():
        return target
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with _storing(folder):
        return draw(folder / kind)


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cifar10:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,), which are positions in `classes`; class after class."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    source: Source


def load_cifar10(classes: Sequence[str] = ("airplane", "automobile"), source: Source | None = None,
                 limit: int | None = None) -> Cifar10:
    """Load some classes of CIFAR-10, at most `limit` images per class and split, in a fixed order.

    Accepted: `cifar-10-batches-py/`, `cifar-10-python.tar.gz` (both also under `cifar10/`) and
    `cifar10/{train,test}/<class>/*.jpg|png`.

    Raises:
        DataError: an unknown class, a missing or empty class folder, a damaged image or archive, a wrong image size.
    """
    source = source or find_source("cifar10")
    known = CIFAR10_CLASSES[:2] if source.is_standin else CIFAR10_CLASSES
    if unknown := [name for name in classes if name not in known]:
        raise DataError(f"no class {unknown[0]} in {source.describe()}: choose from {', '.join(known)}")
    arrays = None
    if source.is_standin:
        arrays = {"train": standin.draw_cifar(min(400, limit or 400), seed=0),
                  "test": standin.draw_cifar(min(200, limit or 200), seed=1)}
    elif batches := _cifar10_batches(source.path):
        arrays = _read_batches(batches)
    tensors, counts = [], []
    for split in ("train", "test"):
        if arrays:
            images, labels = arrays[split]
            parts = [images[labels == CIFAR10_CLASSES.index(name)][:limit] for name in classes]
        else:
            parts = [_read_class(source.path / "cifar10" / split / name, limit) for name in classes]
        images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.arange(len(classes)).repeat_interleave(torch.tensor([len(part) for part in parts]))]
        counts.append(f"{len(images)} {split}")
    return Cifar10(*tensors, tuple(classes), replace(source, counts=", ".join(counts)))


def _read_class(folder: Path, limit: int | None) -> np.ndarray:
    """The images of one class folder, uint8 (N, 32, 32, 3)."""
    images = []
    for path in _image_files(folder)[:limit]:  # threads gain nothing: such small files decode in Python's own time
        image = read_image(path)
        if image.size != (32, 32):
            raise DataError(f"{path} is {image.width}x{image.height} pixels, CIFAR-10 has 32x32: replace or remove it")
        images.append(np.asarray(image))
    return np.stack(images)


def _cifar10_batches(folder: Path) -> Path | None:
    """torchvision's folder of batches, or else its archive, if there is one."""
    paths = [base / name for name in (CIFAR10.base_folder, CIFAR10.filename) for base in (folder, folder / "cifar10")]
    return next((path for path in paths if path.exists()), None)


def _read_batches(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 32, 32, 3) and labels (N,) of both splits, from the folder or the archive, checked by MD5."""
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    advice = f"replace it by a fresh {CIFAR10.url}, or move {path.name} away to use another source"
    if path.is_file():
        if not check_integrity(path, CIFAR10.tgz_md5):
            raise DataError(f"{path} is incomplete or damaged (MD5 is not {CIFAR10.tgz_md5}): {advice}")
        with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:  # the user's folder stays as it is
            unpacked = Path(folder) / CIFAR10.base_folder
            with _storing(unpacked):
                unpacked.mkdir()
                for name, _ in files:  # one by one, so that nothing can land outside the folder
                    (unpacked / name).write_bytes(archive.extractfile(f"{CIFAR10.base_folder}/{name}").read())
            return _read_batches(unpacked)
    for name, md5 in files:
        if not check_integrity(path / name, md5):
            raise DataError(f"{path / name} is missing or damaged (MD5 is not {md5}): {advice}")
    splits = {split: CIFAR10(path.parent, train=split == "train") for split in ("train", "test")}
    return {split: (batches.data, np.array(batches.targets)) for split, batches in splits.items()}


# --- splits ---------------------------------------------------------------------------------------------------------
def train_val_split(labels: Sequence[int], val_fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split sample indices into training and validation, each class in the same proportion.

    Returns:
        Two sorted int64 tensors without a common index; the same for the same seed.

    Raises:
        DataError: `val_fraction` outside (0, 1), or a class too small to be in both parts.
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    chosen = [_draw_validation(np.flatnonzero(labels == label), val_fraction, rng) for label in np.unique(labels)]
    return _two_parts(np.isin(np.arange(len(labels)), np.concatenate(chosen)))


def split_groups(groups: Sequence[Hashable], val_fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `train_val_split`, but all samples of one group (a photo, an image id) fall on the same side."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    return _two_parts(np.isin(group, _draw_validation(np.arange(len(names)), val_fraction, np.random.default_rng(seed))))


def _draw_validation(items: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    n_val = max(1, round(fraction * len(items)))
    if not 0 < fraction < 1 or n_val >= len(items):
        raise DataError(f"cannot set a validation share of {fraction} aside from {len(items)} items: choose a share "
                        "between 0 and 1, or load more data")
    return rng.permutation(items)[:n_val]


def _two_parts(validates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.flatnonzero(~validates)), torch.from_numpy(np.flatnonzero(validates))


# --- COCO and photos ------------------------------------------------------------------------------------------------
def load_coco(split: str, source: Source | None = None) -> tuple[COCO, Callable[[dict], Path]]:
    """Load the instance annotations of "train2017" or "val2017".

    Returns:
        The annotations, and `image_path(image_info)`, which gives an image's local file; in `data/`, a missing image is
        downloaded.

    Raises:
        DataError: the annotation file is missing, broken or lacks a key; from `image_path`: the image is missing.
    """
    source = source or find_source("coco")
    file = _annotation_file(_standin_folder("coco", DATA) if source.is_standin else source.path, split)
    coco = COCO()
    coco.dataset = _read_annotations(file)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()

    def image_path(info: dict) -> Path:
        path = file.parent.parent / split / Path(info["file_name"]).name
        if not path.is_file():
            if source.name not in ("data/", "download") or "coco_url" not in info:
                raise DataError(f"the image {path} named in {file.name} is missing: add it, or use another source")
            download(info["coco_url"], path)
        return path

    return coco, image_path


def _annotation_file(folder: Path, split: str) -> Path:
    base = folder / "coco" if (folder / "coco" / "annotations").is_dir() else folder
    return base / "annotations" / f"instances_{split}.json"


def _read_annotations(file: Path) -> dict:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the annotations {file} ({error}): replace the file") from error
    for section, keys in _COCO_KEYS.items():
        entries = document.get(section) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{file} has no list "{section}": replace it by a COCO instance file')
        for position, entry in enumerate(entries):
            if missing := keys.difference(entry if isinstance(entry, dict) else ()):
                raise DataError(f'{file}: entry {position} of "{section}" has no "{min(missing)}": correct it')
    return document


def list_photos(role: str, source: Source | None = None, minimum_side: int = 1) -> list[Path]:
    """The photos for "train" or "test" in sorted order, without those whose shorter side is below `minimum_side`.

    ADE20K (`ADEChallengeData2016/images/{training,validation}` train, `release_test/testing` tests) comes before COCO
    (`coco/train2017` and `photos` train, `coco/val2017` tests). No photo serves both roles.

    Raises:
        DataError: an empty folder, an unreadable photo, or none that is large enough.
    """
    source = source or find_source("photos")
    if source.is_standin:
        folders = [_standin_folder("photos", DATA) / role]
    else:
        layout = _photo_layout(source.path) or _PHOTO_LAYOUTS[-1]
        folders = [source.path / name for name in layout[role] if (source.path / name).is_dir()]
    kept, left_out = [], 0
    for path in (path for folder in folders for path in _image_files(folder)):
        with _opened(path) as image:
            fits = min(image.size) >= minimum_side
        kept += [path] * fits
        left_out += not fits
    if left_out:
        print(f"Photos: left out {left_out} of {left_out + len(kept)} for {role}, below {minimum_side} pixels")
    if not kept:
        raise DataError(f"no {role} photo with a shorter side of {minimum_side} pixels or more: add larger photos")
    return kept


def _photo_layout(folder: Path) -> dict | None:
    """The first layout of which both roles have a folder."""
    return next((layout for layout in _PHOTO_LAYOUTS
                 if all(any((folder / name).is_dir() for name in names) for names in layout.values())), None)
