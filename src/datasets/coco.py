"""MS COCO 2017 (Lin et al. 2014): photos with the outlines of the objects in them."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pycocotools import coco as pycoco
from pycocotools import mask as pymask

from src import data, standin
from src.download import DataError, download, download_zip, mirrored

SPLITS = ("train2017", "val2017")
HOST = "http://images.cocodataset.org/"
_KEYS = {
    "images": {"id", "file_name", "width", "height"},
    "categories": {"id", "name", "supercategory"},
    "annotations": {
        *("id", "image_id", "category_id"),
        *("segmentation", "bbox", "area", "iscrowd"),
    },
}


def load_coco(
    split: str, source: data.Source, images: int | Sequence[int] | str | None = None
) -> tuple[pycoco.COCO, Callable[[dict], Path]]:
    """Load the instance annotations of "train2017" or "val2017".

    Args:
        split: which.
        source: where they are.
        images: at most so many images, or a list of their ids, or "sample"; None for all.

    Returns:
        The annotations of these images, and `image_path(image_info)`, which gives an image's file.

    Raises:
        DataError: the annotation file is missing, broken or lacks a key; from `image_path`: the
            image is missing.
    """
    folder = data.standin_folder("coco", _draw) if source.is_standin else source.path
    file = _annotation_file(folder, split)
    coco = pycoco.COCO()
    coco.dataset = _read_annotations(file)
    if images is not None and images != "sample":
        ids = sorted(info["id"] for info in coco.dataset["images"])
        chosen = set(ids[:images] if isinstance(images, int) else images)
        for section, key in (("images", "id"), ("annotations", "image_id")):
            coco.dataset[section] = [e for e in coco.dataset[section] if e[key] in chosen]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()

    def image_path(info: dict) -> Path:
        path = file.parent.parent / split / Path(info["file_name"]).name
        if not path.is_file():
            if not source.downloads:
                raise DataError(
                    f"the image {path} named in {file.name} is missing: add it, or use another "
                    "source"
                )
            download(mirrored(f"{HOST}{split}/{path.name}", source.mirror), path)
        return path

    return coco, image_path


def coco_mask(annotation: dict, height: int, width: int) -> np.ndarray | None:
    """Fill the outline of an object of a photo of this size: uint8 (height, width), 0 or 1.

    Everything is checked before the library sees it, as its C code believes what it is told.

    Returns:
        None where that cannot be done: box or outline have numbers that are infinite or far
        outside of the photo, runs do not fill the photo exactly, or nothing is left inside.
    """
    shape, size = annotation["segmentation"], np.array([width, height])

    def points(numbers: list) -> np.ndarray:
        """Coordinates (n, 2); ValueError where one is farther off than the photo's own size."""
        pairs = np.array(numbers, dtype=float).reshape(-1, 2)
        if not ((pairs >= -size) & (pairs <= 2 * size)).all():  # so is NaN
            raise ValueError("far outside of the photo")
        return pairs

    try:
        points(annotation["bbox"])
        if isinstance(shape, dict):
            mask = _fill_runs(shape["counts"], shape["size"], height, width)
        else:
            polygons = [points(polygon) for polygon in shape]
            steps = sum(np.abs(np.diff(polygon, axis=0)).sum() for polygon in polygons)
            if steps > 4 * height * width or any(len(polygon) < 3 for polygon in polygons):
                return None  # so long an outline would take all memory
            polygons = [polygon.ravel().tolist() for polygon in polygons]
            mask = pymask.decode(pymask.merge(pymask.frPyObjects(polygons, height, width)))
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        return None
    return mask if mask.any() else None


def _fill_runs(counts: str | bytes | list, size: list, height: int, width: int) -> np.ndarray:
    """Decode runs of 0, 1, 0, ... down the columns; ValueError unless they fill the photo."""
    if isinstance(counts, (str, bytes)):
        counts = _unpack(counts if isinstance(counts, bytes) else counts.encode("ascii"))
    runs = np.array(counts, dtype=float)
    if list(size) != [height, width] or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError("the runs do not fill the photo")
    values = np.arange(len(runs), dtype=np.uint8) % 2
    return values.repeat(runs.astype(int)).reshape(width, height).T


def _unpack(text: bytes) -> list[int]:
    """COCO's text form of runs: 5 bits a character; from the fourth on, the change to two before."""
    runs, value, shift = [], 0, 0
    for code in text:
        value |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32 and shift < 60:  # more of this number follows
            continue
        if code - 48 & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the runs end within a number")
    return runs


def _draw(folder: Path) -> None:
    standin.write_coco(folder, n_train=80, n_val=40, seed=0)


def _annotation_file(folder: Path, split: str) -> Path:
    base = folder / "coco" if (folder / "coco" / "annotations").is_dir() else folder
    return base / "annotations" / f"instances_{split}.json"


def _read_annotations(file: Path) -> dict:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the annotations {file} ({error}): replace the file"
        ) from error
    for section, keys in _KEYS.items():
        entries = document.get(section) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{file} has no list "{section}": replace it by a COCO instance file')
        for position, entry in enumerate(entries):
            if missing := keys.difference(entry if isinstance(entry, dict) else ()):
                raise DataError(
                    f'{file}: entry {position} of "{section}" has no "{min(missing)}": correct it'
                )
    return document


def _is_in(folder: Path, profile: str | None) -> bool:
    return any(_annotation_file(folder, split).is_file() for split in SPLITS)


def _fetch(folder: Path, profile: str | None, mirror: str | None) -> None:
    """The two files of instance annotations; the photos follow when they are chosen."""
    print("MS COCO: downloading the annotations, 241 MB")
    names = {f"annotations/instances_{split}.json" for split in SPLITS}
    url = mirrored(HOST + "annotations/annotations_trainval2017.zip", mirror)
    download_zip(url, folder / "coco", lambda name: name in names)


COCO = data.DataSet("MS COCO", _is_in, _fetch)
