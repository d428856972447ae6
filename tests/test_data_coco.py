"""Reading COCO and photos: choice, downloads, wrong entries, and outlines that cannot be filled."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pymask

from src import data, datasets, download
from src.data import DataError, Source
from src.datasets import coco
from src.download import DownloadError
from tests import mirror as mirrors

STANDIN = Source("any", "stand-in")
SPLITS = ("train2017", "val2017")


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Downloads go to a scratch folder, straight to the servers of the tests, without waits."""
    monkeypatch.setattr(data, "DATA", tmp_path / "project-data")
    monkeypatch.setattr(download, "WAITS", (0, 0))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def document(*ids: int) -> dict:
    """Annotations of images of 8 x 8 pixels, one object in each."""
    ids = ids or (1,)
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 8, "height": 8} for i in ids],
        "categories": [{"id": 3, "name": "car", "supercategory": "vehicle"}],
        "annotations": [
            {
                "id": 10 * i,
                "image_id": i,
                "category_id": 3,
                "segmentation": [[0, 0, 4, 0, 4, 4]],
                "bbox": [0, 0, 4, 4],
                "area": 8,
                "iscrowd": 0,
            }
            for i in ids
        ],
    }


def write_coco(folder: Path, content, split: str = "val2017") -> Source:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations" / f"instances_{split}.json").write_text(text)
    return Source("MS COCO", "HW3_DATA", folder)


