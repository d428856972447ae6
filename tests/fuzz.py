"""Throw damaged images and annotations at their readers: `make fuzz`.

Every input is a good file with something wrong in it. A reader may take it or raise a ProjectError;
anything else is a fault: another exception, a crash, a wrong result, too much memory.
"""

import copy
import io
import json
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pymask

from src import ProjectError, data, datasets, results, training
from tools.html import notebook_to_html

SEED = 0
COUNT = 500  # inputs of each kind
SECONDS = 30  # for each kind, at most
GIGABYTES = 2  # of memory, at most
STRANGE = [
    *(None, True, [], {}, "", "x", "\0", "é" * 300, "../../etc/passwd", [[]], [None], {"id": 1}),
    *(0, -1, 1, 7, 10**6, 10**9, 2**31, 2**63, 10**400, 0.5, -0.0, 1e9, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The bytes with some of them changed, cut, repeated or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        start = rng.randrange(len(changed) + 1)
        stop = min(len(changed), start + rng.choice([1, 1, 2, 4, 16, 200]))
        changed[start:stop] = rng.choice(
            [
                rng.randbytes(stop - start),
                b"",
                bytes(changed[start:stop] * 2),
                bytes([rng.choice([0, 0xFF, 0x7F, 0x80])]) * (stop - start),
            ]
        )
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)


def disturbed(rng: random.Random, value: object) -> object:
    """A copy of a JSON value with some of its parts exchanged for strange ones."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        parent, part = None, value
        while isinstance(part, (dict, list)) and part and (parent is None or rng.random() < 0.85):
            key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
            parent, part = part, part[key]
        if parent is None:
            return rng.choice(STRANGE)
        what = rng.random()
        if what < 0.15:
            del parent[key]
        elif what < 0.25 and isinstance(parent, list):
            parent.append(copy.deepcopy(part))
        else:
            parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


# --- images --------------------------------------------------------------------------------------
def image_files(rng: random.Random) -> list[tuple[str, bytes]]:
    """Small images of every kind that the readers meet."""
    pixels = np.frombuffer(rng.randbytes(32 * 32 * 4), np.uint8).reshape(32, 32, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    colour, files = Image.fromarray(pixels[..., :3]), []
    for image, kind, options in (
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("L"), "JPEG", {}),
        (colour, "PNG", {"exif": exif}),
        (Image.fromarray(pixels), "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour.convert("1"), "PNG", {}),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
        (colour, "GIF", {}),
        (colour, "WEBP", {}),
        (colour, "BMP", {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append((".jpg" if kind == "JPEG" else ".png", buffer.getvalue()))
    return files


def images(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Read one damaged image as every notebook reads it."""
    suffix, content = rng.choice(image_files(rng))
    path = folder / "cifar10" / "train" / "airplane" / f"a{suffix}"
    for name in ("cifar10/train/airplane", "cifar10/test/airplane", "coco/val2017"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"a{suffix}").write_bytes(damaged(rng, content))

    def read() -> None:
        image = data.read_image(path)
        assert image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)
        square, _ = data.central_square(path, side=16)
        assert square.shape == (1, 3, 16, 16) and 0 <= square.min() <= square.max() <= 1
        datasets.list_photos("test", data.Source("Photos", "HW3_DATA", folder))
        datasets.load_cifar10(data.Source("CIFAR-10", "HW3_DATA", folder), ("airplane",))

    return read


