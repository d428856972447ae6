"""Sources, downloads, splits, and the notebooks' own readers, with every kind of bad input."""

import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from src import data
from src.data import DataError, DownloadError, Source
from tools.notebooks import definitions

transfer, deformable, change = map(
    definitions, ("transfer_learning", "deformable_convolution", "detect_change")
)
SETS = {
    "cifar10": (transfer, "CIFAR10_SET"),
    "coco": (deformable, "COCO_SET"),
    "photos": (change, "PHOTO_SET"),
}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/file"


def find(dataset: str, **options) -> Source:
    return data.find_source(getattr(*SETS[dataset]), **options)


def serve(monkeypatch, dataset: str, *urls: str) -> None:
    """Another place takes the part of the official source."""
    monkeypatch.setattr(*SETS[dataset], replace(getattr(*SETS[dataset]), urls=urls))


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Downloads go to a scratch folder and no URL leaves the machine."""
    monkeypatch.setattr(data, "DATA", tmp_path / "project-data")
    for dataset in SETS:
        serve(monkeypatch, dataset, closed_port())
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; of each of the first `drops` GET answers only half arrives. `ranges` lists what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.drops, self.resumes, self.ranges = {}, 0, True, []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked[len("bytes=") : -1]) if asked and self.server.resumes else 0
        if content is None or start >= len(content):
            self.send_error(404 if content is None else 416)
            return
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.server.drops > 0:
            self.server.drops -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


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
    """torchvision's folder and archive with few images, and its checksums changed to fit. Returns (parent, images)."""
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
    meta = write("batches.meta", {"label_names": list(transfer.CIFAR10_CLASSES)})
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    with tarfile.open(parent / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((parent / CIFAR10.filename).read_bytes()))
    return parent, images


# --- sources --------------------------------------------------------------------------------------------------------
def test_order_of_sources(monkeypatch, tmp_path, server, batches, capsys):
    server.files["cifar"] = (batches[0] / CIFAR10.filename).read_bytes()
    serve(monkeypatch, "cifar10", server.url("cifar"))
    found = find("cifar10", allow_download=False)
    assert found.name == "stand-in" and found.is_standin
    found = find("cifar10")
    assert (found.name, found.path) == ("download", data.DATA)
    assert sorted(path.name for path in data.DATA.iterdir()) == [CIFAR10.filename]
    assert len(transfer.load_cifar10(source=found).train_images) == 6
    assert find("cifar10").name == "data/"
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HW3_DATA", str(tmp_path / "empty"))
    capsys.readouterr()
    assert find("cifar10").name == "data/"
    assert capsys.readouterr().out.splitlines() == [
        "CIFAR-10: HW3_DATA holds none",
        "CIFAR-10: real images from data/",
    ]
    monkeypatch.setenv("HW3_DATA", str(tmp_path / "as-images"))
    found = find("cifar10")
    assert (found.name, found.path) == ("HW3_DATA", tmp_path / "as-images")
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    assert find("cifar10").is_standin
    assert "smoke profile always takes the stand-in" in capsys.readouterr().out


def test_hw3_data_relative_to_working_directory_then_project(monkeypatch, tmp_path):
    for base in ("here", "project"):
        write_class_folders(tmp_path / base / "sub", n=1)
    monkeypatch.setattr(data, "ROOT", tmp_path / "project")
    monkeypatch.setenv("HW3_DATA", "sub")
    monkeypatch.chdir(tmp_path / "here")
    assert find("cifar10").path == tmp_path / "here" / "sub"
    monkeypatch.chdir(tmp_path)
    assert find("cifar10").path == tmp_path / "project" / "sub"


def test_hw3_data_that_is_no_folder(monkeypatch):
    monkeypatch.setenv("HW3_DATA", "no/such/folder")
    with pytest.raises(DataError, match="HW3_DATA=no/such/folder is not a folder: correct it"):
        find("cifar10")


@pytest.mark.parametrize("dataset", ["cifar10", "coco", "photos"])
def test_without_network_the_standin_is_taken_and_said_loudly(dataset, capsys):
    source = find(dataset)
    out = capsys.readouterr().out
    assert source.is_standin and "STAND-IN" in out and "say nothing about the real data" in out
    assert "cannot be reached" in out
    assert str(Path.home()) not in out and str(data.DATA) not in out
    assert not data.DATA.exists()