def write_photo(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((8, 8), 50).save(buffer, "JPEG")
    return buffer.getvalue()


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def official(mirror):
    """COCO's official files: more images than anybody should download, among them the sample."""
    ids = {split: sorted({*coco.SAMPLE[split], *range(1, 3000)}) for split in SPLITS}
    annotations = {
        f"annotations/instances_{split}.json": json.dumps(document(*ids[split])).encode()
        for split in SPLITS
    }
    mirror.files["annotations/annotations_trainval2017.zip"] = archive(
        **annotations, **{"annotations/captions_val2017.json": b"{}"}
    )
    mirror.files |= {f"{split}/{i:012d}.jpg": jpeg() for split in SPLITS for i in ids[split]}
    return mirror


def find(dataset: data.DataSet, mirror, profile: str | None = "cpu", folder=None) -> Source:
    return data.find_source(dataset, profile, folder, mirror.url)


# --- downloads -----------------------------------------------------------------------------------
def test_the_cpu_profile_asks_for_the_sample_and_no_more(official, capsys):
    assert [len(coco.SAMPLE[split]) for split in SPLITS] == [343, 206]
    source = find(datasets.COCO, official)
    assert "downloading the annotations, 241 MB" in capsys.readouterr().out
    for split in SPLITS:
        loaded, image_path = datasets.load_coco(split, source, "sample")
        assert sorted(loaded.imgs) == coco.SAMPLE[split] and len(loaded.anns) == len(loaded.imgs)
        for info in loaded.imgs.values():
            assert data.read_image(image_path(info)).size == (8, 8)
    out = capsys.readouterr().out
    assert "downloading 343 photos of train2017, about 55 MB" in out
    photos = find(datasets.PHOTOS, official)  # the same photos
    assert photos.name == "data/"
    roles = [datasets.list_photos(role, photos) for role in ("train", "test")]
    assert [len(role) for role in roles] == [343, 206]
    assert len(official.asked) <= 600  # three of them looks whether the server answers
    asked = len(official.asked)
    source = find(datasets.COCO, official)
    datasets.load_coco("train2017", source, "sample")
    assert source.name == "data/" and len(official.asked) == asked
    assert sorted(os.listdir(data.DATA / "coco")) == ["annotations", "train2017", "val2017"]
    assert len(os.listdir(data.DATA / "coco" / "annotations")) == 2


def test_change_detection_alone_downloads_the_sample(official):
    source = find(datasets.PHOTOS, official, None)
    assert (source.name, source.path) == ("download", data.DATA)
    assert len(datasets.list_photos("train", source)) == 343
    assert len(datasets.list_photos("test", source)) == 206
    assert len(official.asked) <= 700
    assert not [path for path, _ in official.asked if not path.startswith(SPLITS)]


def test_a_sample_that_is_half_done_is_completed(official):
    for number in coco.SAMPLE["train2017"]:
        official.faults[f"train2017/{number:012d}.jpg"] = ["403"]
    assert find(datasets.PHOTOS, official).is_standin
    for split, some in (("train2017", 200), ("val2017", 206)):
        for number in coco.SAMPLE[split][:some]:
            write_photo(data.DATA / "coco" / split / f"{number:012d}.jpg")
    assert find(datasets.PHOTOS, official, "demo").name == "data/"
    official.faults.clear()
    before = len(official.asked)
    assert find(datasets.PHOTOS, official).name == "download"
    assert len(official.asked) - before == 143 + 1


def test_a_number_of_images_is_downloaded_and_has_a_bound(official, monkeypatch):
    source = find(datasets.COCO, official, "gpu")
    loaded, _ = datasets.load_coco("val2017", source, 20)
    assert sorted(loaded.imgs) == list(range(1, 21))
    loaded, _ = datasets.load_coco("val2017", source, [2, 30, 999_999_999])
    assert sorted(loaded.imgs) == [2, 30]
    assert len(os.listdir(data.DATA / "coco/val2017")) == 21
    loaded, _ = datasets.load_coco("val2017", source)
    assert sorted(loaded.imgs) == coco.SAMPLE["val2017"], "never all of it"
    monkeypatch.setattr(coco, "MOST", 500)
    with pytest.raises(DataError, match="photos are too many to download one by one: choose"):
        datasets.load_coco("val2017", source, 2000)


def test_a_few_photos_that_cannot_be_had_are_left_out_and_counted(official, capsys):
    source, lost = find(datasets.COCO, official), coco.SAMPLE["val2017"][:10]
    for number in lost:
        official.faults[f"val2017/{number:012d}.jpg"] = ["403", "403"]
    loaded, image_path = datasets.load_coco("val2017", source, "sample")
    assert len(loaded.imgs) == 196 and not set(lost) & {*loaded.imgs, *loaded.imgToAnns}
    assert "10 of 206 photos of val2017 cannot be had: left out" in capsys.readouterr().out
    del official.files["val2017/000000000001.jpg"]
    with pytest.raises(DownloadError, match="1 of 5 files cannot be had.*Not Found"):
        datasets.load_coco("val2017", source, 5)


def test_names_of_all_kinds_are_asked_for(mirror):
    write_coco(data.DATA / "coco", document() | {"images": [NAMED]})
    mirror.files["val2017/%C3%A9t%C3%A9%201%23.jpg"] = jpeg()
    source = find(datasets.COCO, mirror)
    loaded, image_path = datasets.load_coco("val2017", source, 1)
    assert image_path(loaded.imgs[1]).name == NAMED["file_name"]


NAMED = {"id": 1, "file_name": "été 1#.jpg", "width": 8, "height": 8}


def test_nothing_is_downloaded_into_the_user_s_folder_or_for_demo(official, tmp_path):
    source = find(datasets.COCO, official)
    asked = len(official.asked)
    write_coco(tmp_path, document())
    for place in (find(datasets.COCO, official, "demo"), Source("COCO", "HW3_DATA", tmp_path)):
        with pytest.raises(DataError, match="none of the photos that are asked for is in"):
            datasets.load_coco("val2017", place, 5)
    assert len(official.asked) == asked and source.downloads


def test_an_archive_that_arrives_damaged(official):
    name = "annotations/annotations_trainval2017.zip"
    content = bytearray(official.files[name])
    content[content.index(b"instances_val2017.json") + 40] ^= 0xFF
    official.files[name] = bytes(content)
    with pytest.raises(DataError, match="2017.zip arrived damaged .* and was removed: run again"):
        find(datasets.COCO, official)
    assert not [path for path in data.DATA.rglob("*") if path.is_file()]


ADE20K = "places/ADEchallenge/"


def test_a_gpu_takes_ade20k_even_where_the_sample_is(official):
    find(datasets.PHOTOS, official, "cpu")
    official.files[ADE20K + "ADEChallengeData2016.zip"] = archive(
        **{
            f"ADEChallengeData2016/{name}": jpeg()
            for name in (
                *("images/training/b.jpg", "images/training/a.jpg", "images/validation/c.jpg"),
                "annotations/training/a.png",
            )
        }
    )
    assert find(datasets.PHOTOS, official, "gpu").name == "download"  # the second file is missing
    official.files[ADE20K + "release_test.zip"] = archive(
        **{"release_test/testing/d.jpg": jpeg(), "release_test/list.txt": b""}
    )
    asked = len(official.asked)
    source = find(datasets.PHOTOS, official, "gpu_full")
    assert len(official.asked) == asked + 2, "the first archive is not fetched again"
    names = {
        role: [
            path.relative_to(data.DATA).as_posix() for path in datasets.list_photos(role, source)
        ]
        for role in ("train", "test")
    }
    assert names == {
        "train": [
            f"ADEChallengeData2016/images/{name}.jpg"
            for name in ("training/a", "training/b", "validation/c")
        ],
        "test": ["release_test/testing/d.jpg"],
    }
    found = [path for path in data.DATA.rglob("*") if path.is_file() and "coco" not in path.parts]
    assert len(found) == 4, "nothing but the photos"
    official.files.clear()
    for profile in ("cpu", "gpu", "demo"):
        assert find(datasets.PHOTOS, official, profile).name == "data/"


def test_a_gpu_that_cannot_reach_ade20k_takes_the_sample(official, capsys):
    source = find(datasets.PHOTOS, official, "gpu")
    assert "COCO's sample instead" in capsys.readouterr().out
    assert len(datasets.list_photos("train", source)) == 343


# --- COCO on disk --------------------------------------------------------------------------------
@pytest.mark.parametrize("photos", ["coco/val2017", "val2017", "coco/images/val2017"])
def test_coco_layouts(tmp_path, mirror, photos):
    base = tmp_path / ("coco" if photos.startswith("coco") else "")
    write_coco(base, document())
    photo = write_photo(tmp_path / photos / "000000000001.jpg", 8, 8)
    source = find(datasets.COCO, mirror, "cpu", tmp_path)
    for images in (None, 5, [1]):
        loaded, image_path = datasets.load_coco("val2017", source, images)
        assert image_path(loaded.imgs[1]) == photo
    with pytest.raises(DataError, match="cannot read the annotations .*instances_train2017.json"):
        datasets.load_coco("train2017", source)
    assert mirror.asked == []


def test_coco_image_that_is_missing(tmp_path):
    loaded, image_path = datasets.load_coco("val2017", write_coco(tmp_path, document()))
    message = r"the image .*1\.jpg named in instances_val2017\.json is missing: add it"
    with pytest.raises(DataError, match=message):
        image_path(loaded.imgs[1])


def test_the_choice_is_among_the_photos_on_disk(tmp_path, capsys):
    sample = coco.SAMPLE["val2017"]
    source = write_coco(tmp_path, document(*sample, *range(900_000, 900_050)))
    for number in (*sample[5:], *range(900_000, 900_050)):
        write_photo(tmp_path / "val2017" / f"{number:012d}.jpg")
    loaded, _ = datasets.load_coco("val2017", source, "sample")
    assert sorted(loaded.imgs) == sample[5:]
    loaded, _ = datasets.load_coco("val2017", source, 3)
    assert sorted(loaded.imgs) == sample[5:8]
    assert capsys.readouterr().out == ""
    for number in sample[5:100]:
        (tmp_path / "val2017" / f"{number:012d}.jpg").unlink()
    loaded, _ = datasets.load_coco("val2017", source, "sample")
    assert len(loaded.imgs) == 156 and 900_000 in loaded.imgs
    assert "not the sample of val2017, but the first 156" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"images": [', "cannot read the annotations .*instances_val2017.json"),
        ("[" * 100_000, "cannot read the annotations .*instances_val2017.json"),
        ("[1, 2]", 'instances_val2017.json has no list "images"'),
        ({**document(), "annotations": {}}, 'json has no list "annotations"'),
    ],
)
def test_annotations_that_are_no_annotations(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_coco("val2017", write_coco(tmp_path, content))
    assert "\n" not in str(caught.value)


MISSING = object()


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("categories", "id", "3", 'entry 0 of "categories" has "id": "3", .* of type int'),
        ("categories", "name", MISSING, 'entry 0 of "categories" has no "name"'),
        ("categories", "name", None, 'entry 0 of "categories" has "name": null, .*not of type str'),
        ("categories", "supercategory", 4, 'entry 0 of "categories" has "supercategory": 4'),
        ("annotations", "area", MISSING, 'entry 1 of "annotations" has no "area"'),
        ("annotations", "id", 10, 'entry 1 of "annotations" has the id 10 of an entry before'),
        ("annotations", "id", "20", 'entry 1 of "annotations" has "id": "20", .* of type int'),
        ("annotations", "image_id", 7, 'entry 1 of "annotations" is of the image 7, which is not'),
        ("annotations", "category_id", 4, 'entry 1 of "annotations" is of the category 4'),
        ("annotations", "bbox", None, 'entry 1 of "annotations" has "bbox": null'),
        ("annotations", "bbox", [1, 2, 3], 'entry 1 of "annotations" has a box that is not four'),
        ("annotations", "bbox", [1, 2, 3, None], "entry 1 .* has a box that is not four numbers"),
        ("images", "id", 1, 'entry 1 of "images" has the id 1 of an entry before it'),
        ("images", "id", 2.5, 'entry 1 of "images" has "id": 2.5'),
        ("images", "file_name", None, 'entry 1 of "images" has "file_name": null'),
        ("images", "width", 0, 'entry 1 of "images" has no pixels'),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, section, key, value, message):
    content = document(1, 2)
    if value is MISSING:
        del content[section][-1][key]
    else:
        content[section][-1][key] = value
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_coco("val2017", write_coco(tmp_path, content))
    assert "instances_val2017.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("width, height", [(10**6, 10**6), (2**31, 8), (8, 10**9)])
