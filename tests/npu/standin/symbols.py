"""What torch_npu wants of CANN: the libraries it links with and the functions that nothing installed defines.

Read from the installed torch_npu with `nm` and `readelf`, so no list is kept that could grow stale. Knows nothing of
what the functions do, or of their arguments.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

# Names that the loader or the interpreter provides.
_NOT_CANN = re.compile(r"^(_?Py|_ITM_|__gmon|_ZTH)")


def package_directory(name: str) -> Path:
    """Where a package is installed, without importing it. Raises ModuleNotFoundError where it is not."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed in this environment: use scripts/test --npu")
    return Path(spec.origin).parent


def missing_libraries() -> list[str]:
    """File names of shared libraries that torch_npu links with and that are not on this machine."""
    here = {path.name for path in [*_torch_npu(), *_torch()]}
    return sorted(name for name in _needed() - here if _system_library(name) is None)


def missing_functions() -> list[str]:
    """Names that torch_npu's libraries need at load time and that nothing on this machine defines."""
    system = [path for path in map(_system_library, sorted(_needed())) if path is not None]
    needed = _names("--undefined-only", _torch_npu(), kinds="U")
    defined = _names("--defined-only", [*_torch_npu(), *_torch(), *system])
    return sorted(name for name in needed - defined if not _NOT_CANN.match(name))


def defined_in(library: Path) -> set[str]:
    """Names that a shared library exports."""
    return _names("--defined-only", [library])


def _needed() -> set[str]:
    lines = _tool("readelf", "--dynamic", *_torch_npu())
    return {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}


def _torch_npu() -> list[Path]:
    return sorted(package_directory("torch_npu").rglob("*.so"))


def _torch() -> list[Path]:
    return sorted((package_directory("torch") / "lib").glob("*.so*"))


def _system_library(name: str) -> Path | None:
    path = Path(_tool("gcc", f"-print-file-name={name}")[0])
    return path if path.is_absolute() and path.exists() else None


def _names(selection: str, libraries: list[Path], kinds: str = "") -> set[str]:
    fields = [line.split() for line in _tool("nm", "--dynamic", "--format=posix", selection, *libraries)]
    return {f[0].split("@")[0] for f in fields if len(f) > 1 and (not kinds or f[1] in kinds)}


def _tool(*command: str | Path) -> list[str]:
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is missing: the stand-in for CANN is built with gcc and binutils") from error
    return done.stdout.splitlines()
