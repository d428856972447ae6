"""Finding a data set, reading image files, and splitting samples."""

import errno
import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import data, datasets, objects, views
from src.data import DataError, Source

SETS = {"cifar10": datasets.CIFAR10, "coco": datasets.COCO, "photos": datasets.PHOTOS}


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def find(dataset: str, profile: str | None = "cpu", folder: Path | None = None) -> Source:
    """`find_source` where nothing answers."""
    return data.find_source(SETS[dataset], profile, folder, mirror=closed_port())


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Downloads go to a scratch folder, straight to the servers of the tests."""
    monkeypatch.setattr(data, "DATA", tmp_path / "project-data")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def write_image(path: Path, width: int = 32, height: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


# --- finding -------------------------------------------------------------------------------------
def test_the_user_s_folder_comes_before_data(tmp_path, capsys):
    user = tmp_path / "user"
    for folder in (user, data.DATA):
        write_image(folder / "cifar10/train/airplane/0.png")
    found = find("cifar10", folder=user)
    assert (found.name, found.path, found.downloads) == ("HW3_DATA", user, False)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    found = find("cifar10", folder=tmp_path / "empty")
    assert (found.name, found.path, found.downloads) == ("data/", data.DATA, True)
    assert capsys.readouterr().out.splitlines() == [
        "CIFAR-10: HW3_DATA holds none",
        "CIFAR-10: real images from data/",
    ]
    assert find("cifar10").name == "data/"
    assert not find("cifar10", "demo").downloads


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("profile", [None, "cpu", "gpu"])
def test_without_network_the_standin_is_taken_and_said_loudly(dataset, profile, capsys):
    source = find(dataset, profile)
    out = capsys.readouterr().out
    assert source.is_standin and "STAND-IN" in out and "say nothing about the real data" in out
    assert "cannot be reached" in out
    assert str(Path.home()) not in out and str(data.DATA) not in out
    assert not data.DATA.exists()


@pytest.mark.parametrize("dataset", SETS)
def test_smoke_and_demo_ask_no_server(dataset, mirror, capsys):
    for profile in ("smoke", "demo"):
        assert data.find_source(SETS[dataset], profile, mirror=mirror.url).is_standin
    out = capsys.readouterr().out
    assert "the smoke profile always takes the stand-in" in out
    assert "nothing is downloaded for it in the demo profile" in out
    assert mirror.asked == []


def test_smoke_takes_the_standin_even_where_data_are(tmp_path):
    write_image(tmp_path / "cifar10/train/airplane/0.png")
    assert find("cifar10", "smoke", tmp_path).is_standin
    assert find("cifar10", "demo", tmp_path).name == "HW3_DATA"


@pytest.mark.parametrize(
    "dataset, name, needed",
    [
        ("cifar10", "train/airplane/0.png", "cifar10/{train,test}/<class>"),
        ("cifar10", "data_batch_1", "cifar-10-batches-py/"),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-py/"),
        ("cifar10", "torch/cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/"),
        ("cifar10", "cifar/data_batch_1", "cifar-10-batches-py/"),
        ("cifar10", "CIFAR-10-images/train/airplane/0.png", "cifar10/{train,test}/<class>"),
        ("cifar10", "pictures/test/airplane/0.png", "cifar10/{train,test}/<class>"),
        ("coco", "kaggle/coco2017/annotations/instances_val2017.json", "coco/annotations/"),
        ("coco", "annotations/instances_val2014.json", "instances_{train2017,val2017}.json"),
        ("coco", "instances_val2017.json", "coco/annotations/instances_{train2017,val2017}"),
        ("coco", "mscoco/annotations/instances_val2017.json", "coco/annotations/instances_"),
        ("coco", "annotations_trainval2017.zip", "coco/annotations/instances_"),
        ("photos", "coco/train2017/1.jpg", "coco/{train2017,val2017}"),
        ("photos", "ADEChallengeData2016/images/training/1.jpg", "release_test/testing"),
    ],
)
def test_a_neighbouring_layout_is_named_with_the_right_one(tmp_path, dataset, name, needed):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        find(dataset, folder=tmp_path)
    message = str(caught.value)
    assert message.startswith("HW3_DATA holds ") and needed in message and "\n" not in message
    assert any(part in message for part in (name.split("/")[0], Path(name).name))


def test_a_folder_of_something_else_is_described(tmp_path, capsys):
    for name in "abcdefgh":
        (tmp_path / "user" / name).mkdir(parents=True)
    assert find("coco", "demo", tmp_path / "user").is_standin
    assert "MS COCO: HW3_DATA holds none, only a, b, c, d, e, f ...\n" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", SETS)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, dataset):
    """Also where the tests run as root, who may read everything."""

    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(DataError, match="HW3_DATA .*Permission denied") as caught:
            find(dataset, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_describe_and_repr_show_counts_but_no_folder(tmp_path):
    source = Source("CIFAR-10", "HW3_DATA", tmp_path, counts="6 train, 6 test", mirror="http://x")
    assert source.describe() == "CIFAR-10: real images from HW3_DATA (6 train, 6 test)"
    assert str(tmp_path) not in repr(source) and "http" not in repr(source)


# --- reading images ------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images_are_upright(tmp_path, orientation, kind):
    upright = np.zeros((40, 24, 3), np.uint8)
    upright[:20, :12] = 255  # white at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{kind}", exif=exif)
    image = data.read_image(tmp_path / f"a.{kind}")
    assert (image.mode, image.size) == ("RGB", (24, 40))
    assert np.abs(np.asarray(image, int) - upright).max() < 30


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    image = np.asarray(data.read_image(tmp_path / "deep.png"))
    assert image.shape == (4, 256, 3)
    np.testing.assert_array_equal(image[0, :, 0], np.arange(256))


def test_every_reader_keeps_the_range_of_sixteen_bits(tmp_path):
    """Clipped at 255, this picture would be all white."""
    pixels = np.linspace(2000, 60000, 32 * 32).astype(np.uint16).reshape(32, 32)
    wanted = (pixels / 257).round()
    for name in ("cifar10/train/airplane", "cifar10/test/airplane"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    path = tmp_path / "cifar10/train/airplane/a.png"
    with Image.open(path) as image:
        squares = [data.central_square(x, 32)[0][0, 0].numpy() * 255 for x in (path, image)]
    cifar = datasets.load_cifar10(Source("CIFAR-10", "HW3_DATA", tmp_path), ("airplane",))
    canvases, _ = views.make_canvases([path], side=32)
    read = {
        "read_image": np.asarray(data.read_image(path))[..., 0],
        "of a path": squares[0],
        "of an image": squares[1],
        "CIFAR-10": cifar.test_images[0, 0].numpy(),
        "COCO": objects.read_photo(path, {"width": 32, "height": 32})[..., 0],
        "canvases": canvases[0, 0, 1::3, 1::3].numpy(),
    }
    for reader, values in read.items():
        assert np.abs(values - wanted).max() < (3 if reader == "canvases" else 1e-3), reader


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_parts_are_white_whatever_colour_they_hide(tmp_path, mode):
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (90, 90, 90, 0) if mode == "RGBA" else (90, 0))
        image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        image.save(tmp_path / "a.png")
    else:
        image = Image.fromarray(np.array([[[90] * 3, [0] * 3]], np.uint8)).convert(mode)
        hidden = image.getpixel((0, 0))
        image.save(tmp_path / "a.png", transparency=hidden)
    read = np.asarray(data.read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read, [[[255] * 3, [0] * 3]])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    name = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (5, 4), "white").convert(mode).save(name)
    image = data.read_image(name)
    assert (image.mode, image.size) == ("RGB", (5, 4)) and np.asarray(image).min() > 250


def test_what_is_no_image_is_named_in_one_line(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((50, 50), 64).save(buffer, "PNG")
    for name, content in (
        ("half.png", buffer.getvalue()[:900]),
        ("text.png", b"no image"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    for name in ("half.png", "text.png", "empty.png", "folder.png", "nowhere.png"):
        with pytest.raises(DataError, match=rf"cannot read the image .*{name}") as caught:
            data.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_standin_where_data_cannot_be_written(monkeypatch):
    data.DATA.write_text("a file where the folder should be")

    def draw(folder: Path) -> None:
        write_image(folder / "1.jpg")

    folder = data.standin_folder("photos", draw)
    assert os.listdir(folder) == ["1.jpg"] and data.DATA not in folder.parents
    assert data.standin_folder("photos", draw) == folder


# --- splits --------------------------------------------------------------------------------------
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


# --- squares -------------------------------------------------------------------------------------
def test_central_square_of_a_file_and_of_an_image_agree(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 20:80] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square, short = data.central_square(tmp_path / "a.png", 32)
    assert short == 60 and square.shape == (1, 3, 32, 32) and square.min() > 0.9
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(data.central_square(image, 32)[0], square)


def test_central_square_refuses_in_one_line(tmp_path):
    Image.effect_noise((50, 50), 64).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with Image.open(tmp_path / "half.png") as half:
        for image, message in (
            (half, r"cannot read the image .*half\.png"),
            (tmp_path / "half.png", r"cannot read the image .*half\.png"),
            (Image.new("RGB", (100, 9)), "The image is 100x9 pixels; at least 16x16 are needed"),
            (None, "Give a Pillow image or a file name, not NoneType"),
        ):
            with pytest.raises(DataError, match=message):
                data.central_square(image, 32)