def test_demo_profile_downloads_nothing(monkeypatch, capsys):
    monkeypatch.setenv("HW3_PROFILE", "demo")
    monkeypatch.setattr(data, "_check_reachable", lambda url: pytest.fail("asked the network"))
    assert find("coco").is_standin
    assert "nothing is downloaded for it in the demo profile" in capsys.readouterr().out


def test_describe_and_repr_show_counts_but_no_folder(tmp_path):
    write_class_folders(tmp_path)
    loaded = transfer.load_cifar10(source=Source("CIFAR-10", "HW3_DATA", tmp_path))
    assert loaded.source.describe() == "CIFAR-10: real images from HW3_DATA (6 train, 6 test)"
    assert str(tmp_path) not in repr(loaded.source)


# --- downloads ------------------------------------------------------------------------------------------------------
CONTENT = np.random.default_rng(1).bytes(700_000)


def test_download_goes_on_after_lost_connections(server, tmp_path):
    server.files["big"], server.drops = CONTENT, 2
    data.download(server.url("big"), tmp_path / "d" / "big", md5(CONTENT))
    assert (tmp_path / "d" / "big").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["big"]
    assert server.ranges == [None, "bytes=350000-", "bytes=525000-"]


def test_failed_download_keeps_the_part_and_the_next_run_resumes(server, tmp_path):
    server.files["big"], server.drops, target = CONTENT, 1, tmp_path / "big"
    with pytest.raises(
        DownloadError, match="connection lost after 350000 of 700000 bytes.*run again to go on"
    ):
        data.download(server.url("big"), target, attempts=1)
    assert not target.exists() and (tmp_path / "big.part").read_bytes() == CONTENT[:350000]
    data.download(server.url("big"), target, md5(CONTENT))
    assert target.read_bytes() == CONTENT and server.ranges[-1] == "bytes=350000-"


def test_server_without_resume_and_part_that_is_too_long(server, tmp_path):
    server.files["big"], target = CONTENT, tmp_path / "big"
    (tmp_path / "big.part").write_bytes(CONTENT + b"more")
    data.download(server.url("big"), target, md5(CONTENT))  # 416, then from the start
    server.resumes = False
    (tmp_path / "big.part").write_bytes(b"other")
    data.download(server.url("big"), target, md5(CONTENT))
    assert target.read_bytes() == CONTENT


def test_wrong_checksum_leaves_no_file_and_keeps_the_old_one(server, tmp_path):
    server.files["big"] = CONTENT
    (tmp_path / "old").write_text("mine")
    for name in ("new", "old"):
        with pytest.raises(DataError, match="wrong checksum .* and was removed: run again"):
            data.download(server.url("big"), tmp_path / name, md5(b"else"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["old"]
    assert (tmp_path / "old").read_text() == "mine"


def test_broken_download_falls_back_to_the_standin(server, monkeypatch, capsys):
    server.files["cifar"], server.drops = CONTENT, 99
    serve(monkeypatch, "cifar10", server.url("cifar"))
    assert find("cifar10").is_standin
    out = capsys.readouterr().out
    assert "the part that arrived is kept" in out and "STAND-IN" in out
    assert [path.name for path in data.DATA.iterdir()] == [f"{CIFAR10.filename}.part"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(server, tmp_path):
    server.files["big"] = CONTENT
    (tmp_path / "big.part").symlink_to("/dev/full")
    with pytest.raises(
        DataError, match="cannot write .*No space left.*: free space .*HW3_DATA.*HW3_PROFILE=demo"
    ):
        data.download(server.url("big"), tmp_path / "big")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("big")]


def test_disk_that_is_too_small_is_noticed_before_writing(server, tmp_path, monkeypatch):
    server.files["big"] = CONTENT * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match="2 MB more are needed"):
        data.download(server.url("big"), tmp_path / "big")
    assert not (tmp_path / "big.part").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_data_folder(server, monkeypatch, number):
    server.files["cifar"] = CONTENT
    serve(monkeypatch, "cifar10", server.url("cifar"))

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match="cannot write .*make the folder writable, point HW3_DATA"):
        find("cifar10")


