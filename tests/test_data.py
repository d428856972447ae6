"""Finding, downloading, reading and splitting: what goes wrong with users' folders and networks."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from src import ProjectError, data, files

IDS = {"train2017": range(1, 25), "val2017": range(101, 117)}


def jpeg(seed: int, width: int = 80, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def name(number: int) -> str:
    return f"{number:012d}.jpg"


def annotations(split: str) -> dict:
    """One triangle in each photo of a small sample."""
    images = [{"id": i, "file_name": name(i), "width": 80, "height": 64} for i in IDS[split]]
    shape = {"segmentation": [[10, 20, 40, 20, 40, 60]], "bbox": [10, 20, 30, 40]}
    objects = [{"id": i, "image_id": i, "category_id": 3} | shape for i in IDS[split]]
    return {"images": images, "annotations": objects, "categories": [{"id": 3, "name": "car"}]}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path, mirror):
    """A sample of 40 photos, a mirror that has them, no waits, and `data/` in a scratch folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "WAITS", ())
    monkeypatch.setattr(data, "WAITS", (0, 0))
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    monkeypatch.setattr(data, "_sample", annotations)
    monkeypatch.setattr(data, "TOLERATED", 2)
    monkeypatch.setattr(data, "TOLERATED_OWN", 20)
    mirror.files |= {f"{split}/{name(i)}": jpeg(i) for split, ids in IDS.items() for i in ids}


def write_coco(folder: Path, train="coco/train2017", test="coco/val2017", photos=40) -> Path:
    """The first photos of the sample, those of training first."""
    places = [(train, i) for i in IDS["train2017"]] + [(test, i) for i in IDS["val2017"]]
    for place, i in places[:photos]:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name(i)).write_bytes(jpeg(i))
    return folder


def write_cifar(folder: Path) -> np.ndarray:
    """Class folders of 3 images each; the images (role, class, number, 32, 32, 3)."""
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 32, 32, 3), dtype=np.uint8)
    for r, c, i in np.ndindex(2, 2, 3):
        place = folder / ("train", "test")[r] / data.CIFAR_CLASSES[c]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[r, c, i]).save(place / f"{i}.png")
    return images


def find(dataset, folder=None, profile="cpu", mirror=None) -> data.Source:
    return data.find(dataset, profile, folder, mirror and mirror.url + "/")


# --- the order ------------------------------------------------------------------------------------
def test_order(tmp_path, mirror, capsys):
    own = write_coco(tmp_path / "own")
    del mirror.files["train2017/" + name(1)]
    for dataset in (data.COCO, data.PHOTOS):
        assert find(dataset, own, "smoke").is_standin
        assert find(dataset, own).name == "HW3_DATA"
        assert find(dataset, None, "demo", mirror).is_standin and not mirror.asked
    assert find(data.COCO, None, "cpu", mirror).name == "download"
    out = capsys.readouterr().out
    assert "1 files cannot be used, for instance: http" in out and "HTTPError 404" in out
    assert "STAND-IN images, drawn by this project's own code (always in profile smoke)" in out
    assert [find(data.PHOTOS, None, profile).name for profile in ("cpu", "demo")] == ["data/"] * 2


def test_the_rest_of_an_interrupted_download_is_fetched(mirror):
    write_coco(data.DATA, photos=30)
    assert find(data.COCO, None, "demo").is_standin
    assert find(data.COCO, None, "cpu", mirror).name == "download" and len(mirror.asked) == 10


# --- what networks and disks do -------------------------------------------------------------------
def test_faults_that_pass_cost_no_photo(mirror):
    faults = ["503"], ["nothing"], ["cut", "nothing"], ["damaged", "429"]
    mirror.faults.update(zip(list(mirror.files)[3:], faults))
    assert find(data.COCO, None, "cpu", mirror).name == "download"
    paths = list(data.DATA.rglob("*.*"))
    assert len(paths) == 40 and len(mirror.asked) == 46
    assert all(path.read_bytes() == jpeg(int(path.stem)) for path in paths)


@pytest.mark.parametrize(
    "fault, cause",
    [
        ("403", "HTTPError 403: 'Forbidden'"),
        ("nothing", "RemoteDisconnected"),
        ("cut", "IncompleteRead"),
        ("damaged", "UnidentifiedImageError"),
        ("refused", "Connection refused"),
        ("full", "cannot be written: No space left on device"),
        ("no folder", "cannot be written: Not a directory"),
    ],
)
def test_a_failed_download_names_its_cause_and_ends_early(
    fault, cause, mirror, monkeypatch, capsys
):
    """And the run goes on with the stand-in."""
    mirror.faults[""] = [fault] if fault in ("403", "nothing", "cut", "damaged") else []
    if fault == "refused":
        mirror.server_close()
    if fault == "no folder":
        data.DATA.write_text("a file where the folder should be")
    if fault == "full":
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=error))
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    source, out = find(data.PHOTOS, None, "cpu", mirror), capsys.readouterr().out
    assert source.is_standin and len(data.photos(source, "test", 5)) == 5
    assert cause in out and len(out.splitlines()) == 3 and len(mirror.asked) <= 9
    assert not list(data.DATA.rglob("*.*"))


