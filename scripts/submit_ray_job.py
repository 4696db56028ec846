#!/usr/bin/env python3
"""Run a command on a Ray cluster as a job, and see to it: submit, generate, logs, status, stop, list.

    scripts/submit_ray_job.py generate --model Qwen3-32B --tp 4 --prompts-file in.jsonl --output out.jsonl
    scripts/submit_ray_job.py submit --working-dir . -- python my_program.py

It speaks the HTTP interface of Ray's job server, so this machine needs Python 3.10 and nothing else; the cluster's
head needs `ray[default]`. A job runs on the head node, with this package installed there. It does not know engines:
`generate` is `submit -- nanovllm-launch`.

Exit codes: 0 the job succeeded, 1 it did not or the cluster refused, 2 the command line is wrong, 130 interrupted (the
job goes on).
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_REQUEST_SECONDS = 30.0
_POLL_SECONDS = 1.0
_LONGEST_POLL_SECONDS = 30.0
# The server sends the whole log each time, so a long one is asked for less often
_LOG_PER_SECOND = 2**20
_PATIENCE_SECONDS = 60.0
_LEFT_OUT = re.compile(r"\.git|__pycache__|\.venv.*")
_MAX_PACKAGE_MIB = 100
# Zip has no time before this, and equal directories should give equal packages
_NO_TIME = (1980, 1, 1, 0, 0, 0)


class JobError(Exception):
    """The cluster cannot be reached, or refuses; the message says which and what to do."""


class AwayError(JobError):
    """No answer, or none that can be used: the next request may get one."""


class Cluster:
    """The job server of one cluster."""

    def __init__(self, address: str, token: str = "") -> None:
        """`address`: of the dashboard, such as http://head:8265. Raises JobError when it is none."""
        if not address.startswith(("http://", "https://")):
            raise JobError(f"--address {address!r} is not a dashboard: give http://HEAD:8265, not Ray's own port")
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def submit(self, entrypoint: str, environment: dict[str, str], working_dir: Path | None, job: str | None) -> str:
        """Start a job; returns its id."""
        runtime: dict[str, Any] = {"env_vars": environment} if environment else {}
        if working_dir is not None:
            runtime["working_dir"] = self._upload(working_dir)
        request = {"entrypoint": entrypoint, "runtime_env": runtime, "submission_id": job}
        return self._ask("POST", "/api/jobs/", lambda answer: str(answer["submission_id"]), request)

    def job(self, job: str) -> dict[str, Any]:
        """What is known of a job: `status`, `message`, `entrypoint`, times in milliseconds."""
        return self._ask("GET", _path(job), lambda answer: {**answer, "status": str(answer["status"])})

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that was submitted, the latest last."""
        found = self._ask("GET", "/api/jobs/", lambda answer: [dict(job) for job in answer if job.get("submission_id")])
        return sorted(found, key=lambda job: job.get("start_time") or 0)

    def logs(self, job: str) -> str:
        """What the job has written so far."""
        return self._ask("GET", f"{_path(job)}/logs", lambda answer: str(answer["logs"] or ""))

    def stop(self, job: str) -> bool:
        """Ask a job to end; False if it had ended."""
        return self._ask("POST", f"{_path(job)}/stop", lambda answer: bool(answer["stopped"]))

    def _upload(self, directory: Path) -> str:
        package = pack(directory)
        name = f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip"
        self._call("PUT", f"/api/packages/gcs/{name}", package)
        return f"gcs://{name}"

    def _ask(self, method: str, path: str, read: Callable[[Any], T], content: Any = None) -> T:
        """What `read` makes of the JSON value that is answered."""
        answer = self._call(method, path, None if content is None else json.dumps(content).encode())
        try:
            return read(json.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise AwayError(f"{self.address} is no Ray job server, or not well: it answers {answer[:60]!r}") from None

    def _call(self, method: str, path: str, content: bytes | None) -> bytes:
        try:
            request = urllib.request.Request(self.address + path, content, self._headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                raise self._refusal(error) from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error).strip() or type(error).__name__
            raise AwayError(
                f"no Ray job server answers at {self.address}: {reason}; it is the dashboard's address, and the head "
                "must have been started with `ray[default]` installed (ray start --head --dashboard-host ADDRESS)"
            ) from None

    def _refusal(self, error: urllib.error.HTTPError) -> JobError:
        text = error.read().decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else error.reason
        if error.code in (401, 403):
            return JobError(f"{self.address} wants the token that its head has: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
        kind = AwayError if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR else JobError
        return kind(f"{self.address} refused ({error.code}): {last}")


def _path(job: str) -> str:
    return f"/api/jobs/{urllib.parse.quote(job, safe='')}"


def pack(directory: Path) -> bytes:
    """A zip of the directory's files, without repositories, environments and caches. Raises JobError if it is large."""
    if not directory.is_dir():
        raise JobError(f"--working-dir {directory} is not a directory")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        try:
            for path in _files(directory):
                entry = zipfile.ZipInfo(str(path.relative_to(directory)), _NO_TIME)
                entry.external_attr = (path.stat().st_mode & 0o777) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
                if packed.tell() > _MAX_PACKAGE_MIB << 20:
                    raise JobError(f"--working-dir {directory} packs to over {_MAX_PACKAGE_MIB} MiB: name less of it")
        except OSError as error:
            raise JobError(f"--working-dir {directory}: {error.filename} cannot be read ({error.strerror})") from None
    return packed.getvalue()


