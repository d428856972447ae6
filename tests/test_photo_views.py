"""Canvases, views and their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from src import ProjectError
from src import photo_views as pv


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("length, begins", [(240, [0, 144]), (104, [4])])
def test_canvases_come_from_both_ends_or_the_middle(tmp_path, upright, length, begins):
    """A pixel's value is its place along the longer side; the shorter one needs no resizing."""
    ramp = np.tile(np.arange(length, dtype=np.uint8), (96, 1))
    Image.fromarray(ramp.T if upright else ramp).convert("RGB").save(tmp_path / "ramp.png")
    canvases, photos = pv.make_canvases([tmp_path / "ramp.png"], 32)
    assert photos.tolist() == [0] * len(begins) and canvases.dtype == torch.uint8
    for canvas, begin in zip(canvases, begins, strict=True):
        line = torch.arange(begin, begin + 96, dtype=torch.uint8).expand(3, 96, 96)
        assert torch.equal(canvas, line.mT if upright else line)


def test_one_unreadable_photo_is_left_out_and_counted(tmp_path, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.new("RGB", (50, 50), "red").save(path)
    paths[1].write_bytes(paths[0].read_bytes()[:-40])
    canvases, photos = pv.make_canvases(paths, 8)
    assert len(canvases) == 2 and photos.tolist() == [0, 2]
    assert "1 of 3 photos are left out" in capsys.readouterr().out
    with pytest.raises(ProjectError, match="b.png"):
        pv.make_canvases(paths[1:2], 8)


def test_views_up_to_the_last_pixel():
    """The canvas is a ramp: a pixel's value is its place, and a mean of points is its middle."""
    ramp = torch.arange(48, dtype=torch.uint8).expand(2, 3, 48, 48)
    view = pv.View(ramp, torch.ones(250).long(), pv.matrix(1, 0, [16] * 250, 0, -1, 0), 16)
    first, second = pv.sample(view, view)
    assert torch.allclose(first * 255, ramp[:1, :, :16, 32:] * 1.0, atol=0.13)
    assert torch.equal(pv.sample_bytes(view), pv.as_bytes(second))
    assert pv.as_bytes(torch.tensor([-0.2, 0.5, 0.9979, 1.2])).tolist() == [0, 128, 254, 255]


def test_central_squares_of_all_kinds(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    photo, path, exif = Image.fromarray(pixels), tmp_path / "turned.png", Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    photo.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    for image in (photo, path, str(path), Image.open(path)):
        square = pv.central_square(image, 30)[0].permute(1, 2, 0)
        assert np.array_equal(square, pixels[:, 10:40])
    path.write_bytes(b"no image")
    for bad, message in ((path, "turned.png"), (Image.new("RGB", (12, 40)), "16 or more")):
        with pytest.raises(ProjectError, match=message):
            pv.central_square(bad, 32)
