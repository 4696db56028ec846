"""scripts/submit_ray_job.py against servers that answer badly, or not always, and directories that hold too much."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "submit_ray_job.py"
# What a request is answered: (HTTP status, body); None hangs up without a word
Answer = Callable[[str], "tuple[int, bytes] | None"]


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("submit_ray_job", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """The address of an HTTP server that answers a request for a path with `answer(path)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = answer(self.path)
            if given is not None:
                self.send_response(given[0])
                self.send_header("Content-Length", str(len(given[1])))
                self.end_headers()
                self.wfile.write(given[1])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def run(*arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of the script."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, env=environment
    )
    return done.returncode, done.stderr


def assert_said_in_a_line(code: int, errors: str, message: str) -> None:
    assert (code, message in errors, errors.startswith("error: "), errors.count("\n")) == (1, True, True, 1), errors


def as_json(value: Any) -> tuple[int, bytes]:
    return 200, json.dumps(value).encode()


def test_a_port_that_is_no_number_is_said_in_a_line() -> None:
    assert_said_in_a_line(
        *run("list", "--address", "http://head:port"), "no Ray job server answers at http://head:port"
    )


def test_a_server_that_does_not_speak_http_is_said_in_a_line() -> None:
    with server(lambda _: None) as address:
        assert_said_in_a_line(*run("list", "--address", address), f"no Ray job server answers at {address}")


@pytest.mark.parametrize("action", ["list", "status", "logs", "stop", "submit"])
@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"\xff", b'["word"]', b'{"another": "answer"}', b"7"])
def test_answers_that_are_not_a_job_servers_are_refused(script: Any, action: str, body: bytes) -> None:
    with server(lambda _: (200, body)) as address:
        cluster = script.Cluster(address)
        actions = {
            "list": cluster.jobs,
            "status": lambda: cluster.job("job"),
            "logs": lambda: cluster.logs("job"),
            "stop": lambda: cluster.stop("job"),
            "submit": lambda: cluster.submit("ls", {}, None, None),
        }
        with pytest.raises(script.JobError, match="is no Ray job server, or not well"):
            actions[action]()


def test_a_jobs_name_stays_one_part_of_the_path(script: Any) -> None:
    with server(lambda path: as_json({"logs": path})) as address:
        assert script.Cluster(address).logs("../a b?c/d") == "/api/jobs/..%2Fa%20b%3Fc%2Fd/logs"


def test_a_cluster_that_is_away_for_a_while_does_not_end_the_wait(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script._POLL_SECONDS = 0.01
    running, ended = as_json({"status": "RUNNING"}), as_json({"status": "SUCCEEDED"})
    states = iter([running, None, (500, b"the agent is gone"), running, (200, b"<html>"), running, ended])
    logs = iter([as_json({"logs": "one\n"}), None, as_json({"logs": "one\ntwo\n"}), as_json({"logs": "one\ntwo\n3\n"})])

    with server(lambda path: next(logs if path.endswith("logs") else states)) as address:
        status = script.follow(script.Cluster(address), "job")

    output, errors = capsys.readouterr()
    assert (status, output) == ("SUCCEEDED", "one\ntwo\n3\n")
    assert errors.count("trying again for 60 s") == 1


def test_a_cluster_that_stays_away_ends_the_wait_and_not_the_job(script: Any) -> None:
    script._POLL_SECONDS, script._PATIENCE_SECONDS = 0.01, 0.2
    with server(lambda _: None) as address, pytest.raises(script.JobError, match=r"the job goes on; .* logs job"):
        script.follow(script.Cluster(address), "job")


def test_a_job_that_ended_is_told_although_its_log_is_gone(script: Any) -> None:
    script._POLL_SECONDS, script._PATIENCE_SECONDS = 0.01, 0.2
    with server(lambda path: None if path.endswith("logs") else as_json({"status": "SUCCEEDED"})) as address:
        assert script.follow(script.Cluster(address), "job") == "SUCCEEDED"


def test_a_refusal_ends_the_wait_at_once(script: Any) -> None:
    with server(lambda _: (404, b"no such job")) as address, pytest.raises(script.JobError, match=r"refused \(404\)"):
        script.follow(script.Cluster(address), "job")


def test_a_wrong_address_to_follow_a_job_at_is_told_at_once() -> None:
    assert_said_in_a_line(*run("logs", "--address", "http://127.0.0.1:1", "job"), "no Ray job server answers")


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_jobs_end_is_the_scripts(status: str, code: int) -> None:
    answers = {
        "/api/jobs/": {"submission_id": "a"},
        "/api/jobs/a": {"status": status},
        "/api/jobs/a/logs": {"logs": "x"},
    }
    with server(lambda path: as_json(answers[path])) as address:
        assert run("submit", "--address", address, "--id", "a", "--", "ls")[0] == code


def test_a_long_log_is_fetched_less_often(script: Any) -> None:
    lengths = [0, 2**20, 5 * 2**20, 2**30]
    assert [script.poll_seconds(length) for length in lengths] == [1.0, 2.0, 6.0, 30.0]


def test_repositories_environments_and_caches_are_left_out_of_a_package(script: Any, tmp_path: Path) -> None:
    for name in [
        ".git/a",
        ".venv/a",
        ".venv-npu/lib/a",
        "code/.venv.old/a",
        "code/__pycache__/a",
        "code/b.py",
        ".env",
        "a",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "code" / "loop").symlink_to(tmp_path)

    package = script.pack(tmp_path)

    assert zipfile.ZipFile(io.BytesIO(package)).namelist() == [".env", "a", "code/b.py"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_cannot_be_read_is_named(script: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0o000)
    with pytest.raises(script.JobError, match=r"secret cannot be read \(Permission denied\)"):
        script.pack(tmp_path)
