"""Copies of a model on several hosts: where a host has its own, and whether that is the launcher's model.

It runs on every host of a cluster and knows neither the cluster nor what is inside a checkpoint's files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher.model_store import resolve_model


class Copy(NamedTuple):
    """A model directory, and a digest that copies of one model have in common."""

    directory: str
    digest: str


def find_copy(directory: str, source: str, hub: str, weights: bool) -> Copy:
    """The model on this host: in the launcher's `directory`, else where `source`, the name it was asked for by, leads.

    Without `weights` the digest is that of the config alone. Raises ModelNotFoundError, ConfigError, OSError.
    """
    if not (Path(directory) / "config.json").is_file():
        directory = str(resolve_model(source, hub=hub, progress=False).absolute())
    return Copy(directory, model_digest(Path(directory), weights))


def model_digest(directory: Path, weights: bool) -> str:
    """Of config.json, and with `weights` of the names and sizes of the weight files. Raises OSError."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")) if weights else []:
        digest.update(f"\0{file.name}\0{file.stat().st_size}".encode())
    return digest.hexdigest()


def check_same(own: Copy, own_host: str, other: Copy, host: str) -> None:
    """Raise EngineStartError if the copy on `host` is another model than the launcher's on `own_host`."""
    if own.digest != other.digest:
        raise EngineStartError(
            f"host {host} has another model in {other.directory} than host {own_host} in {own.directory}: config.json "
            "or the names and sizes of the *.safetensors files differ; put the same model on both"
        )
