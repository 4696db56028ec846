"""Turns the name of a model into a local directory: a path, an alias, a model root, or a hub.

It knows names and places, not what is inside a checkpoint. Only data is fetched: no Python files, no pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nanovllm_dist.errors import ConfigError, ModelNotFoundError
from nanovllm_dist.launcher.packaged_model import ALIASES, resolve_packaged

ALLOW_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
IGNORE_PATTERNS = ["original/*", "consolidated*.safetensors", "onnx/*"]  # second copies of the weights
_CONNECT_TIMEOUT_S = 10.0

# how a bare name begins -> the organisation that publishes it, per hub
_FAMILIES = {
    r"(Qwen[23]|QwQ)": {"huggingface": "Qwen", "modelscope": "Qwen"},
    r"(Meta-)?Llama-3": {"huggingface": "meta-llama", "modelscope": "LLM-Research"},
    r"SmolLM[23]-": {"huggingface": "HuggingFaceTB", "modelscope": "HuggingFaceTB"},
    r"MiniCPM": {"huggingface": "openbmb", "modelscope": "OpenBMB"},
}


def resolve_model(name: str, *, hub: str = "huggingface", progress: bool = True) -> Path:
    """The local directory of the model `name`, fetched if need be; `progress` shows bars on standard error.

    Tried in order: a directory; an alias; a bare name under the model roots; a hub id `org/name` (a bare name of a
    known family gets its organisation), first in the hub's local cache. See `model_roots`.

    Raises:
        ModelNotFoundError: it is in none of these places, or cannot be fetched; the message lists them.
        ConfigError: `hub` is unknown or its package is not installed.
    """
    if hub not in ("huggingface", "modelscope"):
        raise ConfigError(f"hub={hub!r} is not one of huggingface, modelscope")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _checked(path)
    if _is_path(name):
        raise ModelNotFoundError(f"{name!r} is not a directory: give the directory that holds config.json")
    if name.lower() in ALIASES:
        return resolve_packaged(ALIASES[name.lower()], cache_dir() / "models", progress=progress)
    looked = [str(path.absolute())]
    for root in model_roots():
        if (root / name / "config.json").is_file():
            return root / name
        looked.append(str(root / name))
    repo = name if "/" in name else _repo_of_family(name, hub)
    if repo is None:
        raise _not_found(name, looked, f"{name!r} is of no known family: give a hub id (org/{name})")
    return _from_hub(name, repo, hub, progress, looked)


def cache_dir() -> Path:
    """Where this package keeps what it fetched: $NANOVLLM_CACHE, or ~/.cache/nanovllm_dist."""
    return Path(os.environ.get("NANOVLLM_CACHE") or "~/.cache/nanovllm_dist").expanduser()


def model_roots() -> list[Path]:
    """Directories that hold model directories: $NANOVLLM_MODEL_ROOTS, or ~/huggingface and ~/models; the cache last."""
    given = os.environ.get("NANOVLLM_MODEL_ROOTS")
    names = given.split(os.pathsep) if given else ["~/huggingface", "~/models"]
    return [*(Path(root).expanduser() for root in names if root), cache_dir() / "models"]


def _is_path(name: str) -> bool:
    """Whether `name` can only be meant as a path: hub ids are `org/name`, of letters, digits, `.`, `_` and `-`."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is None


def _checked(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} has no config.json: it is not a model directory")
    return path


def _repo_of_family(name: str, hub: str) -> str | None:
    for pattern, organisations in _FAMILIES.items():
        if re.match(pattern, name):
            return f"{organisations[hub]}/{name}"
    return None


class _HubError(Exception):
    """Why a hub gave nothing, in words for the user."""


def _from_hub(name: str, repo: str, hub: str, progress: bool, looked: list[str]) -> Path:
    fetch = _from_huggingface if hub == "huggingface" else _from_modelscope
    with contextlib.suppress(_HubError):
        cached = fetch(repo, local_only=True, progress=progress)
        if _has_all_weights(cached):
            return cached
    looked.append(f"the local cache of {hub}: {repo}")
    try:
        return _checked(fetch(repo, local_only=False, progress=progress))
    except _HubError as error:
        raise _not_found(name, [*looked, f"{hub}: {repo}"], f"{hub} said: {error}") from error.__cause__


def _from_huggingface(repo: str, *, local_only: bool, progress: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with contextlib.nullcontext() if progress else _no_hub_progress():
        try:
            if not local_only:
                # snapshot_download's own first question has no time limit and hangs where a firewall drops packets
                HfApi().model_info(repo, timeout=_CONNECT_TIMEOUT_S)
            snapshot = snapshot_download(
                repo, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS, local_files_only=local_only
            )
        except GatedRepoError as error:
            raise _HubError(f"{repo} is gated: accept its licence on its page, then run `hf auth login`") from error
        except RepositoryNotFoundError as error:
            raise _HubError(f"there is no {repo}, or it is private: `hf auth login` if it is yours") from error
        except Exception as error:  # the HTTP library beneath, and so its errors, changes between releases
            raise _HubError(_first_line(error)) from error
    return Path(snapshot)


@contextlib.contextmanager
def _no_hub_progress() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _from_modelscope(repo: str, *, local_only: bool, progress: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError(
            "hub=modelscope needs the modelscope extra: pip install 'nanovllm_dist[modelscope]'"
        ) from None
    try:  # it has no switch for its progress bars
        return Path(
            snapshot_download(
                repo, allow_patterns=ALLOW_PATTERNS, ignore_patterns=IGNORE_PATTERNS, local_files_only=local_only
            )
        )
    except Exception as error:  # its errors share no base class
        raise _HubError(_first_line(error)) from error


def _has_all_weights(directory: Path) -> bool:
    """Whether an interrupted download left nothing out: a hub cache lists a snapshot from its first file on."""
    if not (directory / "config.json").is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((directory / shard).is_file() for shard in shards)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _not_found(name: str, looked: list[str], reason: str) -> ModelNotFoundError:
    places = "\n".join(f"  - {place}" for place in looked)
    return ModelNotFoundError(
        f"the model {name!r} was not found. Looked in:\n{places}\n{reason}\n"
        "Give the path of a model directory, add its parent to NANOVLLM_MODEL_ROOTS, or use a packaged model: "
        f"{', '.join(ALIASES)}"
    )
