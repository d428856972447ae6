"""Photos of any content: those of ADE20K (Zhou et al. 2017), or COCO's without annotations."""

from pathlib import Path

import numpy as np

from src import data, standin
from src.datasets import coco
from src.download import TOLERATED, DataError, DownloadError, download_zip, mirrored

LAYOUTS = (
    {
        "train": ("ADEChallengeData2016/images/training", "ADEChallengeData2016/images/validation"),
        "test": ("release_test/testing",),
    },
    *(
        {"train": (base + "train2017", "photos"), "test": (base + "val2017",)}
        for base in ("coco/", "", "coco/images/", "images/")
    ),
)
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/"


def list_photos(
    role: str,
    source: data.Source,
    limit: int | None = None,
    seed: int = 0,
    minimum_side: int = 1,
) -> list[Path]:
    """The photos for "train" or "test", sorted; no photo serves both roles.

    ADE20K (`ADEChallengeData2016/images/{training,validation}` train, `release_test/testing`
    tests) comes before COCO (`coco/train2017` and `photos` train, `coco/val2017` tests).

    Args:
        role: "train" or "test".
        source: where they are.
        limit: at most so many, drawn at random by `seed`; None for all.
        seed: of the draw.
        minimum_side: photos with a shorter side below it (in pixels) are left out.

    Raises:
        DataError: an empty folder, an unreadable photo, or none that is large enough.
    """
    if source.is_standin:
        folders = [data.standin_folder("photos", _draw) / role]
    else:
        layout = _layout(source.path) or LAYOUTS[1]
        folders = [source.path / name for name in layout[role] if (source.path / name).is_dir()]
    files = [path for folder in folders for path in data.image_files(folder)]
    if limit is None:
        limit, order = len(files), range(len(files))
    else:
        order = np.random.default_rng(seed).permutation(len(files))
    kept, left_out = [], 0
    for i in order:
        if len(kept) == limit:
            break
        with data.opened_image(files[i]) as image:
            fits = min(image.size) >= minimum_side
        kept += [i] * fits
        left_out += not fits
    if left_out:
        print(
            f"Photos: left out {left_out} of {left_out + len(kept)} for {role}, below "
            f"{minimum_side} pixels"
        )
    if not kept:
        raise DataError(
            f"no {role} photo with a shorter side of {minimum_side} pixels or more: add larger "
            "photos"
        )
    return [files[i] for i in sorted(kept)]


def _draw(folder: Path) -> None:
    standin.write_photos(folder / "train", 40, side=320, seed=0)
    standin.write_photos(folder / "test", 20, side=320, seed=1)


def _layout(folder: Path) -> dict | None:
    """The first layout of which both roles have a folder."""

    def complete(layout: dict) -> bool:
        return all(any((folder / name).is_dir() for name in names) for names in layout.values())

    return next(filter(complete, LAYOUTS), None)


def _is_in(folder: Path, profile: str | None) -> bool:
    layout = _layout(folder)
    if folder != data.DATA or layout in (None, LAYOUTS[0]) or profile == "demo":
        return layout is not None
    # where COCO's photos were downloaded, a GPU still wants ADE20K, and the sample may be half done
    shares = [
        np.mean([(folder / "coco" / split / name).is_file() for name in names])
        for split, names in _sample().items()
    ]
    return not _wants_ade20k(profile) and not any(0 < share < 1 - TOLERATED for share in shares)


def _wants_ade20k(profile: str | None) -> bool:
    return (profile or "").startswith("gpu")


def _sample() -> dict[str, list[str]]:
    """The file names of COCO's sample, by split."""
    return {split: [f"{number:012d}.jpg" for number in ids] for split, ids in coco.SAMPLE.items()}


def _fetch(folder: Path, profile: str | None, mirror: str | None) -> None:
    """ADE20K for a GPU, or else COCO's sample."""
    if _wants_ade20k(profile):
        try:
            return _fetch_ade20k(folder, mirror)
        except DownloadError as error:
            print(f"Photos: {error}; COCO's sample instead")
    for split, names in _sample().items():
        coco.fetch_photos(split, names, folder / "coco" / split, mirror)


def _fetch_ade20k(folder: Path, mirror: str | None) -> None:
    """The photos of its two archives, without the annotations."""
    print("Photos: downloading ADE20K, two files, 1.1 GB")
    for name in ("ADEChallengeData2016.zip", "release_test.zip"):
        archive = folder / name
        # where its own archive still lies, it is not whole
        if archive.is_file() or not archive.with_suffix("").is_dir():
            url = mirrored(ADE20K + name, mirror)
            download_zip(url, folder, lambda name: name.endswith(".jpg"))


PHOTOS = data.DataSet(
    "Photos",
    _is_in,
    _fetch,
    layout="ADEChallengeData2016/images/{training,validation} and release_test/testing, or "
    "coco/{train2017,val2017}",
    clues=("train20*", "*/train20*", "val20*", "*/val20*", "ADE*", "*/ADE*", "release_test*"),
)
