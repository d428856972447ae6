"""Reading CIFAR-10 in all its layouts."""

import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from src import data, datasets, download
from src.data import DataError, Source
from src.datasets import cifar10

STANDIN = Source("CIFAR-10", "stand-in")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write_class_folders(folder: Path, n: int = 3, suffix: str = "png") -> np.ndarray:
    """Random images of both classes and splits; returns them as (split, class, n, 32, 32, 3)."""
    images = np.random.default_rng(0).integers(0, 256, (2, 2, n, 32, 32, 3), dtype=np.uint8)
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("airplane", "automobile")):
            target = folder / "cifar10" / split / name
            target.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(images[s, c, i]).save(target / f"{i:04d}.{suffix}")
    return images


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """torchvision's folder and archive, small, with checksums to fit: (their parent, images)."""
    images = write_class_folders(tmp_path / "as-images")
    parent = tmp_path / "as-batches"
    folder = parent / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes())]

    def batch(split: int, index: slice) -> dict:
        """The classes interleaved with an image of a third one, as (n, 3072) rows."""
        chosen = images[split][:, index]
        rows = [chosen[c, i] for i in range(chosen.shape[1]) for c in (1, 0, 0)]
        labels = [label for _ in range(chosen.shape[1]) for label in (1, 0, 7)]
        return {
            "data": np.stack(rows).transpose(0, 3, 1, 2).reshape(len(rows), -1),
            "labels": labels,
        }

    monkeypatch.setattr(
        CIFAR10,
        "train_list",
        [
            write("data_batch_1", batch(0, slice(0, 2))),
            write("data_batch_2", batch(0, slice(2, 3))),
        ],
    )
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(1, slice(0, 3)))])
    meta = write("batches.meta", {"label_names": list(cifar10.CLASSES)})
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    with tarfile.open(parent / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((parent / CIFAR10.filename).read_bytes()))
    return parent, images


# --- download ------------------------------------------------------------------------------------
@pytest.fixture
def archive(mirror, batches, monkeypatch, tmp_path) -> str:
    """The official archive on a mirror; returns its path there."""
    monkeypatch.setattr(data, "DATA", tmp_path / "project-data")
    monkeypatch.setattr(download, "WAITS", (0, 0))
    mirror.files["~kriz/cifar-10-python.tar.gz"] = batches[0] / CIFAR10.filename
    return "~kriz/cifar-10-python.tar.gz"


def test_download_where_nothing_is_at_hand(mirror, archive):
    found = data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url)
    assert (found.name, found.path) == ("download", data.DATA)
    assert [path.name for path in data.DATA.iterdir()] == [CIFAR10.filename]
    assert len(datasets.load_cifar10(found).train_images) == 6
    asked = len(mirror.asked)
    found = data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url)
    assert found.name == "data/" and len(mirror.asked) == asked


def test_broken_download_falls_back_to_the_standin_and_keeps_the_part(mirror, archive, capsys):
    mirror.faults[""] = ["cut", "no ranges"]
    assert data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url).is_standin
    out = capsys.readouterr().out
    assert "the part that arrived is kept" in out and "STAND-IN" in out
    assert [path.name for path in data.DATA.iterdir()] == [f"{CIFAR10.filename}.part"]


@pytest.mark.parametrize("fault", ["403", "page"])
def test_a_refusal_or_a_log_in_page_leads_to_the_standin(mirror, archive, fault):
    mirror.faults[""] = [fault]
    assert data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url + "/").is_standin
    assert not list(data.DATA.iterdir())


def test_another_file_in_its_place_ends_with_one_line(mirror, archive):
    mirror.faults[""] = ["disguised page"]
    with pytest.raises(DataError, match="wrong checksum .* and was removed: run again"):
        data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url)


def test_data_folder_that_is_a_file(mirror, archive):
    data.DATA.write_text("mine")
    with pytest.raises(DataError, match="cannot write"):
        data.find_source(datasets.CIFAR10, "cpu", mirror=mirror.url)
    assert data.DATA.read_text() == "mine"


# --- reading -------------------------------------------------------------------------------------
def test_all_layouts_give_the_same_tensors(batches, tmp_path):
    parent, images = batches
    for name, move in (("only-folder", CIFAR10.base_folder), ("only-archive", CIFAR10.filename)):
        (tmp_path / name / "cifar10").mkdir(parents=True)
        os.rename(parent / move, tmp_path / name / "cifar10" / move)
    for name in ("as-images", "only-folder", "only-archive"):
        loaded = datasets.load_cifar10(Source("CIFAR-10", "HW3_DATA", tmp_path / name))
        for s, (tensor, labels) in enumerate(
            ((loaded.train_images, loaded.train_labels), (loaded.test_images, loaded.test_labels))
        ):
            expected = torch.from_numpy(images[s].reshape(6, 32, 32, 3)).permute(0, 3, 1, 2)
            assert tensor.dtype == torch.uint8 and torch.equal(tensor, expected)
            assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in (tmp_path / "only-archive" / "cifar10").iterdir()] == [
        CIFAR10.filename
    ]


