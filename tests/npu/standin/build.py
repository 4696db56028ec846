"""Builds the libraries that stand in for CANN's, once per version of torch_npu and of their source, with gcc.

`library_directory()` is the folder to put into LD_LIBRARY_PATH. One library holds everything: the C sources beside
this file, and for each function that they lack one that answers 0. The names that torch_npu links with lead to it.
Does not know what the functions do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import symbols

_SOURCES = Path(__file__).parent / "cann"
_LIBRARY = "libnanovllm_cann_standin.so"
# torch_npu opens it by name, to look for operators in it; it has none, so that an operator nobody emulates is missed
# loudly.
_OPENED_BY_NAME = ("libopapi.so",)
_FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-Wall", "-Wextra")


def library_directory() -> Path:
    """The folder of the built libraries. Takes seconds the first time. Raises CalledProcessError with gcc's words."""
    directory = _cache() / f"cann-standin-{_digest()}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            _build(building)
            # of several processes that build at once the first one wins
            if not directory.exists():
                building.rename(directory)
        except OSError:
            if not directory.exists():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return directory


def library() -> Path:
    """The one library with all the code."""
    return library_directory() / _LIBRARY


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm_dist"


def _digest() -> str:
    digest = hashlib.sha256(importlib.metadata.version("torch_npu").encode())
    for source in [Path(__file__), Path(symbols.__file__), *sorted(_SOURCES.iterdir())]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(directory: Path) -> None:
    written = sorted(map(str, _SOURCES.glob("*.c")))
    trial = directory / "trial.so"
    _gcc(*written, "-o", str(trial))
    answered = sorted(set(symbols.missing_functions()) - symbols.defined_in(trial))
    trial.unlink()
    zeros = directory / "zeros.c"
    zeros.write_text(
        "".join(
            f'long zero_{i}(void) __asm__("{name}");\nlong zero_{i}(void) {{ return 0; }}\n'
            for i, name in enumerate(answered)
        )
    )
    _gcc(*written, str(zeros), "-o", str(directory / _LIBRARY))
    for name in [*symbols.missing_libraries(), *_OPENED_BY_NAME]:
        link = ("-Wl,--no-as-needed", f"-L{directory}", f"-l:{_LIBRARY}", "-Wl,-rpath,$ORIGIN")
        _gcc("-x", "c", "/dev/null", f"-Wl,-soname,{name}", *link, "-o", str(directory / name))


def _gcc(*arguments: str) -> None:
    headers = symbols.package_directory("torch_npu") / "include" / "third_party" / "acl" / "inc"
    command = ["gcc", *_FLAGS, f"-I{headers}", *arguments, "-lpthread", "-lrt"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc could not build the stand-in for CANN:\n{done.stderr[-4000:]}")
