"""Directories for compiled graphs, one for everything that a graph was compiled for.

A compiled graph has no guards: run with another cache size or another version it would be wrong, silently. So whatever
it depends on is part of its directory's name, and what has changed is simply not found. The directories hold code that
is executed: only the user may write there. Free of torch; it does not know what a compiled graph looks like.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from nanovllm_dist.errors import ConfigError

_FACTS = "facts.json"
_DIGEST_LENGTH = 32


def entry_directory(root: Path, facts: Mapping[str, Any]) -> Path:
    """The directory of what was compiled for these facts (JSON values), made if need be, with the facts in a file.

    Raises:
        ConfigError: it cannot be written to, or others can write to it.
    """
    text = json.dumps({**facts, "sources": source_digest()}, sort_keys=True, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
    directory = root / digest
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        for path in (root, directory):
            _refuse_if_others_write(path)
        (directory / _FACTS).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"graph_cache_dir={str(root)!r} cannot be written to ({error.strerror}): name another directory"
        ) from None
    return directory


@cache
def source_digest() -> str:
    """Of this package's own code, every line of which may shape a graph."""
    digest = hashlib.sha256()
    package = Path(str(files("nanovllm_dist")))
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _refuse_if_others_write(path: Path) -> None:
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"graph_cache_dir: others may write to {str(path)!r}, which holds code that is executed: "
            "chmod go-w it, or name another directory"
        )