def test_data_folder_that_is_a_file(server, monkeypatch, tmp_path):
    server.files["cifar"] = CONTENT
    serve(monkeypatch, "cifar10", server.url("cifar"))
    data.DATA.write_text("mine")
    with pytest.raises(DataError, match="cannot write"):
        find("cifar10")
    assert data.DATA.read_text() == "mine"


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------
def test_all_layouts_give_the_same_tensors(batches, tmp_path):
    parent, images = batches
    for name, move in (("only-folder", CIFAR10.base_folder), ("only-archive", CIFAR10.filename)):
        (tmp_path / name / "cifar10").mkdir(parents=True)
        os.rename(parent / move, tmp_path / name / "cifar10" / move)
    for name in ("as-images", "only-folder", "only-archive"):
        loaded = transfer.load_cifar10(source=Source("CIFAR-10", "HW3_DATA", tmp_path / name))
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
    source = (
        Source("CIFAR-10", "stand-in")
        if kind == "stand-in"
        else Source("CIFAR-10", "data/", tmp_path / kind)
    )
    usual = transfer.load_cifar10(source=source, limit=3)
    turned = transfer.load_cifar10(("automobile", "airplane"), source, limit=2)
    assert turned.train_labels.tolist() == turned.test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(turned.train_images, usual.train_images[[3, 4, 0, 1]])
    assert (
        turned.classes == ("automobile", "airplane") and turned.source.counts == "4 train, 4 test"
    )


def test_standin_train_and_test_differ(monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    loaded = transfer.load_cifar10(limit=4)
    assert loaded.source.is_standin and loaded.train_images.shape == loaded.test_images.shape == (
        8,
        3,
        32,
        32,
    )
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
        transfer.load_cifar10(source=Source("CIFAR-10", "HW3_DATA", tmp_path))
    assert "\n" not in str(caught.value)


def test_hidden_files_are_not_images(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "cifar10/train/airplane/._0000.png").write_text("resource fork")
    assert (
        len(transfer.load_cifar10(source=Source("CIFAR-10", "data/", tmp_path)).train_images) == 6
    )


def test_unknown_class(tmp_path):
    write_class_folders(tmp_path)
    with pytest.raises(
        DataError,
        match="no class plane in CIFAR-10: real images from data/: choose from airplane, auto",
    ):
        transfer.load_cifar10(("plane", "automobile"), Source("CIFAR-10", "data/", tmp_path))
    with pytest.raises(
        DataError, match="no class cat .*STAND-IN.*: choose from airplane, automobile$"
    ):
        transfer.load_cifar10(("airplane", "cat"), Source("CIFAR-10", "stand-in"))


def test_half_an_archive_and_a_damaged_batch(batches):
    parent, _ = batches
    source = Source("CIFAR-10", "data/", parent)
    batch = parent / CIFAR10.base_folder / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch is missing or damaged \(MD5.*: replace it"):
        transfer.load_cifar10(source=source)
    batch.unlink()
    with pytest.raises(DataError, match="test_batch is missing or damaged"):
        transfer.load_cifar10(source=source)
    shutil.rmtree(batch.parent)
    archive = parent / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(
        DataError,
        match=rf"{CIFAR10.filename} is incomplete or damaged \(MD5.*: replace it by a fresh http",
    ):
        transfer.load_cifar10(source=source)
    assert archive.stat().st_size == 1000 and list(parent.iterdir()) == [archive]


def test_real_cifar10(real_data):
    loaded = transfer.load_cifar10(source=Source("CIFAR-10", "HW3_DATA", real_data))
    assert (
        loaded.source.describe() == "CIFAR-10: real images from HW3_DATA (10000 train, 2000 test)"
    )
    assert loaded.train_images.shape == (10000, 3, 32, 32) and loaded.test_images.shape == (
        2000,
        3,
        32,
        32,
    )
    assert loaded.train_labels.bincount().tolist() == [5000, 5000]
    assert loaded.test_labels.bincount().tolist() == [1000, 1000]


# --- splits ---------------------------------------------------------------------------------------------------------
def test_split_is_disjoint_stratified_and_deterministic():
    labels = torch.tensor([0] * 70 + [1] * 30)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    train, val = data.train_val_split(labels, 0.2, seed=3)
    assert sorted(train.tolist() + val.tolist()) == list(range(100))
    assert labels[val].bincount().tolist() == [14, 6]
    again = data.train_val_split(labels, 0.2, seed=3)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1]) and val.dtype == torch.int64
    assert not torch.equal(val, data.train_val_split(labels, 0.2, seed=4)[1])
    assert train.tolist() == sorted(train.tolist()) and val.tolist() == sorted(val.tolist())


