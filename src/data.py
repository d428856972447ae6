"""Where the images come from, how an image file is read, and how samples are split.

data/README.md lists the layouts that are read and what is downloaded.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from src import ROOT, ProjectError, standin
from src.files import write_whole

CIFAR10, COCO, PHOTOS = "CIFAR-10", "MS COCO", "photos"
CIFAR_CLASSES = ("airplane", "automobile")
DATA = ROOT / "data"
SPLITS = ("train2017", "val2017")
SAMPLE = ROOT / "src" / "coco_sample"  # annotations of a fixed sample of COCO's photos
CIFAR_HOST, COCO_HOST = "https://www.cs.toronto.edu", "http://images.cocodataset.org"
ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
WAITS, TIMEOUT = (0.5, 2), 20  # seconds between tries, and without a byte
TOLERATED, TOLERATED_OWN = 27, 274  # of the sample's 549 photos; in the user's own folder
DEPTH = 5  # folders below the one that is searched
LEAST_SIDE = 64  # of a photo in pixels
# What the paths of a data set's files end with
PICTURE = r"[^./][^/]*\.(jpe?g|png)"
CONTENT = r"[^./][^/]*\.(jpe?g|png|bmp|webp|tiff?|zip|gz|tar)"
BATCHES = r"cifar-10-batches-py/data_batch_1|cifar-10-python\.tar\.gz"
COCO_PHOTO, ANNOTATIONS = r"\d{12}\.jpg", r"instances_{}\.json"
ADE20K = rf"ADEChallengeData2016/images/\w+/{PICTURE}|release_test/testing/{PICTURE}"
PATTERNS = {
    CIFAR10: rf"{BATCHES}|(train|test)/(airplane|automobile)/{PICTURE}",
    COCO: COCO_PHOTO,
    PHOTOS: rf"{COCO_PHOTO}|{ADE20K}",
}
# Folders such as val2017, validation and release_test/testing, but not ADE20K's "validation"
TEST_PHOTO = rf"(val|test)[^/]*/(.*/)?{COCO_PHOTO}|release_test/testing/{PICTURE}"


@dataclass(frozen=True)
class Source:
    """Where a data set lies: `name` is "HW3_DATA", "data/", "download" or "stand-in"."""

    title: str
    name: str
    folder: Path

    @property
    def is_standin(self):
        return self.name == "stand-in"

    @functools.cached_property
    def files(self):
        """All in the folder and up to `DEPTH` folders deeper, relative to it."""
        levels = ["*/" * depth + "*" for depth in range(DEPTH + 1)]
        paths = (path for level in levels for path in self.folder.glob(level))
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def matching(self, pattern):
        """The files whose paths end with a pattern, outside of hidden folders."""
        whole = re.compile(rf"([^._][^/]*/)*({pattern})", re.IGNORECASE)
        return [self.folder / file for file in self.files if whole.fullmatch(file)]

    @functools.cached_property
    def photos(self):
        """Photos by name, as COCO's are known by their 12 digits wherever they lie."""
        return {path.name: path for path in self.matching(PATTERNS[PHOTOS])}


# --- finding --------------------------------------------------------------------------------------
def find(dataset, profile, folder=None, mirror=None):
    """Choose where a data set comes from; print the choice and its reason, and give the `Source`.

    A ProjectError where the user's folder holds pictures or archives in no layout that we read.

    Args:
        dataset: `CIFAR10`, `COCO` or `PHOTOS`.
        profile: "smoke" always takes the stand-in; "demo" downloads nothing.
        folder: the user's own data (`HW3_DATA`), looked into first.
        mirror: base address that replaces the official hosts (`HW3_MIRROR`).
    """
    places = {"HW3_DATA": folder, "data/": DATA, "download": None if profile == "demo" else DATA}
    for name, place in places.items():
        source = Source(dataset, name, place)
        if place and profile != "smoke" and _holds(source, mirror):
            print(f"{dataset}: real images from {name}")
            return source
    reason = "always in profile smoke" if profile == "smoke" else "no real ones are at hand"
    print(f"{dataset}: STAND-IN images, drawn by this project's own code ({reason})")
    return Source(dataset, "stand-in", Path(standin.coco_folder().name))


