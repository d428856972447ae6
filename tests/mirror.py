"""A server on this machine that stands for the official ones, and misbehaves as real ones do."""

import contextlib
import http.server
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PAGE = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`, by the paths of the official addresses: their content or a local file.

    `faults` lists by path what goes wrong at each request, one after the other; those under "" go
    on for all paths. They are "cut" (half of it arrives), "no length", "bad length", "no ranges",
    "page" and "disguised page" (a web page with status 200), or a status such as "403".
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
        rest = content[start:]
        self.send_response(206 if start else 200)
        if "no length" not in faults:
            length = "abc" if "bad length" in faults else str(len(rest))
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if "cut" in faults else rest)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def running() -> Iterator[Mirror]:
    """A mirror that answers until the block ends."""
    with Mirror() as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
        yield mirror
        mirror.shutdown()