@pytest.mark.parametrize("make", [lambda i: int(i), lambda i: f"photo-{i}.jpg"])
def test_groups_stay_together(make):
    groups = [make(i) for i in np.random.default_rng(0).integers(0, 20, 200)]
    train, val = data.split_groups(groups, 0.25, seed=1)
    assert sorted(train.tolist() + val.tolist()) == list(range(200))
    assert not {groups[i] for i in train} & {groups[i] for i in val}
    assert len({groups[i] for i in val}) == 5
    assert torch.equal(val, data.split_groups(groups, 0.25, seed=1)[1])
    assert not torch.equal(val, data.split_groups(groups, 0.25, seed=2)[1])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_split_needs_a_proper_share(fraction):
    with pytest.raises(DataError, match="cannot set a validation share"):
        data.train_val_split([0] * 10, fraction, seed=0)


def test_split_needs_two_of_each_class():
    with pytest.raises(DataError, match="from 1 items"):
        data.train_val_split([0, 0, 0, 1], 0.5, seed=0)


# --- COCO -----------------------------------------------------------------------------------------------------------
def coco_document(url: str = "http://unused/1.jpg") -> dict:
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 8, "coco_url": url}],
        "categories": [{"id": 3, "name": "car", "supercategory": "vehicle"}],
        "annotations": [
            {
                "id": 7,
                "image_id": 1,
                "category_id": 3,
                "segmentation": [[0, 0, 4, 0, 4, 4]],
                "bbox": [0, 0, 4, 4],
                "area": 8,
                "iscrowd": 0,
            }
        ],
    }


def write_coco(folder: Path, document, split: str = "val2017") -> Source:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "annotations" / f"instances_{split}.json").write_text(text)
    return Source("MS COCO", "HW3_DATA", folder)


@pytest.mark.parametrize("sub", ["coco", "."])
def test_coco_layouts(tmp_path, monkeypatch, capsys, sub):
    write_coco(tmp_path / sub, coco_document())
    (tmp_path / sub / "val2017").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / sub / "val2017" / "1.jpg")
    monkeypatch.setenv("HW3_DATA", str(tmp_path))
    coco, image_path = deformable.load_coco("val2017")
    assert capsys.readouterr().out == "MS COCO: real images from HW3_DATA\n"
    assert image_path(coco.imgs[1]) == tmp_path / sub / "val2017" / "1.jpg"
    with pytest.raises(DataError, match="cannot read the annotations .*instances_train2017.json"):
        deformable.load_coco("train2017")


def test_coco_image_that_is_missing(tmp_path):
    coco, image_path = deformable.load_coco("val2017", write_coco(tmp_path, coco_document()))
    with pytest.raises(
        DataError,
        match=r"the image .*val2017/1\.jpg named in instances_val2017\.json is missing: add it",
    ):
        image_path(coco.imgs[1])


