"""Which driver, CANN, torch and torch_npu are installed, and whether they fit together, read from files and metadata.

It imports none of them; only the last finding asks torch_npu itself, in a process of its own. That two versions fit
means that Huawei publishes them as a pair (CANN no older than the pair's), not that they were tried here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nanovllm_dist.workers.platform.base import Finding

_CANN_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
_CANN_PLACES = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest")
_DRIVER = "usr/local/Ascend/driver/version.info"
# torch_npu from this version on -> the CANN it is published with
_PAIRS = (
    ("2.9.0", "8.5.0"),
    ("2.9.0.post2", "9.0.0"),
    ("2.10.0", "9.0.0"),
    ("2.10.0.post4", "9.1.0"),
    ("2.11.0", "9.1.0"),
    ("2.12.0", "9.1.0"),
)
_OLDEST, _LAST_PAIRED = _PAIRS[0][0], "2.12"
# What torch_npu imports without declaring it
_UNDECLARED = {
    "numpy": "numpy",
    "yaml": "pyyaml",
    "google.protobuf": "protobuf",
    "packaging": "packaging",
    "scipy": "scipy",
    "attr": "attrs",
    "psutil": "psutil",
    "decorator": "decorator",
}
_PROBE_SECONDS = 120.0
_MARK = "nanovllm_dist:"  # libraries print lines of their own
_PROBE = """
import json, torch, torch_npu, torchair
devices = range(torch.npu.device_count())
memory = [torch.npu.mem_get_info(device) for device in devices]
print("nanovllm_dist:" + json.dumps([[torch.npu.get_device_name(device), *memory[device]] for device in devices]))
"""


def installed_version(package: str) -> str:
    """Of a distribution; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def findings(
    devices: int,
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
    installed: Callable[[str], str] = installed_version,
) -> list[Finding]:
    """Every part of the Ascend software; none where there is no trace of any.

    Args:
        devices: how many the driver shows.
        root: where the host's files are.
        installed: the version of a distribution, empty if it is missing.
    """
    driver = _value(root / _DRIVER, "Version")
    home, cann = _cann(root, environment)
    torch_npu = installed("torch_npu")
    if not (devices or driver or cann or torch_npu):
        return []
    found = [_devices(devices, driver), _driver(driver), _toolkit(home, cann, torch_npu, environment)]
    found += [_torch_npu(torch_npu, installed("torch")), *_undeclared(torch_npu)]
    if torch_npu and devices and not any(finding.blocks for finding in found):
        found.append(_probe())
    return found