@pytest.mark.parametrize("kind", ["as-images", "as-batches", "stand-in"])
def test_labels_are_positions_in_classes_and_limit_takes_the_first(batches, tmp_path, kind):
    source = STANDIN if kind == "stand-in" else Source("CIFAR-10", "data/", tmp_path / kind)
    usual = datasets.load_cifar10(source, limit=3)
    turned = datasets.load_cifar10(source, ("automobile", "airplane"), limit=2)
    assert turned.train_labels.tolist() == turned.test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(turned.train_images, usual.train_images[[3, 4, 0, 1]])
    assert (
        turned.classes == ("automobile", "airplane") and turned.source.counts == "4 train, 4 test"
    )


def test_standin_train_and_test_differ():
    loaded = datasets.load_cifar10(STANDIN, limit=4)
    assert loaded.source.is_standin
    assert loaded.train_images.shape == loaded.test_images.shape == (8, 3, 32, 32)
    assert not torch.equal(loaded.train_images, loaded.test_images)


def spoil_jpeg(folder: Path) -> None:
    path = folder / "cifar10/train/automobile/0001.jpg"
    path.write_bytes(path.read_bytes()[:200])


def spoil_not_an_image(folder: Path) -> None:
    (folder / "cifar10/train/automobile/0001.jpg").write_text("no image")


def spoil_size(folder: Path) -> None:
    Image.new("RGB", (32, 31)).save(folder / "cifar10/test/airplane/0002.jpg")


def spoil_empty(folder: Path) -> None:
    for path in (folder / "cifar10/test/automobile").iterdir():
        path.unlink()
    (folder / "cifar10/test/automobile/Thumbs.db").write_text("")


def spoil_missing(folder: Path) -> None:
    shutil.rmtree(folder / "cifar10/train/airplane")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            spoil_jpeg,
            r"cannot read the image .*train/automobile/0001\.jpg .*: replace or remove it",
        ),
        (
            spoil_not_an_image,
            r"cannot read the image .*train/automobile/0001\.jpg .*: replace or remove it",
        ),
        (spoil_size, r"test/airplane/0002\.jpg is 32x31 pixels, CIFAR-10 has 32x32"),
        (spoil_empty, r"the folder .*test/automobile holds no JPEG or PNG image: fill it"),
        (spoil_missing, r"the folder .*train/airplane is missing: fill it"),
    ],
)
def test_damaged_class_folders(tmp_path, spoil, message):
    write_class_folders(tmp_path, suffix="jpg")
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_cifar10(Source("CIFAR-10", "HW3_DATA", tmp_path))
    assert "\n" not in str(caught.value)


def test_hidden_files_are_not_images(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "cifar10/train/airplane/._0000.png").write_text("resource fork")
    assert len(datasets.load_cifar10(Source("CIFAR-10", "data/", tmp_path)).train_images) == 6


def test_files_and_folders_beside_the_images_do_not_matter(tmp_path, batches):
    write_class_folders(tmp_path / "user")
    for name in ("train/airplane/Thumbs.db", "train/airplane/notes.txt", "train/list.csv"):
        (tmp_path / "user/cifar10" / name).write_text("a stray file")
    for name in ("train/airplane/more", "train/unknown", "val", "train/.ipynb_checkpoints"):
        (tmp_path / "user/cifar10" / name).mkdir()
    (batches[0] / CIFAR10.base_folder / "readme.html").write_text("a stray file")
    for folder in (tmp_path / "user", batches[0]):
        loaded = datasets.load_cifar10(Source("CIFAR-10", "HW3_DATA", folder))
        assert loaded.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_unknown_class(tmp_path):
    write_class_folders(tmp_path)
    with pytest.raises(
        DataError,
        match="no class plane in CIFAR-10: real images from data/: choose from airplane, auto",
    ):
        datasets.load_cifar10(Source("CIFAR-10", "data/", tmp_path), ("plane", "automobile"))
    with pytest.raises(
        DataError, match="no class cat .*STAND-IN.*: choose from airplane, automobile$"
    ):
        datasets.load_cifar10(STANDIN, ("airplane", "cat"))


def test_half_an_archive_and_a_damaged_batch(batches):
    parent, _ = batches
    source = Source("CIFAR-10", "data/", parent)
    batch = parent / CIFAR10.base_folder / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch is missing or damaged \(MD5.*: replace it"):
        datasets.load_cifar10(source)
    batch.unlink()
    with pytest.raises(DataError, match="test_batch is missing or damaged"):
        datasets.load_cifar10(source)
    shutil.rmtree(batch.parent)
    archive = parent / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(
        DataError,
        match=rf"{CIFAR10.filename} is incomplete or damaged \(MD5.*: replace it by a fresh http",
    ):
        datasets.load_cifar10(source)
    assert archive.stat().st_size == 1000 and list(parent.iterdir()) == [archive]


def test_real_cifar10(real_data):
    loaded = datasets.load_cifar10(Source("CIFAR-10", "HW3_DATA", real_data))
    assert (
        loaded.source.describe() == "CIFAR-10: real images from HW3_DATA (10000 train, 2000 test)"
    )
    assert loaded.train_images.shape == (10000, 3, 32, 32)
    assert loaded.test_images.shape == (2000, 3, 32, 32)
    assert loaded.train_labels.bincount().tolist() == [5000, 5000]
    assert loaded.test_labels.bincount().tolist() == [1000, 1000]