def _files(directory: Path) -> Iterator[Path]:
    """What is packed, in an order that depends on names alone. What is left out is not looked into."""
    for path in sorted(directory.iterdir()):
        if _LEFT_OUT.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file():
            yield path


def follow(cluster: Cluster, job: str) -> str:
    """Write the job's log as it grows, until it ends; returns its last status. Raises JobError when the cluster
    refuses, or has been away for a minute."""
    written, status, away_since = 0, "", None
    while True:
        try:
            status = str(cluster.job(job)["status"])
            text = cluster.logs(job)
        except AwayError as error:
            if away_since is None:
                away_since = time.monotonic()
                print(f"{error}\ntrying again for {_PATIENCE_SECONDS:g} s", file=sys.stderr)
            elif time.monotonic() - away_since > _PATIENCE_SECONDS:
                if status in _ENDED:  # only the end of its log is missing
                    return status
                raise JobError(f"{error}\nthe job goes on; to see it again: logs {shlex.quote(job)}") from None
            time.sleep(_POLL_SECONDS)
            continue
        sys.stdout.write(text[written:])
        sys.stdout.flush()
        if status in _ENDED:
            return status
        written, away_since = len(text), None
        time.sleep(poll_seconds(written))


def poll_seconds(written: int) -> float:
    """How long to wait before a log of so many characters is fetched again."""
    return min(_LONGEST_POLL_SECONDS, _POLL_SECONDS + written / _LOG_PER_SECOND)


def read_token() -> str:
    """The cluster's token, from where Ray itself looks: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or
    ~/.ray/auth_token; empty without."""
    given, path = os.environ.get("RAY_AUTH_TOKEN", "").strip(), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    file = Path(path or "~/.ray/auth_token").expanduser()
    if given or not (path or file.exists()):
        return given
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise JobError(f"the cluster's token cannot be read: {error}") from None


def _start(cluster: Cluster, given: argparse.Namespace, command: list[str]) -> int:
    for entry in given.env:
        if "=" not in entry:
            raise JobError(f"--env {entry!r} is not NAME=VALUE")
    environment = dict(entry.split("=", 1) for entry in given.env)
    job = cluster.submit(shlex.join(command), environment, given.working_dir, given.id)
    print(f"job {job}: {shlex.join(command)}", file=sys.stderr)
    if given.detach:
        print(job)
        return 0
    return _ended(cluster, job, follow(cluster, job))


def _ended(cluster: Cluster, job: str, status: str) -> int:
    if status == "SUCCEEDED":
        return 0
    message = str(cluster.job(job).get("message") or "").partition("\n")[0]  # what follows is the end of the log
    print(f"job {job} {status}: {message}", file=sys.stderr)
    return 1


def _run(given: argparse.Namespace, command: list[str]) -> int:
    cluster = Cluster(given.address, read_token())
    if given.action in ("submit", "generate"):
        return _start(cluster, given, ["nanovllm-launch", *command] if given.action == "generate" else command)
    if given.action == "list":
        for job in cluster.jobs():
            print(f"{job['submission_id']}  {job.get('status', ''):<9}  {job.get('entrypoint', '')}")
    elif given.action == "stop":
        print("stopping" if cluster.stop(given.job) else "it had ended")
    elif given.action == "status":
        found = cluster.job(given.job)
        print(f"{found['status']}: {found.get('message', '')}")
    elif given.detach:
        print(cluster.logs(given.job), end="")
    else:
        cluster.job(given.job)  # a wrong address is told at once; whoever follows is patient
        return _ended(cluster, given.job, follow(cluster, given.job))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    default = os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    common.add_argument("--address", default=default, help=f"of the dashboard (RAY_API_SERVER_ADDRESS, or {default})")
    start = argparse.ArgumentParser(add_help=False)
    start.add_argument("--id", help="the job's name (Ray makes one up)")
    start.add_argument("--working-dir", type=Path, help="files to send along; the command runs among them")
    start.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    start.add_argument("--detach", action="store_true", help="print the id and leave")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser(
        "submit", parents=[common, start], allow_abbrev=False, help="run a command: submit [options] -- COMMAND"
    )
    actions.add_parser(
        "generate", parents=[common, start], allow_abbrev=False, help="run nanovllm-launch with all other options"
    )
    logs = actions.add_parser("logs", parents=[common], help="write a job's log until it ends")
    logs.add_argument("--detach", action="store_true", help="only what there is now")
    for action in (logs, *(actions.add_parser(name, parents=[common]) for name in ("status", "stop"))):
        action.add_argument("job")
    actions.add_parser("list", parents=[common])
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of the script."""
    parser = _parser()
    if "--" in arguments:
        split = arguments.index("--")
        given, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    else:
        given, command = parser.parse_known_args(arguments)
    if command and given.action not in ("submit", "generate"):
        parser.error(f"unknown arguments: {shlex.join(command)}")
    if not command and given.action in ("submit", "generate"):
        parser.error("there is no command: put it after --")
    try:
        return _run(given, command)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("left; the job goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