def test_a_photo_of_impossible_size_is_named(tmp_path, width, height):
    """Its outlines are filled before it is read, which would take all memory."""
    content = document(1, 2)
    content["images"][1] |= {"width": width, "height": height}
    with pytest.raises(DataError, match='entry 1 of "images" has .* pixels'):
        datasets.load_coco("val2017", write_coco(tmp_path, content))


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_an_id_that_no_array_can_hold_is_named(tmp_path, number):
    content = document(1, 2)
    content["images"][1]["id"] = number
    with pytest.raises(DataError, match=f'entry 1 of "images" has the id {number}, which does not'):
        datasets.load_coco("val2017", write_coco(tmp_path, content))


@pytest.mark.parametrize("folder", ["", "elsewhere/"])
def test_two_images_with_one_file_are_named(tmp_path, folder):
    """Otherwise one photo could get into training and validation."""
    content = document(1, 2)
    content["images"][1]["file_name"] = folder + content["images"][0]["file_name"]
    with pytest.raises(DataError, match='several entries of "images" have the file .*: keep one'):
        datasets.load_coco("val2017", write_coco(tmp_path, content))


def test_a_category_twice_is_named(tmp_path):
    twice = [{"id": 3, "name": name, "supercategory": "vehicle"} for name in ("car", "cat")]
    with pytest.raises(DataError, match='entry 1 of "categories" has the id 3 of an entry before'):
        datasets.load_coco("val2017", write_coco(tmp_path, document() | {"categories": twice}))


