"""Directories for compiled graphs, one for everything that a graph was compiled for.

A compiled graph has no guards: run with another cache size or another version it would be wrong, silently. So whatever
it depends on is part of its directory's name, and what has changed is simply not found. The directories hold code that
is executed: only the user may write there, or put others in their place. Free of torch; it does not know what a
compiled graph looks like.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from nanovllm_dist.errors import ConfigError

_FACTS = "facts.json"
_LOCK = "lock"
_DIGEST_LENGTH = 32


def entry_directory(root: Path, facts: Mapping[str, Any]) -> Path:
    """The directory of what was compiled for these facts (JSON values), made if need be, with the facts in a file.

    Raises:
        ConfigError: it cannot be written to, or is or may become another user's.
    """
    text = json.dumps({**facts, "sources": source_digest()}, sort_keys=True, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
    directory = root / digest
    try:
        for path in (*reversed(root.absolute().parents), root, directory):
            path.mkdir(mode=0o700, exist_ok=True)
        _check_place(root.absolute().parent)
        for path in (root, directory):
            _check_own(path)
        (directory / _FACTS).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unusable(root, error) from None
    return directory


def try_lock(directory: Path) -> int | None:
    """A file descriptor that holds the directory for this process until it is closed; None if another holds it.

    Raises:
        ConfigError: the file system has no locks.
    """
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise _unusable(directory.parent, error) from None
    return lock


@cache
def source_digest() -> str:
    """Of this package's own code, every line of which may shape a graph."""
    digest = hashlib.sha256()
    package = Path(str(files("nanovllm_dist")))
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _check_own(path: Path) -> None:
    """That it is a directory of this user that nobody else may write to."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise _unsafe(path, "is a link, which may lead elsewhere later", "name what it leads to")
    if status.st_uid != os.getuid():
        raise _unsafe(path, f"is another user's ({status.st_uid})", "name another directory")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(path, "may be written to by others", "chmod go-w it, or name another directory")


def _check_place(path: Path) -> None:
    """That nobody but this user and root can put another directory in the place of one in it."""
    status = path.lstat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    shared = status.st_uid == 0 and status.st_mode & stat.S_ISVTX  # such as /tmp: what is there is its owner's
    if status.st_uid not in (os.getuid(), 0) or stat.S_ISLNK(status.st_mode) or (others_write and not shared):
        _check_own(path)


def _unsafe(path: Path, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"graph_cache_dir: {str(path)!r} {what}, and code from there is executed: {remedy}")


def _unusable(root: Path, error: OSError) -> ConfigError:
    return ConfigError(f"graph_cache_dir={str(root)!r} cannot be written to ({error.strerror}): name another directory")
