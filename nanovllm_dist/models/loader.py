"""Weights from safetensors files into a model's parameters: each rank reads its own slices, all names accounted for.

It knows no architecture: a model declares its tensors as shards, and the checkpoint must hold exactly those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanovllm_dist.errors import WeightsError
from nanovllm_dist.models.layers.shard import Loadable, Shard

Progress = Callable[[int, int], None]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LFS_MAGIC = b"version https://git-lfs"
_DTYPES = ("F32", "BF16", "F16")
_DUMMY_STD = 0.02
_DUMMY_CHUNK_ROWS = 1024


def load_weights(model: Loadable, model_dir: str | Path, progress: Progress | None = None) -> None:
    """Fill every parameter of `model` from the checkpoint in `model_dir`; call `progress(done, total)` per tensor.

    Raises:
        WeightsError: a tensor is missing, not expected, of another shape or dtype, or a file cannot be read; the
            message names tensor and file. The parameters are then partly filled and must not be used.
    """
    directory = Path(model_dir)
    shards = list(model.shards())
    with ExitStack() as stack:
        files = _Checkpoint(directory, stack)
        _account_for_names(shards, files.locations, model.unused_tensors)
        for done, shard in enumerate(shards):
            if progress is not None:
                progress(done, len(shards))
            _fill(shard, files)
    if progress is not None:
        progress(len(shards), len(shards))


class _Checkpoint:
    """The safetensors files of a directory: which tensor is in which, each opened once."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._open: dict[str, Any] = {}
        self.locations = self._locate()

    def slice_of(self, name: str) -> tuple[Any, str]:
        """(the tensor's lazy slice, its file's name)."""
        file = self.locations[name]
        try:
            return self.file(file).get_slice(name), file
        except SafetensorError as error:
            raise WeightsError(f"{name} is not in {file}, where {_INDEX} says it is: {error}") from None

    def file(self, name: str) -> Any:
        """The open file of that name."""
        if name not in self._open:
            path = self._directory / name
            _check_readable(path)
            try:
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{name} is truncated or not a safetensors file: {error}") from None
        return self._open[name]

    def _locate(self) -> dict[str, str]:
        if (self._directory / _INDEX).is_file():
            return _read_index(self._directory / _INDEX)
        if (self._directory / _SINGLE).is_file():
            names = [_SINGLE]
        else:
            names = sorted(path.name for path in self._directory.glob("*.safetensors"))
        if not names:
            raise WeightsError(_no_safetensors(self._directory))
        return {tensor: name for name in names for tensor in self.file(name).keys()}  # noqa: SIM118


def _read_index(path: Path) -> dict[str, str]:
    _check_readable(path)
    try:
        locations = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(locations.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path.name} is not an index with a weight_map: {error}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(f"{path.name} names {file!r}, which is not a file of its own directory")
        if not (path.parent / file).is_file():
            tensor = next(name for name, place in locations.items() if place == file)
            raise WeightsError(f"{file}, which holds {tensor} according to {path.name}, does not exist: download it")
    return dict(locations)


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_MAGIC))
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be read: {error.strerror}") from None
    if head == _LFS_MAGIC:
        raise WeightsError(
            f"{path.name} is a Git-LFS pointer, not the file itself: run `git lfs pull` in the model directory"
        )


def _no_safetensors(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pth", ".pt", ".gguf"))
    if others:
        return f"{directory} has {', '.join(others[:3])} but no *.safetensors: only safetensors is read, convert it"
    return f"{directory} has no *.safetensors file"


def _account_for_names(shards: list[Shard], locations: dict[str, str], unused: tuple[str, ...]) -> None:
    wanted = {shard.name for shard in shards}
    missing = sorted(wanted - locations.keys())
    if missing:
        files = ", ".join(sorted(set(locations.values()))[:3])
        raise WeightsError(f"the checkpoint ({files}) lacks {_some(missing)}")
    extra = sorted(name for name in locations.keys() - wanted if not any(fnmatch(name, pattern) for pattern in unused))
    if extra:
        raise WeightsError(f"{locations[extra[0]]} has tensors that the model has no place for: {_some(extra)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fill(shard: Shard, files: _Checkpoint) -> None:
    source, file = files.slice_of(shard.name)
    shape, dtype = tuple(source.get_shape()), source.get_dtype()
    if shape != shard.shape:
        raise WeightsError(f"{shard.name} in {file} has shape {list(shape)}, the config makes it {list(shard.shape)}")
    if dtype not in _DTYPES:
        raise WeightsError(f"{shard.name} in {file} is {dtype}; supported are {', '.join(_DTYPES)}")
    own = slice(shard.start, shard.end)
    with torch.no_grad():
        shard.target.copy_(source[own] if shard.dim == 0 else source[:, own])


def dummy_weights(model: Loadable, seed: int) -> None:
    """Fill every parameter with small random numbers (norm weights with ones), straight on its device.

    A tensor's values depend on its name and `seed` only: any number of ranks holds the same model. Ranks in one
    group must share a kind of device and a dtype for that.
    """
    for shard in model.shards():
        if shard.dummy == "ones":
            shard.target.fill_(1.0)
        else:
            _fill_random(shard, seed)


def _fill_random(shard: Shard, seed: int) -> None:
    """Rows come in chunks, each with a seed of its own, so that a rank makes only the chunks it has part of."""
    rows = shard.shape[0]
    own_first, own_last = (shard.start, shard.end) if shard.dim == 0 else (0, rows)
    generator = torch.Generator(shard.target.device)
    for chunk in range(own_first // _DUMMY_CHUNK_ROWS, -(-own_last // _DUMMY_CHUNK_ROWS)):
        start = chunk * _DUMMY_CHUNK_ROWS
        end = min(start + _DUMMY_CHUNK_ROWS, rows)
        generator.manual_seed(_chunk_seed(shard.name, chunk, seed))
        values = torch.empty(end - start, *shard.shape[1:], device=shard.target.device)
        values.normal_(0.0, _DUMMY_STD, generator=generator)
        first, last = max(start, own_first), min(end, own_last)
        part = values[first - start : last - start]
        if shard.dim == 1:
            part = part[:, shard.start : shard.end]
        shard.target[first - own_first : last - own_first].copy_(part)


def _chunk_seed(name: str, chunk: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
