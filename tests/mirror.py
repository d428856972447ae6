"""A server on this machine that stands for the official ones, and misbehaves as real ones do."""

import contextlib
import http.server
import threading
from collections import defaultdict


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`: their content by the paths of the official addresses.

    `faults` lists by path what goes wrong at each request, one after the other; those under "" go
    on for all paths. They are a status such as "404", "cut" (half of it arrives), "nothing" (the
    connection closes at once) and "damaged" (zeros, with status 200). `asked` lists the requests.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, defaultdict(list), []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # who asks may hang up early


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path[1:]
        server.asked.append(path)
        fault = (server.faults[""] or server.faults[path] or [""])[0]
        del server.faults[path][:1]
        if fault == "nothing":
            return
        if fault.isdigit() or path not in server.files:
            return self.send_error(int(fault or 404))
        content = server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        content = bytes(len(content)) if fault == "damaged" else content
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def running():
    """A mirror that answers until the block ends."""
    with Mirror() as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
        yield mirror
        mirror.shutdown()