@pytest.mark.parametrize(
    "document, message",
    [
        ('{"images": [', "cannot read the annotations .*instances_val2017.json"),
        ("[1, 2]", 'instances_val2017.json has no list "images"'),
        (
            {**coco_document(), "annotations": {}},
            'instances_val2017.json has no list "annotations"',
        ),
        (
            {**coco_document(), "categories": [{"id": 1, "supercategory": "a"}]},
            'entry 0 of "categories" has no "name"',
        ),
        (
            {**coco_document(), "annotations": [{**coco_document()["annotations"][0]}, {"id": 8}]},
            'instances_val2017.json: entry 1 of "annotations" has no "area"',
        ),
    ],
)
def test_coco_bad_annotations(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        deformable.load_coco("val2017", write_coco(tmp_path, document))


def coco_archive(document: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("captions_val2017", "instances_train2017", "instances_val2017"):
            archive.writestr(f"annotations/{name}.json", json.dumps(document))
    return buffer.getvalue()


def test_coco_download_takes_two_files_and_each_image_once(server, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    server.files = {
        "1.jpg": buffer.getvalue(),
        "all.zip": coco_archive(coco_document(server.url("1.jpg"))),
    }
    serve(monkeypatch, "coco", server.url("all.zip"))
    coco, image_path = deformable.load_coco("train2017")
    folder = data.DATA / "coco"
    assert sorted(path.name for path in (folder / "annotations").iterdir()) == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    asked = len(server.ranges)
    for _ in range(2):
        assert data.read_image(image_path(coco.imgs[1])).size == (8, 8)
    assert len(server.ranges) == asked + 1 and [
        path.name for path in (folder / "train2017").iterdir()
    ] == ["1.jpg"]
    assert find("coco").name == "data/"
    server.files.clear()
    coco, image_path = deformable.load_coco("val2017", find("coco"))
    with pytest.raises(DownloadError, match="download of .*1.jpg failed"):
        image_path(coco.imgs[1])


def test_coco_archive_that_arrives_damaged(server, monkeypatch):
    content = bytearray(coco_archive(coco_document()))
    place = content.index(b"instances_val2017.json") + 40
    content[place] ^= 0xFF
    server.files["all.zip"] = bytes(content)
    serve(monkeypatch, "coco", server.url("all.zip"))
    with pytest.raises(DataError, match="all.zip arrived damaged .* and was removed: run again"):
        find("coco")
    assert not [path for path in data.DATA.rglob("*") if path.is_file()]


def photo_archive(*names: str) -> bytes:
    buffer, photo = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 30)).save(photo, "JPEG")
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, photo.getvalue())
    return buffer.getvalue()


def test_ade20k_download_takes_the_photos_of_both_archives(server, monkeypatch):
    server.files = {
        "ADEChallengeData2016.zip": photo_archive(
            *(
                f"ADEChallengeData2016/{name}"
                for name in (
                    "images/training/b.jpg",
                    "images/training/a.jpg",
                    "images/validation/c.jpg",
                    "annotations/training/a.png",
                )
            )
        ),
        "release_test.zip": photo_archive("release_test/testing/d.jpg", "release_test/list.txt"),
    }
    serve(monkeypatch, "photos", *map(server.url, server.files))
    found = find("photos")
    assert (found.name, found.path) == ("download", data.DATA)
    names = {
        role: [path.relative_to(data.DATA).as_posix() for path in change.list_photos(role, found)]
        for role in ("train", "test")
    }
    assert names == {
        "train": [
            f"ADEChallengeData2016/images/{name}.jpg"
            for name in ("training/a", "training/b", "validation/c")
        ],
        "test": ["release_test/testing/d.jpg"],
    }
    assert len([path for path in data.DATA.rglob("*") if path.is_file()]) == 4, (
        "nothing but the photos"
    )
    server.files.clear()
    assert find("photos").name == "data/"


def test_ade20k_whose_second_archive_fails_is_continued_without_the_first(
    server, monkeypatch, capsys
):
    server.files = {
        "ADEChallengeData2016.zip": photo_archive("ADEChallengeData2016/images/training/a.jpg")
    }
    serve(
        monkeypatch,
        "photos",
        server.url("ADEChallengeData2016.zip"),
        server.url("release_test.zip"),
    )
    assert find("photos").is_standin and "release_test.zip failed" in capsys.readouterr().out
    server.files = {"release_test.zip": photo_archive("release_test/testing/d.jpg")}
    asked = len(server.ranges)
    assert find("photos").name == "download" and len(server.ranges) == asked + 1


def test_an_archive_never_unpacks_outside_its_folder(server, tmp_path):
    server.files["evil.zip"] = photo_archive("../../outside.jpg", "/absolute.jpg")
    data.download_zip(server.url("evil.zip"), tmp_path / "deep" / "folder", lambda name: True)
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*.jpg")} == {
        ("deep", "folder")
    }