# --- annotations ---------------------------------------------------------------------------------
def document() -> dict:
    """Annotations of two images: polygons, and runs in both forms."""
    striped = np.asfortranarray(np.indices((16, 16)).sum(axis=0) // 7 % 2, dtype=np.uint8)
    shapes = [
        [[1.5, 2, 9, 2, 9, 11, 2, 10]],
        [[0, 0, 4, 0, 4, 4], [5, 5, 9, 5, 9, 9]],
        {"counts": [3, 40, 100, 20, 93], "size": [16, 16]},
        {"counts": pymask.encode(striped)["counts"].decode(), "size": [16, 16]},
    ]
    return {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 16, "height": 16} for i in (1, 2)
        ],
        "categories": [{"id": 3, "name": "car", "supercategory": "vehicle"}],
        "annotations": [
            {
                "id": 10 * image + i,
                "image_id": image,
                "category_id": 3,
                "segmentation": shape,
                "bbox": [1, 2, 8.5, 9],
                "area": 70.5,
                "iscrowd": int(isinstance(shape, dict)),
            }
            for image in (1, 2)
            for i, shape in enumerate(shapes)
        ],
    }


def annotations(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Read a disturbed annotation file and fill all its outlines."""
    if rng.random() < 0.3:
        text = damaged(rng, json.dumps(document()).encode())
    elif rng.random() < 0.6:  # the outlines get their share
        content = document()
        entry = rng.choice(content["annotations"])
        key = rng.choice(["segmentation", "segmentation", "bbox"])
        entry[key] = disturbed(rng, entry[key])
        text = json.dumps(content).encode()
    else:
        text = json.dumps(disturbed(rng, document())).encode()
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_bytes(text)
    (folder / "val2017").mkdir()
    for i in (1, 2):
        Image.new("RGB", (16, 16)).save(folder / "val2017" / f"{i:012d}.jpg")
    choice = rng.choice([None, 1, 5, "sample", [1, 2, 99]])

    def read() -> None:
        source = data.Source("MS COCO", "HW3_DATA", folder)
        coco, image_path = datasets.load_coco("val2017", source, choice)
        for annotation in coco.anns.values():
            assert annotation["image_id"] in coco.imgs and annotation["category_id"] in coco.cats
            photo = coco.imgs[annotation["image_id"]]
            shape = photo["height"], photo["width"]
            mask = datasets.coco_mask(annotation, *shape)
            assert mask is None or (mask.shape == shape and set(np.unique(mask)) <= {0, 1})
        for info in coco.imgs.values():
            image_path(info)

    return read


# --- notebooks and results -----------------------------------------------------------------------
PROSE = [
    "# A $x$ title\n\n> a *quote* of `code`\n\n| a | b |\n|---|--:|\n| $x_1$ | **2** |\n",
    r"$$\begin{aligned} a &= \frac{b}{c} \tag{1} \\ &= \cancel{d} \end{aligned}$$",
    "[down](#4.-It) ![dot](attachment:a.png)\n\n## 4. It\n\n1. one\n   - two\n\n"
    "```python\nx = 1\n```",
    "<div align='center'><img src='dot.png' alt='x'></div>\n\n"
    "<details><summary>s</summary>t</details>",
]
SHOWN = [
    {"text/html": "<table><tr><td onclick='x()'>1</td></tr></table><svg viewBox='0 0 1 1'></svg>"},
    {"text/markdown": "**Figure 1.** It is $5 \\%$."},
    {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
    {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'/>"},
    {"text/latex": "$\\displaystyle x^{2}$", "text/plain": "<Math object>"},
    {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "HBox()"},
]


def notebook() -> dict:
    """A notebook with text, every kind of output, and a progress bar."""
    outputs = [
        {"output_type": "display_data", "data": shown, "metadata": {"image/png": {"alt": "a dot"}}}
        for shown in SHOWN
    ]
    outputs += [
        {
            "output_type": "stream",
            "name": "stderr",
            "text": "\r 1%\x1b[A\x1b]8;;http://a\x07\b\n\r 2%",
        },
        {"output_type": "error", "ename": "E", "evalue": "e", "traceback": ["\x1b[31mE\x1b[0m"]},
    ]
    code = {"cell_type": "code", "source": "x = 1", "execution_count": 1, "outputs": outputs}
    attached = {"a.png": {"image/png": "iVBORw0KGgo="}}
    cells = [{"cell_type": "markdown", "source": text, "attachments": attached} for text in PROSE]
    cells += [code | {"metadata": {"tags": ["hide-input"]}}]
    cells = [{"id": f"c{i}", "metadata": {}} | cell for i, cell in enumerate(cells)]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def notebooks(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Make the page of a notebook whose JSON, text or outputs are damaged."""
    content = json.loads(json.dumps(notebook()))  # a copy of its own, to be damaged
    path, out = folder / "a.ipynb", folder / "a.html"
    (folder / "dot.png").write_bytes(b"")
    kind = rng.random()
    if kind < 0.2:
        text = damaged(rng, json.dumps(content).encode())
    elif kind < 0.5:
        text = json.dumps(disturbed(rng, content)).encode()
    else:
        for part in [
            *content["cells"],
            *(output["data"] for output in content["cells"][-1]["outputs"][:6]),
        ]:
            for key in part.keys() & {"source", *(mime for shown in SHOWN for mime in shown)}:
                if isinstance(part[key], str) and rng.random() < 0.3:
                    part[key] = damaged(rng, part[key].encode(errors="replace")).decode(
                        "utf-8", "surrogateescape"
                    )
        text = json.dumps(content).encode()
    path.write_bytes(text)

    def read() -> None:
        notebook_to_html(path, out)
        page = out.read_text(encoding="utf-8")
        assert page.endswith("</main></body></html>\n") and "<script" not in page.lower()
        assert page.count("<main>") == 1 and not set(page) & set("\0\x07\b\x1b")

    return read


def result_files(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Load a damaged results file, and show what it holds."""
    metric = {"value": 0.5, "n": 10, "ci95": [0.4, 0.6], "unit": "fraction"}
    content = {"profile": "cpu", "seconds": 3.5, "metrics": {"a.b": metric, "c": dict(metric)}}
    text = json.dumps(disturbed(rng, content)).encode()
    path = folder / "a.json"
    path.write_bytes(damaged(rng, text) if rng.random() < 0.4 else text)

    def read() -> None:
        stored = results.load_results(path)
        for name in stored["metrics"]:
            for form in ("", "short", "±", "range", ".2f"):
                format(stored["metrics"][name], form)

    return read


def models(rng: random.Random, folder: Path) -> Callable[[], None]:
    """Load a damaged model file."""
    path = folder / "a.pt"
    if rng.random() < 0.5:
        training.save_model(torch.nn.Linear(2, 2), path)
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        torch.save(disturbed(rng, {"config": {}, "state": state}), path)

    def read() -> None:
        model = training.load_model(lambda config: torch.nn.Linear(2, 2), path)
        assert all(value.isfinite().all() for value in model.state_dict().values())

    return read


# --- the run -------------------------------------------------------------------------------------
def faults_of(fuzzer: Callable, count: int, folder: Path) -> tuple[Counter, list[str]]:
    """What came of the inputs, and the faults."""
    outcomes, faults = Counter(), []
    for number in range(count):
        rng = random.Random(f"{SEED} {fuzzer.__name__} {number}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            read = fuzzer(rng, Path(scratch))
            try:
                read()
                outcomes["read"] += 1
            except ProjectError as error:
                outcomes["refused"] += 1
                if "\n" in str(error):
                    faults.append(f"{number}: more than one line: {error}")
            except Exception:
                faults.append(f"{number}:\n{traceback.format_exc()}")
    return outcomes, faults


@pytest.mark.filterwarnings("ignore")  # of Pillow, about broken metadata
@pytest.mark.parametrize("fuzzer", [images, annotations, notebooks, result_files, models])
def test_damaged_input_is_read_or_refused_in_one_line(fuzzer, tmp_path):
    start = time.process_time()
    outcomes, faults = faults_of(fuzzer, COUNT, tmp_path)
    assert not faults, "\n".join(faults[:5])
    assert min(outcomes["read"], outcomes["refused"]) > COUNT / 20, "the damage is of one kind only"
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < GIGABYTES * 2**20