def test_two_programs_fetch_into_one_folder_at_once(mirror, monkeypatch):
    monkeypatch.setattr(data, "TOLERATED", 0)
    context, arguments = multiprocessing.get_context("fork"), (data.COCO, None, "cpu", mirror)
    programs = [context.Process(target=find, args=arguments) for _ in range(2)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    assert find(data.COCO).name == "data/" and len(list(data.DATA.rglob("*.*"))) == 40


@pytest.fixture
def batches(tmp_path, monkeypatch) -> tuple[Path, np.ndarray]:
    """CIFAR-10 as torchvision stores it, small, folder and archive, with checksums to fit."""
    images, parent = write_cifar(tmp_path / "as-images"), tmp_path / "as-batches"
    (parent / CIFAR10.base_folder).mkdir(parents=True)

    def write(name, content):
        path = parent / CIFAR10.base_folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    for r, attribute, name in ((0, "train_list", "data_batch_1"), (1, "test_list", "test_batch")):
        rows = images[r].reshape(6, 32, 32, 3).transpose(0, 3, 1, 2).reshape(6, 3072)
        content = {
            "data": rows[[0, *range(6)]],
            "labels": [7, 0, 0, 0, 1, 1, 1],
        }  # 7: a third class
        monkeypatch.setattr(CIFAR10, attribute, [write(name, content)])
    name, md5 = write("batches.meta", {"label_names": []})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    with tarfile.open(parent / CIFAR10.filename, "w:gz") as archive:
        archive.add(parent / CIFAR10.base_folder, CIFAR10.base_folder)
    content = (parent / CIFAR10.filename).read_bytes()
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(content).hexdigest())
    return parent, images


def test_cifar_comes_over_the_network_once(batches, mirror, capsys):
    mirror.files["~kriz/cifar-10-python.tar.gz"] = (batches[0] / CIFAR10.filename).read_bytes()
    mirror.faults[""] = ["damaged"]
    assert find(data.CIFAR10, None, "cpu", mirror).is_standin
    assert "wrong checksum" in capsys.readouterr().out and not data.DATA.exists()
    mirror.faults.clear()
    for name in ("download", "data/"):
        source = find(data.CIFAR10, None, "cpu", mirror)
        assert source.name == name and len(data.cifar10(source)["train"][0]) == 6
    assert len(mirror.asked) == 4 and len(os.listdir(data.DATA)) == 1


# --- layouts --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "train, test",
    [
        ("coco/train2017", "coco/val2017"),
        ("train2017", "val2017"),
        ("images/train2017", "images/val2017"),  # YOLO
        ("train/data", "validation/data"),  # FiftyOne
        ("some-set/coco/images/train", "some-set/coco/images/test"),  # Kaggle
    ],
)
def test_coco_is_known_by_its_names_wherever_it_lies(train, test, tmp_path):
    source = find(data.COCO, write_coco(tmp_path, train, test))
    for split, place in (("train2017", train), ("val2017", test)):
        coco, paths = data.coco(source, split)
        assert paths == {i: tmp_path / place / name(i) for i in IDS[split]}
        assert {coco.annToMask(annotation).shape for annotation in coco.anns.values()} == {(64, 80)}
    write_coco(tmp_path, "photos", photos=1)  # a photo that is there twice
    (tmp_path / "photos" / name(300)).write_bytes(jpeg(0))
    source = find(data.PHOTOS, tmp_path)
    for role, numbers in (("train", (*IDS["train2017"], 300)), ("test", IDS["val2017"])):
        paths = data.photos(source, role, 99)
        assert sorted(path.name for path in paths) == [name(i) for i in numbers]


def test_ade20k(tmp_path):
    base = tmp_path / "sets/ADEChallengeData2016/images"
    places = base / "training", base / "validation", tmp_path / "release_test/testing"
    for i, place in enumerate(places):
        place.mkdir(parents=True)
        (place / f"ADE_{i}.jpg").write_bytes(jpeg(i))
    source = find(data.PHOTOS, tmp_path)
    assert [path.name for path in data.photos(source, "train", 9)] == ["ADE_0.jpg", "ADE_1.jpg"]
    assert [path.name for path in data.photos(source, "test", 9)] == ["ADE_2.jpg"]
    assert find(data.COCO, tmp_path, "demo").is_standin  # another data set is no error


