"""MS COCO 2017 (Lin et al. 2014): photos with the outlines of the objects in them."""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from pycocotools import coco as pycoco
from pycocotools import mask as pymask

from src import data, standin
from src.download import TOLERATED, DataError, download_many, download_zip, mirrored

SPLITS = ("train2017", "val2017")
SAMPLE = json.loads(Path(__file__).with_name("coco_sample.json").read_text())  # ids by split
HOST = "http://images.cocodataset.org/"
MOST = 5000  # photos of a split that are downloaded at most
_MEGABYTES = 0.16  # of a photo, on average
_PIXELS = 2 * 89_478_485  # Pillow opens no larger photo
_KEYS = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str, "supercategory": str},
    "annotations": {
        **{"id": int, "image_id": int, "category_id": int, "iscrowd": int, "bbox": list},
        **{"segmentation": object, "area": object},
    },
}


def load_coco(
    split: str, source: data.Source, images: int | Sequence[int] | str | None = None
) -> tuple[pycoco.COCO, Callable[[dict], Path]]:
    """Load the instance annotations of "train2017" or "val2017".

    Where the source allows it, photos that are missing are downloaded before this returns; the
    few that cannot be had are left out and counted. Elsewhere the choice is among those on disk.

    Args:
        split: which.
        source: where they are.
        images: the number of images, a list of their ids, or "sample" for the ids in
            `coco_sample.json`. None is all, but the sample where photos are downloaded.

    Returns:
        The annotations of these images, and `image_path(image_info)`, which gives an image's file.

    Raises:
        DataError: the annotation file is missing or broken, or there are no such photos; from
            `image_path`: the image is missing.
    """
    folder = data.standin_folder("coco", _draw) if source.is_standin else source.path
    file = _annotation_file(folder, split)
    document = _read_annotations(file)
    names = {info["id"]: Path(info["file_name"]).name for info in document["images"]}
    twice = [name for name, entries in Counter(names.values()).items() if entries > 1]
    if twice:  # one photo could get into training and validation
        raise DataError(f'{file}: several entries of "images" have the file {twice[0]}: keep one')
    photos = _photo_folder(file.parent.parent, split)
    if images is None and source.downloads:
        images = "sample"
    if images is not None:
        chosen = set(_choose(names, photos, split, source, images))
        for section, key in (("images", "id"), ("annotations", "image_id")):
            document[section] = [entry for entry in document[section] if entry[key] in chosen]
    coco = pycoco.COCO()
    coco.dataset = document
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()

    def image_path(info: dict) -> Path:
        path = photos / names[info["id"]]
        if not os.path.isfile(path):  # False for names that no file can have, too
            raise DataError(
                f"the image {path} named in {file.name} is missing: add it, or use another source"
            )
        return path

    return coco, image_path


def _choose(
    names: dict[int, str],
    photos: Path,
    split: str,
    source: data.Source,
    images: int | Sequence[int] | str,
) -> list[int]:
    """The ids of those images (id: file name) that were asked for and can be had."""
    limit = images if isinstance(images, int) else None
    asked = SAMPLE[split] if images == "sample" else sorted(names) if limit is not None else images
    ids = [number for number in asked if number in names]
    if source.downloads:
        files = [names[number] for number in ids[:limit]]
        failed = fetch_photos(split, files, photos, source.mirror)
        return [number for number in ids[:limit] if names[number] not in failed]
    at_hand = [number for number in sorted(names) if os.path.isfile(photos / names[number])]
    ids = sorted(set(ids) & set(at_hand))[:limit]
    if images == "sample" and len(ids) < (1 - TOLERATED) * len(asked):
        ids = at_hand[: len(asked)]
        print(f"MS COCO: not the sample of {split}, but the first {len(ids)} photos on disk")
    if not ids:
        raise DataError(
            f"none of the photos that are asked for is in {photos}: put them there, or use "
            "another source"
        )
    return ids


