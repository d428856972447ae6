"""A server on this machine that stands for the official ones, and misbehaves as real ones do.

`python -m tests.mirror FOLDER` serves the real data in a folder and prints the settings to use it.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import pickle
import signal
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from src.datasets import cifar10

PAGE = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`, by the paths of the official addresses: their content or a local file.

    `faults` lists by path what goes wrong at each request, one after the other; those under "" go
    on for all paths. They are "cut" (half of it arrives), "no length", "bad length", "no ranges",
    "page" and "disguised page" (a web page with status 200), "packed" (with gzip, unasked), "loop"
    (of redirections), or a status such as "403".
    `asked` lists (path, range) of all requests.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes | Path] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # who asks may hang up early


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(405)

    def do_GET(self):
        path, asked = self.path[1:], self.headers.get("Range")
        self.server.asked.append((path, asked))
        faults = {*self.server.faults[""], *self.server.faults[path][:1]}
        del self.server.faults[path][:1]
        if status := next((fault for fault in faults if fault.isdigit()), None):
            return self.send_error(int(status))
        if "loop" in faults:
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        if page := next((fault for fault in faults if fault.endswith("page")), None):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page == "page" else "image/jpeg")
            self.end_headers()
            return self.wfile.write(PAGE)
        if path not in self.server.files:
            return self.send_error(404)
        content = self.server.files[path]
        content = content.read_bytes() if isinstance(content, Path) else content
        start = int(asked[len("bytes=") : -1]) if asked and "no ranges" not in faults else 0
        if start and start >= len(content):
            return self.send_error(416)
        rest = gzip.compress(content[start:]) if "packed" in faults else content[start:]
        self.send_response(206 if start else 200)
        if "packed" in faults:
            self.send_header("Content-Encoding", "gzip")
        if "no length" not in faults:
            length = "abc" if "bad length" in faults else str(len(rest))
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if "cut" in faults else rest)

    def log_message(self, *arguments):
        pass


def coco_files(folder: Path) -> dict[str, bytes | Path]:
    """COCO's official files, made of those in the folder of the real data."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted((folder / "coco" / "annotations").glob("*.json")):
            bundle.write(path, f"annotations/{path.name}")
    photos = {
        f"{path.parent.name}/{path.name}": path for path in (folder / "coco").glob("*2017/*.jpg")
    }
    return {"annotations/annotations_trainval2017.zip": archive.getvalue()} | photos


def cifar10_files(folder: Path) -> tuple[dict[str, bytes], str]:
    """CIFAR-10's official archive, made of the images in the folder of the real data.

    Returns:
        The archive by its path, and the text of a `sitecustomize.py`: with that on `PYTHONPATH`,
        torchvision expects the checksums of this archive instead of the official ones.
    """
    names = [name for name, _ in CIFAR10.train_list] + [CIFAR10.test_list[0][0]]
    members, labels = {}, ("airplane", "automobile")
    meta = {"label_names": list(cifar10.CLASSES)}
    members[CIFAR10.meta["filename"]] = pickle.dumps(meta)
    for i, name in enumerate(names):
        split, part = ("test", slice(None)) if name == names[-1] else ("train", slice(i, None, 5))
        images, numbers = [], []
        for label, kind in enumerate(labels):
            for path in sorted((folder / "cifar10" / split / kind).iterdir())[part]:
                images.append(np.array(Image.open(path)).transpose(2, 0, 1).ravel())
                numbers.append(label)
        members[name] = pickle.dumps({"data": np.stack(images), "labels": numbers})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    patch = f"""from torchvision.datasets import CIFAR10

CIFAR10.tgz_md5 = {hashlib.md5(buffer.getvalue()).hexdigest()!r}
CIFAR10.train_list = {[[name, sums[name]] for name in names[:-1]]}
CIFAR10.test_list = {[[names[-1], sums[names[-1]]]]}
CIFAR10.meta = {CIFAR10.meta | {"md5": sums[CIFAR10.meta["filename"]]}}
"""
    return {"~kriz/cifar-10-python.tar.gz": buffer.getvalue()}, patch


@contextlib.contextmanager
def running() -> Iterator[Mirror]:
    """A mirror that answers until the block ends."""
    with Mirror() as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
        yield mirror
        mirror.shutdown()


def main(folder: Path) -> None:
    with running() as mirror, tempfile.TemporaryDirectory() as patches:
        files, patch = cifar10_files(folder)
        mirror.files = coco_files(folder) | files
        (Path(patches) / "sitecustomize.py").write_text(patch)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"export HW3_MIRROR={mirror.url} PYTHONPATH={patches}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f"{len(mirror.asked)} requests")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