def _holds(source, mirror):
    """Whether a data set is there or comes; an error for unknown pictures in the user's folder."""
    title, own = source.title, source.name == "HW3_DATA"
    if source.name == "download":
        _download(title, mirror)
    known = source.matching(PATTERNS[title])
    whole = own and (title == PHOTOS or source.matching(ANNOTATIONS.format("val2017")))
    missing = [] if whole or title == CIFAR10 else _missing(source)
    if known and len(missing) <= (TOLERATED_OWN if own else TOLERATED):
        return True
    content = source.matching(CONTENT)
    others = any(map(source.matching, PATTERNS.values()))
    if own and (known or content and not others):
        raise ProjectError(
            f"HW3_DATA holds {len(content)} pictures or archives such as {content[0]}, but not "
            f"{title}: {len(known)} files have names that are read, {len(missing)} photos are "
            f"missing. Looked {DEPTH} folders deep for what data/README.md lists: rename or unpack "
            "them, or unset HW3_DATA."
        )
    if own:
        print(f"{title}: HW3_DATA holds {'only another data set' if others else 'no pictures'}")
    return False


# --- downloading ----------------------------------------------------------------------------------
def fetch(url, path, check=len):
    """Download a file whole or not at all, in three tries.

    `check` is called with the bytes that arrived and raises an error if they are not right. A
    ProjectError with the reason that the server, the network, the check or the disk gave.
    """
    for wait in (*WAITS, None):
        try:
            content = urllib.request.urlopen(url, timeout=TIMEOUT).read()
            check(content)
            break
        except Exception as error:  # of the network, the server, or the check
            if wait is None:
                raise ProjectError(f"{url} could not be fetched: {error!r}") from error
            time.sleep(wait)
    write_whole(path, content)


def _download(title, mirror):
    """Fetch CIFAR-10's archive, or the photos of COCO's sample that are missing."""
    print(f"{title}: downloading into data/ (HW3_PROFILE=demo downloads nothing)")
    mirror = (mirror or "").rstrip("/")
    host, folder, check = mirror or COCO_HOST, DATA / "coco", _check_photo
    if title == CIFAR10:
        host, folder, check = f"{mirror or CIFAR_HOST}/~kriz", DATA, _check_md5
    names = [ARCHIVE] if title == CIFAR10 else _missing(Source(title, "data/", DATA))
    failures = []

    def store(name):
        # Another program may have been quicker; and where many fail, all will.
        if len(failures) <= TOLERATED and not (folder / name).exists():
            try:
                fetch(f"{host}/{name}", folder / name, check)
            except ProjectError as error:
                failures.append(error)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(store, names))
    _report(title, failures)


def _check_md5(content):
    if hashlib.md5(content).hexdigest() != CIFAR_MD5:
        raise ValueError(f"wrong checksum of {len(content)} bytes")


def _check_photo(content):
    Image.open(io.BytesIO(content)).load()


def _report(title, failures):
    if failures:
        print(f"{title}: {len(failures)} files cannot be used, for instance: {failures[0]}")


# --- reading --------------------------------------------------------------------------------------
@contextlib.contextmanager
def _reading(path):
    """Turn whatever a library raises for a damaged file into one line that names the file."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        raise ProjectError(f"{path} cannot be read ({error!r}): replace or remove it.") from error


def read_image(path):
    """Read an image file as upright 8-bit RGB, transparent parts white; or a ProjectError."""
    with _reading(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":  # 16-bit gray, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _read_all(title, paths, read, limit=None):
    """What `read` makes of at most `limit` files; those with an error are left out and counted."""
    results, failures = [], []
    for path in paths:
        if len(results) == limit:
            break
        try:
            with _reading(path):
                results.append(read(path))
        except ProjectError as error:
            failures.append(error)
    _report(title, failures)
    if not results:
        raise ProjectError(f"{title}: no file can be used; data/README.md says which are read.")
    return results


def cifar10(source, limit=None):
    """CIFAR-10's airplanes (label 0) and automobiles (1), at most `limit` of each in a role.

    Gives {"train": (images (N, 3, 32, 32) uint8, labels (N,) int64), "test": ...}; a ProjectError
    for a damaged archive, or if a class has no image.
    """
    tensors, batches = {}, source.matching(BATCHES)
    for role in ("train", "test"):
        if source.is_standin:
            images, labels = standin.draw_cifar(400, seed=len(role))
        elif batches:
            images, labels = _read_batches(batches[0], role)
        else:
            folders = (source.matching(f"{role}/{kind}/{PICTURE}") for kind in CIFAR_CLASSES)
            paths = [path for folder in folders for path in folder[:limit]]
            images, labels = zip(*_read_all(f"{CIFAR10}, {role}", paths, _read_small))
        images, labels = torch.from_numpy(np.asarray(images)), torch.as_tensor(labels)
        chosen = torch.cat([torch.where(labels == label)[0][:limit] for label in (0, 1)])
        if len(labels[chosen].unique()) < 2:
            raise ProjectError(f"{CIFAR10} from {source.name}: a class has no {role} image.")
        tensors[role] = images[chosen].permute(0, 3, 1, 2).contiguous(), labels[chosen]
    return tensors


def _read_small(path):
    image = read_image(path)
    if image.size != (32, 32):
        raise ValueError(f"{image.width} x {image.height} pixels, not 32 x 32")
    return np.asarray(image), CIFAR_CLASSES.index(path.parent.name.lower())


def _read_batches(path, role):
    from torchvision.datasets import CIFAR10 as Batches

    with _reading(path), tempfile.TemporaryDirectory() as scratch:
        root = path.parent.parent
        if path.suffix == ".gz":  # unpacked elsewhere: the user's folder stays as it is
            root = scratch
            _check_md5(path.read_bytes())
            shutil.unpack_archive(path, root)
        batches = Batches(root, train=role == "train")
    return batches.data, batches.targets


@functools.cache
def _sample(split):
    """The committed annotations."""
    return json.loads(gzip.decompress((SAMPLE / f"instances_{split}.json.gz").read_bytes()))


def _missing(source):
    """The sample's photos that a source lacks, as the server names them: train2017/....jpg."""
    photos = [(split, i["file_name"]) for split in SPLITS for i in _sample(split)["images"]]
    return [f"{split}/{name}" for split, name in photos if name not in source.photos]