def test_annotations_with_a_byte_order_mark_are_read(tmp_path):
    source = write_coco(tmp_path, document())
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert sorted(datasets.load_coco("val2017", source)[0].imgs) == [1]


def test_entries_that_are_no_objects_are_named(tmp_path):
    for entry in (None, [], 5, "a"):
        with pytest.raises(DataError, match='entry 0 of "images" has no "id"'):
            datasets.load_coco("val2017", write_coco(tmp_path, document() | {"images": [entry]}))


def test_coco_and_photos_standin_are_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        data.standin,
        "write_coco",
        lambda folder, **sizes: (
            drawn.append(sizes),
            *(write_coco(folder, document(1, 2), split) for split in SPLITS),
            *(write_photo(folder / s / f"{i:012d}.jpg", 8, 8) for s in SPLITS for i in (1, 2)),
        ),
    )
    for images, count in ((None, 2), ("sample", 2), (1, 1)):
        for split in SPLITS:
            loaded, _ = datasets.load_coco(split, STANDIN, images)
            assert len(loaded.imgs) == count
    assert len(drawn) == 1
    folder = data.DATA / f"standin-{data.standin.VERSION}"
    assert [path.name for path in folder.iterdir()] == ["coco"]


def test_real_coco(real_data):
    source = Source("MS COCO", "HW3_DATA", real_data)
    for split in SPLITS:
        loaded, image_path = datasets.load_coco(split, source, "sample")
        assert sorted(loaded.imgs) == coco.SAMPLE[split]
        info = next(iter(loaded.imgs.values()))
        assert data.read_image(image_path(info)).size == (info["width"], info["height"])


