"""`nanovllm-launch --doctor`: what is installed on this host, and whether an engine could start.

It looks and changes nothing. What there is to know of a device its platform says; this module only adds what every
engine needs.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from nanovllm_dist import __version__
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform import findings, get_platform
from nanovllm_dist.workers.platform.base import Finding

_OLDEST_PYTHON = (3, 10)
_OK, _REMARK, _BLOCKED = "ok", "note", "FIX"


def examine(device: str, write: Callable[[str], object] = print) -> int:
    """Write a table of findings and a verdict on `device` (`auto`: what would be taken); 0 if an engine can start.

    What another device lacks is remarked, and does not count.
    """
    found = [*common_findings(), *_of_platforms(device), _device(device)]
    for line in table(found):
        write(line)
    blocked = [finding for finding in found if finding.blocks]
    if blocked:
        write(f"verdict: {len(blocked)} to fix: {', '.join(finding.subject for finding in blocked)}")
        return 1
    write("verdict: ready")
    return 0


def table(found: list[Finding]) -> list[str]:
    """One line for each finding: what is to be done, subject, value; a remark goes below its value."""
    width = max(len(finding.subject) for finding in found)
    lines = []
    for finding in found:
        mark = _BLOCKED if finding.blocks else _REMARK if finding.remark else _OK
        lines.append(f"{mark:<5} {finding.subject:<{width}}  {finding.value}".rstrip())
        if finding.remark:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.remark}")
    return lines


def common_findings() -> list[Finding]:
    """What an engine needs on any device."""
    import zmq

    python = Finding("Python", platform.python_version())
    if sys.version_info < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        python = Finding("Python", platform.python_version(), f"{oldest} or newer is needed", blocks=True)
    across_hosts = "" if zmq.has("curve") else "built without CURVE: engines over several hosts cannot start"
    return [
        Finding("nanovllm_dist", __version__),
        python,
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        _package("torch", "pip install torch", needed=True),
        _package("transformers", "pip install transformers", needed=True),
        _package("ray", "launcher=local runs without; pip install 'nanovllm_dist[ray]' brings it", needed=False),
        Finding("ZeroMQ", f"{zmq.zmq_version()}, pyzmq {zmq.__version__}", across_hosts),
    ]


def _package(name: str, remark: str, needed: bool) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", remark, blocks=needed)


def _of_platforms(device: str) -> list[Finding]:
    try:
        chosen = get_platform(device).name
    except ConfigError:
        chosen = ""
    return [
        finding if name == chosen else replace(finding, blocks=False)
        for name, found in findings().items()
        for finding in found
    ]


def _device(name: str) -> Finding:
    try:
        chosen = get_platform(name)
    except ConfigError as error:
        return Finding(f"device {name}", "unknown", str(error), blocks=True)
    if not chosen.is_present():
        remark = f"the driver must show some, and pip install 'nanovllm_dist[{chosen.name}]' brings what torch needs"
        return Finding(f"device {name}", f"not usable; {chosen.count_devices()} visible", remark, blocks=True)
    value = chosen.name if name == "auto" else "usable"
    return Finding(f"device {name}", f"{value}, {chosen.count_devices()} of them")