def fetch_photos(split: str, names: Sequence[str], folder: Path, mirror: str | None) -> set[str]:
    """Download those photos of a split that `folder` lacks; the names of those not to be had.

    Raises:
        DownloadError: too many cannot be had.
        DataError: they are more than `MOST`, or cannot be stored.
    """
    files = {folder / name: mirrored(f"{HOST}{split}/{quote(name)}", mirror) for name in names}
    missing = [path for path in files if not os.path.isfile(path)]
    if len(missing) > MOST:
        raise DataError(
            f"{len(missing)} photos are too many to download one by one: choose at most {MOST}, or "
            "unpack COCO's own archives and set HW3_DATA to their folder"
        )
    if missing:
        print(
            f"MS COCO: downloading {len(missing)} photos of {split}, "
            f"about {len(missing) * _MEGABYTES:.0f} MB"
        )
    failed = download_many(files, split, data.read_image)
    if failed:
        print(f"MS COCO: {len(failed)} of {len(files)} photos of {split} cannot be had: left out")
    return {path.name for path in failed}


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
    """COCO's text form: 5 bits a character; from the fourth run on, the change to two before."""
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


def _photo_folder(base: Path, split: str) -> Path:
    folders = (base / split, base / "images" / split)
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _read_annotations(file: Path) -> dict:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot read the annotations {file} ({error}): replace the file"
        ) from error
    ids = {}
    for section, keys in _KEYS.items():
        entries = document.get(section) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{file} has no list "{section}": replace it by a COCO instance file')
        ids[section] = set()
        for position, entry in enumerate(entries):
            if problem := _problem(entry, keys, ids, section):
                raise DataError(
                    f'{file}: entry {position} of "{section}" {problem}: correct or remove it'
                )
            ids[section].add(entry["id"])
    return document


def _problem(entry: object, keys: dict, ids: dict[str, set], section: str) -> str | None:
    """What is wrong with an entry of a section; `ids` are those of the entries before it."""
    entry = entry if isinstance(entry, dict) else {}
    for key, kind in keys.items():
        if key not in entry:
            return f'has no "{key}"'
        if not isinstance(entry[key], kind):
            return (
                f'has "{key}": {json.dumps(entry[key])[:40]}, which is not of type {kind.__name__}'
            )
    if not -(2**63) <= entry["id"] < 2**63:
        return f"has the id {entry['id']}, which does not fit into 64 bits"
    if entry["id"] in ids[section]:
        return f"has the id {entry['id']} of an entry before it"
    if section == "images" and min(entry["width"], entry["height"]) < 1:
        return "has no pixels"
    if section == "images" and entry["width"] * entry["height"] > _PIXELS:
        return f"has {entry['width']} x {entry['height']} pixels, which no photo here can have"
    if section == "annotations":
        if entry["image_id"] not in ids["images"]:
            return f'is of the image {entry["image_id"]}, which is not in "images"'
        if entry["category_id"] not in ids["categories"]:
            return f'is of the category {entry["category_id"]}, which is not in "categories"'
        if [type(number) in (int, float) for number in entry["bbox"]] != [True] * 4:
            return "has a box that is not four numbers"
    return None


def _is_in(folder: Path, profile: str | None) -> bool:
    return any(_annotation_file(folder, split).is_file() for split in SPLITS)


def _fetch(folder: Path, profile: str | None, mirror: str | None) -> None:
    """The two files of instance annotations; the photos follow when they are chosen."""
    print("MS COCO: downloading the annotations, 241 MB")
    names = {f"annotations/instances_{split}.json" for split in SPLITS}
    url = mirrored(HOST + "annotations/annotations_trainval2017.zip", mirror)
    download_zip(url, folder / "coco", lambda name: name in names)


COCO = data.DataSet(
    "MS COCO",
    _is_in,
    _fetch,
    layout="coco/annotations/instances_{train2017,val2017}.json and coco/{train2017,val2017}/*.jpg",
    clues=(
        *("instances_*", "*/instances_*", "*/*/instances_*", "*/*/*/instances_*"),
        *("annot*2017*", "*/annot*2017*"),
    ),
)