def test_real_coco_from_a_mirror(real_data, mirror):
    mirror.files = mirrors.coco_files(real_data)
    mirror.faults[""] = ["no ranges"]
    for number in coco.SAMPLE["train2017"][::10]:
        mirror.faults[f"train2017/{number:012d}.jpg"] = ["cut"]
    source = data.find_source(datasets.COCO, None, mirror=mirror.url)
    for split in SPLITS:
        loaded, image_path = datasets.load_coco(split, source)
        assert sorted(loaded.imgs) == coco.SAMPLE[split]
        for info in loaded.imgs.values():
            original = real_data / "coco" / split / info["file_name"]
            assert image_path(info).read_bytes() == original.read_bytes()
    assert len(mirror.asked) <= 700


# --- outlines ------------------------------------------------------------------------------------
def outline(segmentation, bbox=(0, 0, 8, 8)) -> np.ndarray | None:
    annotation = {"segmentation": segmentation, "bbox": list(bbox)}
    return datasets.coco_mask(annotation, 6, 8)


def runs(counts, size=(6, 8)) -> dict:
    return {"counts": counts, "size": list(size)}


def test_outlines_are_filled_as_the_library_does(real_data):
    source = Source("MS COCO", "HW3_DATA", real_data)
    loaded, _ = datasets.load_coco("val2017", source, 40)
    assert any(annotation["iscrowd"] for annotation in loaded.anns.values())
    for annotation in loaded.anns.values():
        info = loaded.imgs[annotation["image_id"]]
        expected = loaded.annToMask(annotation)
        packed = pymask.encode(np.asfortranarray(expected))
        text = dict(packed, counts=packed["counts"].decode())
        for shape in (annotation["segmentation"], packed, text):
            mask = datasets.coco_mask(
                annotation | {"segmentation": shape}, info["height"], info["width"]
            )
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, expected)


TRIANGLE = [0, 0, 4, 0, 4, 4]


@pytest.mark.parametrize(
    "segmentation",
    [
        *([[0, 0, 4, 0, 4, bad]] for bad in (float("nan"), float("inf"), -float("inf"), 1e9)),
        *([TRIANGLE, [0, 0, bad, 0, 4, 4]] for bad in (-1e9, 10**400, None, "x", [1])),
        *([[0, 0]], [[0, 0, 1, 1]], [TRIANGLE[:5]], [[]], [], [[20, 20, 21, 20, 21, 21]]),
        *(None, 5, "abcdefgh", {}, [None], [5], ["abcdef"], [TRIANGLE, {}], [[[0, 0]] * 3]),
        [[0, 0, 8, 0, 8, 6] * 50_001],  # an outline of a million pixels' length
        runs([48 * 10**6], (10**6, 10**6)),
        runs([10**12], (10**6, 10**6)),
        runs([0, 10**12]),
        *(runs(counts) for counts in ([0, 10], [], [0, 49], [50, -2], [-1, 49], [0, 47.5, 0.5])),
        *(runs(counts) for counts in (None, "", "0", b"`1", "o" * 1000, "\u00e9", ["a"], [[48]])),
        *(runs([0, 48], size) for size in ((8, 6), (6,), (6, 8, 1), ("6", "8"), (0, 0))),
        *({"counts": [0, 48]}, {"size": [6, 8]}, {"counts": [0, 48], "size": None}),
        runs([48]),  # nothing inside
    ],
    ids=str,
)
def test_outlines_that_cannot_be_filled_give_none(segmentation):
    assert outline(segmentation) is None