def test_annotations_of_ones_own_are_used_up_to_a_limit(tmp_path):
    write_coco(tmp_path, photos=4)
    (tmp_path / name(101)).write_bytes(jpeg(0))
    for split in IDS:
        content = annotations(split) | {"images": annotations(split)["images"][:8]}
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    source = find(data.COCO, tmp_path)
    assert list(data.coco(source, "train2017")[1]) == [1, 2, 3, 4]
    assert list(data.coco(source, "train2017", limit=3)[1]) == [1, 2, 3]
    with pytest.raises(ProjectError, match=f"1 of 8 photos of val2017 are in {tmp_path}"):
        data.coco(source, "val2017")
    (tmp_path / "instances_val2017.json").write_text("{")
    with pytest.raises(ProjectError, match="instances_val2017.json cannot be read .JSONDecodeErr"):
        data.coco(source, "val2017")


@pytest.mark.parametrize("dataset", [data.CIFAR10, data.COCO, data.PHOTOS])
@pytest.mark.parametrize("name", ["0.jpg", "Holiday/My Photos/a.PNG", "train2017.zip"])
def test_pictures_in_no_known_layout_end_the_run(dataset, name, tmp_path, mirror):
    (tmp_path / "own" / name).parent.mkdir(parents=True)
    (tmp_path / "own" / name).write_bytes(jpeg(0))
    message = rf"HW3_DATA holds 1 .*own/{name}, but not {dataset}.*data/README.md"
    with pytest.raises(ProjectError, match=message) as error:
        find(dataset, tmp_path / "own", mirror=mirror)
    assert "\n" not in str(error.value) and not mirror.asked


def test_part_of_the_sample(tmp_path):
    with pytest.raises(ProjectError, match="10 files have names that are read, 30 photos are miss"):
        find(data.COCO, write_coco(tmp_path / "few", photos=10))
    assert find(data.COCO, write_coco(tmp_path / "most", photos=34)).name == "HW3_DATA"


def test_folders_with_another_data_set_or_without_pictures_are_passed_over(tmp_path, capsys):
    write_cifar(tmp_path / "own" / "cifar10")
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "empty" / ".git" / "x.jpg").write_bytes(jpeg(0))
    for folder, text in (("own", "only another data set"), ("empty", "no pictures")):
        assert find(data.COCO, tmp_path / folder, "demo").is_standin
        assert f"HW3_DATA holds {text}" in capsys.readouterr().out


# --- CIFAR-10 -------------------------------------------------------------------------------------
def test_all_layouts_of_cifar_give_the_same_tensors(batches, tmp_path):
    parent, images = batches
    for name in (CIFAR10.base_folder, CIFAR10.filename):
        (tmp_path / name / "cifar10").mkdir(parents=True)
        shutil.move(parent / name, tmp_path / name / "cifar10" / name)
    for name in ("as-images", CIFAR10.base_folder, CIFAR10.filename):
        source = find(data.CIFAR10, tmp_path / name)
        for wanted, (pixels, labels) in zip(images, data.cifar10(source).values()):
            wanted = wanted.reshape(6, 32, 32, 3).transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(pixels, wanted)
            assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
            assert labels.tolist() == [0] * 3 + [1] * 3
        assert data.cifar10(source, limit=2)["test"][1].tolist() == [0, 0, 1, 1]
    assert len(os.listdir(tmp_path / CIFAR10.filename / "cifar10")) == 1  # unpacked elsewhere


def test_a_damaged_archive_or_batch_is_named(batches):
    parent, _ = batches
    source = find(data.CIFAR10, parent)
    (parent / CIFAR10.base_folder / "test_batch").write_bytes(b"no pickle")
    with pytest.raises(ProjectError, match="data_batch_1 cannot be read .*not found or corrupted"):
        data.cifar10(source)
    shutil.rmtree(parent / CIFAR10.base_folder)
    (parent / CIFAR10.filename).write_bytes(b"half of it")
    with pytest.raises(ProjectError, match="tar.gz cannot be read .*wrong checksum of 10 bytes"):
        data.cifar10(find(data.CIFAR10, parent))


def test_one_bad_picture_among_many_is_left_out_and_counted(tmp_path, capsys):
    write_cifar(tmp_path)
    place, source = tmp_path / "train" / "airplane", find(data.CIFAR10, tmp_path)
    (place / "0.png").write_bytes((place / "1.png").read_bytes()[:60])
    Image.new("RGB", (32, 31)).save(place / "1.png")
    assert data.cifar10(source)["train"][1].tolist() == [0, 1, 1, 1]
    assert "CIFAR-10, train: 2 files cannot be used, for instance:" in capsys.readouterr().out
    (place / "2.png").unlink()
    with pytest.raises(ProjectError, match="a class has no train image"):
        data.cifar10(source)


