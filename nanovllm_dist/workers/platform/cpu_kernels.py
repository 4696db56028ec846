"""Builds and loads the CPU's C kernels with the machine's own compiler, once per machine; without one there are none.

A library lies in the cache directory under a name that holds everything it depends on: source, flags, compiler
and processor. It knows how to build, not what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger("worker")

_SOURCE = Path(__file__).with_name("cpu_step.c")
_PARTS = ("products", "layers", "prefill", "dot", "decode", "group", "batch", "sampler", "decoder")
_SOURCES = (
    _SOURCE,
    *(_SOURCE.with_name(f"cpu_{part}.c") for part in _PARTS),
)
_COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# linked apart, without -ffast-math: with it the library would flush denormals to zero in the whole process
_LINK = ("-shared", "-fopenmp", "-lm")
_BUILD_SECONDS = 60


@functools.cache
def kernel_library() -> ctypes.CDLL | None:
    """The loaded library of all kernels, or None (and a line in the log) where it cannot be built."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info("no C compiler: torch's own operators run on the CPU, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        log.warning("the CPU kernels were not built: %s %s", error, output[-500:])
        return None


def _built(compiler: str) -> Path:
    # libgomp, which torch has loaded, is shared with it; 512-bit vectors are a third faster where there are any
    flags = [*_COMPILE, *(["-mprefer-vector-width=512"] if "avx512f" in _processor() else [])]
    program = Path(shutil.which(compiler.split()[0]) or compiler).resolve()
    status = program.stat()  # a newer compiler in the same place has another size or time
    parts = [
        *(source.read_text() for source in _SOURCES),
        compiler,
        f"{program} {status.st_size} {status.st_mtime_ns}",
        *flags,
        *_LINK,
        _processor(),
    ]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    path = _directory() / f"cpu_kernels-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            compiled, built = Path(scratch) / "cpu_kernels.o", Path(scratch) / path.name
            for command in ([*flags, str(_SOURCE), "-o", str(compiled)], [str(compiled), *_LINK, "-o", str(built)]):
                subprocess.run([*compiler.split(), *command], check=True, capture_output=True, timeout=_BUILD_SECONDS)
            os.replace(built, path)
    return path


def _directory() -> Path:
    root = os.environ.get("NANOVLLM_CACHE") or Path.home() / ".cache" / "nanovllm_dist"
    directory = Path(root) / "kernels"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{directory} is or may be written by another user: code is not loaded from it")
    return directory


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