def coco(source, split, limit=None):
    """COCO's annotations ("train2017" or "val2017") of at most `limit` photos that are at hand.

    Gives pycocotools' `COCO` of all that the annotations name, and {image id: path} of the photos;
    a ProjectError for unreadable annotations, or too few of their photos.
    """
    from pycocotools.coco import COCO as Annotations  # only one notebook needs this library

    index, photos = Annotations(), source.photos
    index.dataset = _sample(split)
    for path in source.matching(ANNOTATIONS.format(split))[:1]:
        with _reading(path):
            index.dataset = json.loads(path.read_bytes())
    ids = {info["file_name"]: info["id"] for info in index.dataset["images"]}
    paths = {ids[name]: photos[name] for name in ids if name in photos}
    asked = min(limit or len(_sample(split)["images"]), len(ids))
    if len(paths) < asked / 2:
        raise ProjectError(
            f"{COCO}: {len(paths)} of {asked} photos of {split} are in {source.folder}, under "
            "COCO's names of 12 digits: add photos, or unset HW3_DATA."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index, dict(list(paths.items())[:limit])


def photos(source, role, limit):
    """Paths of at most `limit` photos of "train" or "test", drawn at random; none has both roles.

    Those that are unreadable or have a side below `LEAST_SIDE` pixels are left out and counted; a
    ProjectError if none is left.
    """

    def check(path):
        with Image.open(path) as image:
            if min(image.size) < LEAST_SIDE:
                raise ValueError(f"a side is below {LEAST_SIDE} pixels")
        return path

    tests = {path.name for path in source.matching(TEST_PHOTO)}
    paths = [path for name, path in source.photos.items() if (name in tests) == (role == "test")]
    np.random.default_rng(0).shuffle(paths)
    return sorted(_read_all(f"{PHOTOS}, {role}", paths, check, limit))


# --- splits ---------------------------------------------------------------------------------------
def split(groups, share, seed, labels=None):
    """Split samples into training and validation, whole groups (such as photos) at a time.

    Gives two sorted int64 index tensors without a common group; a ProjectError if one is empty.

    Args:
        groups: of each sample.
        share: of the groups that validate, in each class.
        seed: of the draw.
        labels: class of each sample; a group counts for its first sample's class.
    """
    names, first, group = np.unique(groups, return_index=True, return_inverse=True)
    classes = np.zeros(len(names)) if labels is None else np.asarray(labels)[first]
    order, drawn = np.random.default_rng(seed).permutation(len(names)), []
    for label in np.unique(classes):
        members = order[classes[order] == label]
        drawn += members[: math.ceil(share * (len(members) - 1))].tolist()  # never a whole class
    if not drawn:
        raise ProjectError(f"{len(names)} images cannot be split in two: add more.")
    validates = torch.from_numpy(np.isin(group, drawn))
    return torch.where(~validates)[0], torch.where(validates)[0]