# --- photos and images ----------------------------------------------------------------------------
def test_photos_are_drawn_at_random_and_only_as_many_are_opened(tmp_path, monkeypatch, capsys):
    source = find(data.PHOTOS, write_coco(tmp_path, "train2017"))
    (tmp_path / "train2017" / name(3)).write_text("no photo")
    (tmp_path / "train2017" / name(4)).write_bytes(jpeg(0, 200, 63))
    assert len(data.photos(source, "train", 99)) == 22
    assert "photos, train: 2 files cannot be used" in capsys.readouterr().out
    monkeypatch.setattr(Image, "open", opened := Mock(side_effect=Image.open))
    few = data.photos(source, "test", 5)
    assert few == data.photos(source, "test", 5) == sorted(few) and opened.call_count == 10
    assert few != data.photos(source, "test", 99)[:5]
    monkeypatch.setattr(data, "LEAST_SIDE", 65)
    with pytest.raises(ProjectError, match="photos, test: no file can be used"):
        data.photos(source, "test", 5)


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 1), (8, 3)])
def test_photos_stand_upright(tmp_path, orientation, turns):
    upright = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(upright, turns))
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(data.read_image(tmp_path / "a.png"), upright)


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.arange(0, 65536, 257, np.uint16)[None]).save(tmp_path / "deep.png")
    image = np.asarray(data.read_image(tmp_path / "deep.png"))
    np.testing.assert_array_equal(image, np.arange(256)[None, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_parts_are_white_whatever_color_they_hide(tmp_path, mode):
    image = Image.fromarray(np.array([[90, 0]], np.uint8)).convert(mode)
    if mode[-1] == "A":
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        image.save(tmp_path / "a.png")
    else:
        image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    np.testing.assert_array_equal(data.read_image(tmp_path / "a.png"), [[[255] * 3, [0] * 3]])


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (5, 4)).save(tmp_path / "a.jpg")
    image = data.read_image(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", (5, 4)) and np.asarray(image).min() > 250


@pytest.mark.parametrize("content", [b"", b"no image", jpeg(0)[:900], None])
def test_what_is_no_image_is_named_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ProjectError, match=r"a\.jpg cannot be read .\w+") as error:
        data.read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


# --- splits ---------------------------------------------------------------------------------------
def test_groups_stay_whole_and_classes_keep_their_share():
    groups = np.random.default_rng(0).integers(0, 200, 2000)
    labels = (groups < 60).astype(int) + (groups == 199)  # of the last class there is one photo
    names = [f"{i}.jpg" for i in groups]
    train, val = data.split(names, 0.2, 3, labels)
    assert (
        sorted([*train.tolist(), *val.tolist()]) == list(range(2000)) and val.dtype == torch.int64
    )
    assert not set(groups[train]) & set(groups[val])
    counts = [len(set(groups[val][labels[val] == label])) for label in range(3)]
    assert counts == [28, 12, 0]
    assert torch.equal(val, data.split(names, 0.2, 3, labels)[1])
    assert not torch.equal(val, data.split(names, 0.2, 4, labels)[1])


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_no_part_of_a_split_is_empty(share):
    train, val = data.split(["a", "b", "b"], share, 0)
    assert len(train) + len(val) == 3 and len(train) and len(val)
    for too_few in ([], ["a", "a"]):
        with pytest.raises(ProjectError, match="cannot be split in two"):
            data.split(too_few, share, 0)


# --- the real images ------------------------------------------------------------------------------
def test_the_real_images(real_data, monkeypatch, tmp_path):
    monkeypatch.undo()
    for split in IDS:
        (tmp_path / split).symlink_to(real_data / "coco" / split)
    for split in IDS:  # without annotations beside the photos, those of this project are used
        coco, paths = data.coco(find(data.COCO, tmp_path), split)
        official, _ = data.coco(find(data.COCO, real_data), split)
        assert coco.anns.keys() == official.anns.keys()
        for i in list(coco.anns)[::7]:
            mask, wanted = coco.annToMask(coco.anns[i]), official.annToMask(official.anns[i])
            assert mask.shape == Image.open(paths[coco.anns[i]["image_id"]]).size[::-1]
            assert (mask != wanted).sum() <= 0.01 * wanted.sum() + 2
    source = find(data.PHOTOS, real_data)
    names = [{path.name for path in data.photos(source, role, None)} for role in ("train", "test")]
    assert [len(n) for n in names] == [343 + 198, 206] and not names[0] & names[1]
    tensors = data.cifar10(find(data.CIFAR10, real_data), limit=100)
    assert tensors["test"][0].shape == (200, 3, 32, 32)