def test_an_unpacking_that_is_interrupted_keeps_the_archive_and_nothing_half_done(
    server, tmp_path, monkeypatch
):
    server.files["photos.zip"] = photo_archive("a/1.jpg", "a/2.jpg")

    def interrupt(bundle, name, folder, extract=zipfile.ZipFile.extract):
        if name == "a/2.jpg":
            raise KeyboardInterrupt
        extract(bundle, name, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extract", interrupt)
        data.download_zip(server.url("photos.zip"), tmp_path / "p", lambda name: True)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["photos.zip"]
    server.files.clear()
    data.download_zip(server.url("photos.zip"), tmp_path / "p", lambda name: True)
    assert sorted(path.name for path in (tmp_path / "p").rglob("*")) == ["1.jpg", "2.jpg", "a"]


def test_coco_and_photos_standin_are_drawn_once(monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    calls = []
    monkeypatch.setattr(
        data.standin,
        "write_coco",
        lambda folder, **sizes: (
            calls.append(sizes),
            write_coco(folder, coco_document(), "train2017"),
            write_coco(folder, coco_document()),
        ),
    )
    for split in ("train2017", "val2017", "train2017"):
        coco, _ = deformable.load_coco(split)
        assert len(coco.imgs) == 1
    assert len(calls) == 1
    assert [path.name for path in (data.DATA / f"standin-{data.standin.VERSION}").iterdir()] == [
        "coco"
    ]


def test_standin_where_data_cannot_be_written(monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    data.DATA.write_text("a file where the folder should be")
    monkeypatch.setattr(
        data.standin,
        "write_photos",
        lambda folder, n, side, seed: (
            folder.mkdir(parents=True),
            Image.new("RGB", (side, side)).save(folder / f"{seed}.jpg"),
        ),
    )
    photos = change.list_photos("test")
    assert [path.name for path in photos] == ["1.jpg"] and data.DATA not in photos[0].parents
    assert change.list_photos("test") == photos


def test_real_coco(real_data):
    source = Source("MS COCO", "HW3_DATA", real_data)
    for split in ("train2017", "val2017"):
        coco, image_path = deformable.load_coco(split, source)
        info = next(iter(coco.imgs.values()))
        assert data.read_image(image_path(info)).size == (info["width"], info["height"])


# --- photos ---------------------------------------------------------------------------------------------------------
def write_photo(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def test_photos_layouts_and_order(tmp_path, monkeypatch):
    monkeypatch.setenv("HW3_DATA", str(tmp_path))
    train = [
        write_photo(tmp_path / name)
        for name in ("coco/train2017/b.jpg", "coco/train2017/c.png", "photos/a.JPG")
    ]
    assert find("photos", allow_download=False).is_standin  # nothing to test on
    test = [write_photo(tmp_path / "coco/val2017/a.jpg")]
    assert change.list_photos("train") == train and change.list_photos("test") == test
    ade = [
        write_photo(tmp_path / f"ADEChallengeData2016/images/{name}/a.jpg")
        for name in ("training", "validation")
    ]
    assert change.list_photos("train") == train
    held_out = write_photo(tmp_path / "release_test/testing/a.jpg")
    assert change.list_photos("train") == ade and change.list_photos("test") == [held_out]


def test_photos_too_small_empty_or_unreadable(tmp_path, capsys):
    source = Source("Photos", "data/", tmp_path)
    large = write_photo(tmp_path / "coco/val2017/a.jpg", 90, 80)
    small = write_photo(tmp_path / "coco/val2017/b.jpg", 90, 79)
    assert change.list_photos("test", source, minimum_side=80) == [large]
    assert "left out 1 of 2 for test, below 80 pixels" in capsys.readouterr().out
    with pytest.raises(DataError, match="no test photo with a shorter side of 81 pixels or more"):
        change.list_photos("test", source, minimum_side=81)
    (tmp_path / "coco/train2017").mkdir()
    with pytest.raises(DataError, match="train2017 holds no JPEG or PNG image"):
        change.list_photos("train", source)
    small.write_text("no image")
    with pytest.raises(DataError, match="cannot read the image .*b.jpg"):
        change.list_photos("test", source)


def test_read_image_is_rgb_and_names_a_missing_file(tmp_path):
    Image.new("RGBA", (5, 4)).save(tmp_path / "alpha.png")
    image = data.read_image(tmp_path / "alpha.png")
    assert (image.mode, image.size) == ("RGB", (5, 4))
    with pytest.raises(DataError, match="nowhere.png"):
        data.read_image(tmp_path / "nowhere.png")