@pytest.mark.parametrize(
    "bbox",
    [(0, 0, float("nan"), 1), (0, 0, 1e9, 1), (-1e9, 0, 1, 1), (0, 0, 1), (0, float("inf"), 1, 1)],
)
def test_a_box_far_outside_of_the_photo_gives_none(bbox):
    assert outline([TRIANGLE], bbox) is None
    assert outline([TRIANGLE], (0, 0, 4, 4)).sum() > 0


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_runs_in_every_form_give_the_same_mask(iscrowd):
    expected = np.zeros((6, 8), np.uint8)
    expected[1:5, 2:7] = 1
    packed = pymask.encode(np.asfortranarray(expected))["counts"]
    borders = np.flatnonzero(np.diff(expected.T.ravel(), prepend=0)).tolist()
    lengths = np.diff([0, *borders, 48]).tolist()
    for counts in (packed, packed.decode(), lengths):
        shape = {"segmentation": runs(counts), "bbox": [0, 0, 8, 6], "iscrowd": iscrowd}
        np.testing.assert_array_equal(datasets.coco_mask(shape, 6, 8), expected)


def test_outlines_a_little_outside_are_cut_at_the_border():
    assert outline([[-3, -3, 11, -3, 11, 9, -3, 9]]).all()
    assert outline(runs([0, 48])).all()


# --- photos --------------------------------------------------------------------------------------
def test_photos_layouts_and_order(tmp_path):
    train = [
        write_photo(tmp_path / name)
        for name in ("coco/train2017/b.jpg", "coco/train2017/c.png", "photos/a.JPG")
    ]
    test = [write_photo(tmp_path / "coco/val2017/a.jpg")]
    source = data.find_source(datasets.PHOTOS, "cpu", tmp_path)
    assert datasets.list_photos("train", source) == train
    assert datasets.list_photos("test", source) == test
    ade = [
        write_photo(tmp_path / f"ADEChallengeData2016/images/{name}/a.jpg")
        for name in ("training", "validation")
    ]
    assert datasets.list_photos("train", source) == train
    held_out = write_photo(tmp_path / "release_test/testing/a.jpg")
    assert datasets.list_photos("train", source) == ade
    assert datasets.list_photos("test", source) == [held_out]


def test_a_number_of_photos_is_drawn_at_random_and_no_more_are_opened(tmp_path, monkeypatch):
    source, opened = Source("Photos", "data/", tmp_path), []
    photos = [write_photo(tmp_path / f"coco/val2017/{i:03d}.jpg") for i in range(200)]
    write_photo(photos[7], 10, 10)

    def counting(path, open_image=data.opened_image):
        opened.append(path)
        return open_image(path)

    monkeypatch.setattr(data, "opened_image", counting)
    few = datasets.list_photos("test", source, 20, seed=1, minimum_side=20)
    assert len(few) == 20 and len(opened) <= 21 and few == sorted(few)
    assert few == datasets.list_photos("test", source, 20, seed=1, minimum_side=20)
    assert few != datasets.list_photos("test", source, 20, seed=2) and few != photos[:20]
    assert datasets.list_photos("test", source, 500) == photos
    assert datasets.list_photos("test", source, 500, minimum_side=20) == photos[:7] + photos[8:]


def test_photos_too_small_empty_or_unreadable(tmp_path, capsys):
    source = Source("Photos", "data/", tmp_path)
    large = write_photo(tmp_path / "coco/val2017/a.jpg", 90, 80)
    small = write_photo(tmp_path / "coco/val2017/b.jpg", 90, 79)
    assert datasets.list_photos("test", source, minimum_side=80) == [large]
    assert "left out 1 of 2 for test, below 80 pixels" in capsys.readouterr().out
    with pytest.raises(DataError, match="no test photo with a shorter side of 81 pixels or more"):
        datasets.list_photos("test", source, minimum_side=81)
    (tmp_path / "coco/train2017").mkdir()
    with pytest.raises(DataError, match="train2017 holds no JPEG or PNG image"):
        datasets.list_photos("train", source)
    small.write_text("no image")
    with pytest.raises(DataError, match="cannot read the image .*b.jpg"):
        datasets.list_photos("test", source)
