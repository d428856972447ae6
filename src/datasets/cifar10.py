"""CIFAR-10 (Krizhevsky 2009), as torchvision stores it or as one folder of images per class."""

import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from src import data, standin
from src.download import DataError, download, mirrored, storing

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_Batches = datasets.CIFAR10


@dataclass(frozen=True)
class Cifar10:
    """Images uint8 (N, 3, 32, 32), class after class; labels int64 (N,), places in `classes`."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    source: data.Source


def load_cifar10(
    source: data.Source,
    classes: Sequence[str] = ("airplane", "automobile"),
    limit: int | None = None,
) -> Cifar10:
    """Load some classes, at most `limit` images per class and split, in a fixed order.

    Accepted: `cifar-10-batches-py/`, `cifar-10-python.tar.gz` (both also under `cifar10/`) and
    `cifar10/{train,test}/<class>/*.jpg|png`.

    Raises:
        DataError: an unknown class, a missing or empty class folder, a damaged image or archive,
            a wrong image size.
    """
    known = CLASSES[:2] if source.is_standin else CLASSES
    if unknown := [name for name in classes if name not in known]:
        raise DataError(
            f"no class {unknown[0]} in {source.describe()}: choose from {', '.join(known)}"
        )
    arrays = None
    if source.is_standin:
        arrays = {
            "train": standin.draw_cifar(min(400, limit or 400), seed=0),
            "test": standin.draw_cifar(min(200, limit or 200), seed=1),
        }
    elif batches := _find_batches(source.path):
        arrays = _read_batches(batches)
    tensors, counts = [], []
    for split in ("train", "test"):
        if arrays:
            images, labels = arrays[split]
            parts = [images[labels == CLASSES.index(name)][:limit] for name in classes]
        else:
            folder = source.path / "cifar10" / split
            parts = [_read_class(folder / name, limit) for name in classes]
        images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
        tensors += [images, torch.from_numpy(labels)]
        counts.append(f"{len(images)} {split}")
    return Cifar10(*tensors, tuple(classes), replace(source, counts=", ".join(counts)))


def _read_class(folder: Path, limit: int | None) -> np.ndarray:
    """The images of one class folder, uint8 (N, 32, 32, 3)."""
    images = []
    for path in data.image_files(folder)[:limit]:
        image = data.read_image(path)
        if image.size != (32, 32):
            raise DataError(
                f"{path} is {image.width}x{image.height} pixels, CIFAR-10 has 32x32: replace or "
                "remove it"
            )
        images.append(np.asarray(image))
    return np.stack(images)


def _find_batches(folder: Path) -> Path | None:
    """torchvision's folder of batches, or else its archive, if there is one."""
    names = (_Batches.base_folder, _Batches.filename)
    paths = [base / name for name in names for base in (folder, folder / "cifar10")]
    return next((path for path in paths if path.exists()), None)


def _read_batches(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 32, 32, 3) and labels (N,) of both splits, checked by MD5."""
    meta = (_Batches.meta["filename"], _Batches.meta["md5"])
    files = [*_Batches.train_list, *_Batches.test_list, meta]
    advice = f"replace it by a fresh {_Batches.url}, or move {path.name} away to use another source"
    if path.is_file():
        if not check_integrity(path, _Batches.tgz_md5):
            raise DataError(
                f"{path} is incomplete or damaged (MD5 is not {_Batches.tgz_md5}): {advice}"
            )
        # unpacked elsewhere, so that the user's folder stays as it is
        with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
            unpacked = Path(folder) / _Batches.base_folder
            with storing(unpacked):
                unpacked.mkdir()
                for name, _ in files:  # one by one, so that nothing can land outside the folder
                    member = archive.extractfile(f"{_Batches.base_folder}/{name}")
                    (unpacked / name).write_bytes(member.read())
            return _read_batches(unpacked)
    for name, md5 in files:
        if not check_integrity(path / name, md5):
            raise DataError(f"{path / name} is missing or damaged (MD5 is not {md5}): {advice}")
    splits = {split: _Batches(path.parent, train=split == "train") for split in ("train", "test")}
    return {name: (split.data, np.array(split.targets)) for name, split in splits.items()}


def _is_in(folder: Path, profile: str | None) -> bool:
    splits = [folder / "cifar10" / split for split in ("train", "test")]
    return _find_batches(folder) is not None or any(split.is_dir() for split in splits)


def _fetch(folder: Path, profile: str | None, mirror: str | None) -> None:
    print("CIFAR-10: downloading one file, 170 MB")
    download(mirrored(_Batches.url, mirror), folder / _Batches.filename, _Batches.tgz_md5)


CIFAR10 = data.DataSet(
    "CIFAR-10",
    _is_in,
    _fetch,
    layout="cifar-10-batches-py/ or cifar10/{train,test}/<class>/*.png",
    clues=(
        *("data_batch_*", "*/data_batch_*", "*/*/data_batch_*"),
        *("cifar-10-*", "cifar10", "CIFAR10", "CIFAR-10*"),
        *("airplane", "*/airplane", "*/*/airplane"),
    ),
)