def cann_key(text: str) -> tuple[int, int, int, int]:
    """A version of CANN as numbers in its order: 8.3.RC1 < 8.3.RC2 < 8.3.0.alpha1 < 8.3.0 < 8.5.0."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(?:RC|alpha|beta)(\d+))?", text, re.IGNORECASE)
    if match is None:
        return (0, 0, 0, 0)
    major, minor, patch, pre = match.groups()
    final = 2**31 if pre is None else int(pre)
    return int(major), int(minor), -1 if patch is None and pre is not None else int(patch or 0), final


def needed_cann(torch_npu: str) -> str:
    """The CANN that this torch_npu is published with, or the newest known for one that is newer than the list."""
    needed = _PAIRS[0][1]
    for package, cann in _PAIRS:
        if _package_key(torch_npu) >= _package_key(package):
            needed = cann
    return needed


def _package_key(text: str) -> tuple[int, ...]:
    """2.9.0.post2 -> (2, 9, 0, 2); a local part is left out."""
    numbers = [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
    return tuple([*numbers, 0, 0, 0, 0][:4])


def _devices(devices: int, driver: str) -> Finding:
    if devices:
        return Finding("NPUs", str(devices))
    why = "the driver shows this process none: look at npu-smi info, ASCEND_RT_VISIBLE_DEVICES and --device of docker"
    return Finding("NPUs", "0", why if driver else "", blocks=bool(driver))


def _driver(driver: str) -> Finding:
    missing = f"/{_DRIVER} is not there: install driver and firmware, or mount it into the container"
    return Finding("NPU driver", driver or "not found", "" if driver else missing)


def _toolkit(home: Path | None, cann: str, torch_npu: str, environment: Mapping[str, str]) -> Finding:
    if home is None or not cann:
        return Finding(
            "CANN", "not found", "install the CANN toolkit and source its set_env.sh", blocks=bool(torch_npu)
        )
    value = f"{cann} in {home}"
    if not any(environment.get(name) for name in _CANN_VARIABLES):
        return Finding("CANN", value, f"its environment is not set: source {home}/set_env.sh", blocks=True)
    needed = needed_cann(torch_npu) if torch_npu else ""
    if needed and cann_key(cann) < cann_key(needed):
        return Finding("CANN", value, f"torch_npu {torch_npu} needs CANN {needed} or newer", blocks=True)
    return Finding("CANN", value)


def _torch_npu(torch_npu: str, torch: str) -> Finding:
    if not torch_npu:
        return Finding("torch_npu", "not installed", f"pip install torch_npu=={torch.partition('+')[0]}", blocks=True)
    if _package_key(torch_npu) < _package_key(_OLDEST):
        return Finding("torch_npu", torch_npu, f"this package needs torch_npu {_OLDEST} or newer", blocks=True)
    if _package_key(torch_npu)[:3] != _package_key(torch)[:3]:
        wanted = ".".join(map(str, _package_key(torch_npu)[:3]))
        return Finding(
            "torch_npu", torch_npu, f"it needs torch {wanted}, and {torch or 'none'} is installed", blocks=True
        )
    if _package_key(torch_npu)[:2] > _package_key(_LAST_PAIRED)[:2]:
        return Finding(
            "torch_npu", torch_npu, "newer than the published pairs that are known here: see its release notes"
        )
    return Finding("torch_npu", torch_npu)


def _undeclared(torch_npu: str) -> list[Finding]:
    missing = [package for module, package in _UNDECLARED.items() if torch_npu and not _importable(module)]
    if not missing:
        return []
    return [Finding("needed by torch_npu", "missing", f"pip install {' '.join(missing)}", blocks=True)]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _cann(root: Path, environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """Where CANN is and which; the environment's before the usual places."""
    named = [environment[name].lstrip("/") for name in _CANN_VARIABLES if environment.get(name)]
    for place in (*named, *_CANN_PLACES):
        home = root / place
        for file in (*sorted(home.glob("*-linux/ascend_toolkit_install.info")), home / "ascend_toolkit_install.info"):
            if found := _value(file, "version"):
                return Path("/") / place, found
        if found := _value(home / "version.cfg", "toolkit_running_version", "runtime_running_version"):
            return Path("/") / place, found.strip("[]").rpartition(":")[2]
    return None, ""


def _value(file: Path, *keys: str) -> str:
    """The value of the first `key=value` line whose key, in any case, is among `keys`; empty without one."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip().lower() in [wanted.lower() for wanted in keys] and value.strip():
            return value.strip()
    return ""


def _probe() -> Finding:
    """What torch_npu itself says, in a process of its own: importing it without a driver can end the process."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return Finding("torch_npu opens", "no", f"no answer within {_PROBE_SECONDS:.0f} s", blocks=True)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return Finding("torch_npu opens", "no", last, blocks=True)
    lines = [line.removeprefix(_MARK) for line in answer.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = (answer.stdout.strip().splitlines() or ["nothing"])[-1]
        return Finding("torch_npu opens", "no", f"it was asked for its devices and said: {last}", blocks=True)
    devices = json.loads(lines[-1])
    listed = "; ".join(f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free" for name, free, total in devices)
    return Finding("torch_npu opens", listed or "no device", blocks=not devices)
