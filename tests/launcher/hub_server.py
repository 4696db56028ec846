"""A small model hub on this machine, speaking as much of the Hugging Face protocol as a snapshot needs."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`files` of one repository; `fetched` lists the names of files whose content was asked for."""

    daemon_threads = True

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.files = repo, files
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        siblings = [{"rfilename": name} for name in hub.files]
        if path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            self.answer(json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in hub.files.items()]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/{hub.repo}/resolve/"):
            name = path.split("/", 5)[5]
            hub.fetched.append(name)
            self.answer(hub.files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing: the tests look at `fetched`."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving(repo: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """A running hub."""
    with Hub(repo, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
