"""What --doctor says of an Ascend host, from files in a temporary root: versions, and pairs that do not fit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nanovllm_dist.workers.platform import npu_versions
from nanovllm_dist.workers.platform.base import Finding
from nanovllm_dist.workers.platform.npu_versions import cann_key, needed_cann

HOME = "/usr/local/Ascend/cann"
ENVIRONMENT = {"ASCEND_TOOLKIT_HOME": HOME}


class Host:
    """Files and packages of an Ascend host."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages = {"torch": "2.12.0+cpu", "torch_npu": "2.12.0"}

    def file(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def cann(self, version: str, home: str = HOME) -> None:
        self.file(f"{home}/aarch64-linux/ascend_toolkit_install.info", f"package_name=x\nversion={version}\narch=x\n")

    def found(self, environment: dict[str, str] = ENVIRONMENT, devices: int = 8) -> dict[str, Finding]:
        findings = npu_versions.findings(devices, self.root, environment, lambda name: self.packages.get(name, ""))
        return {finding.subject: finding for finding in findings}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(npu_versions, "_importable", lambda module: True)
    monkeypatch.setattr(npu_versions, "_probe", lambda: Finding("torch_npu opens", "Ascend910B4"))
    host = Host(tmp_path)
    host.file("/usr/local/Ascend/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\n")
    host.cann("9.1.0")
    return host


def test_a_host_whose_versions_fit_has_nothing_to_mend(host: Host) -> None:
    found = host.found()
    assert [finding for finding in found.values() if finding.blocks or finding.remark] == []
    assert found["NPU driver"].value == "25.5.0"
    assert found["CANN"].value == f"9.1.0 in {HOME}"
    assert found["torch_npu opens"].value == "Ascend910B4"


def test_a_host_without_a_trace_of_ascend_has_no_findings(tmp_path: Path) -> None:
    assert npu_versions.findings(0, tmp_path, {}, lambda name: "") == []


def test_a_torch_npu_for_another_torch_is_refused(host: Host) -> None:
    host.packages["torch"] = "2.13.0+cpu"
    finding = host.found()["torch_npu"]
    assert finding.blocks
    assert finding.remark == "it needs torch 2.12.0, and 2.13.0+cpu is installed"


@pytest.mark.parametrize(("torch_npu", "cann"), [("2.12.0", "9.0.0"), ("2.9.0.post2", "8.5.0"), ("2.9.0", "8.3.RC2")])
def test_a_cann_older_than_the_published_pair_is_refused(host: Host, torch_npu: str, cann: str) -> None:
    host.packages.update(torch=torch_npu[:6].rstrip("."), torch_npu=torch_npu)
    host.cann(cann)
    finding = host.found()["CANN"]
    assert finding.blocks
    assert f"torch_npu {torch_npu} needs CANN {needed_cann(torch_npu)} or newer" in finding.remark


def test_a_torch_npu_newer_than_the_known_pairs_is_remarked_and_not_refused(host: Host) -> None:
    host.packages.update(torch="2.14.0", torch_npu="2.14.0")
    finding = host.found()["torch_npu"]
    assert (finding.blocks, "newer than" in finding.remark) == (False, True)


def test_a_torch_npu_that_is_too_old_is_refused(host: Host) -> None:
    host.packages.update(torch="2.6.0", torch_npu="2.6.0")
    assert "needs torch_npu 2.9.0 or newer" in host.found()["torch_npu"].remark


def test_without_torch_npu_the_one_for_this_torch_is_named(host: Host) -> None:
    del host.packages["torch_npu"]
    finding = host.found()["torch_npu"]
    assert (finding.blocks, finding.remark) == (True, "pip install torch_npu==2.12.0")


def test_a_toolkit_whose_environment_is_not_set_says_what_to_source(host: Host) -> None:
    finding = host.found(environment={})["CANN"]
    assert finding.blocks
    assert f"source {HOME}/set_env.sh" in finding.remark


def test_the_toolkit_of_the_environment_comes_before_the_usual_place(host: Host) -> None:
    host.cann("9.2.0", home="/opt/cann")
    assert host.found({"ASCEND_HOME_PATH": "/opt/cann"})["CANN"].value == "9.2.0 in /opt/cann"


def test_older_toolkits_are_read_from_version_cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_versions, "_importable", lambda module: True)
    host = Host(tmp_path)
    home = "/usr/local/Ascend/ascend-toolkit/latest"
    host.file(f"{home}/version.cfg", "# version: 1.0\nruntime_running_version=[7.7.0.1.238:8.2.RC1]\n")
    finding = host.found({"ASCEND_TOOLKIT_HOME": home})["CANN"]
    assert finding.value == f"8.2.RC1 in {home}"
    assert finding.blocks


def test_a_driver_that_shows_no_device_is_an_error_and_a_missing_version_file_only_a_remark(host: Host) -> None:
    assert host.found(devices=0)["NPUs"].blocks
    (host.root / "usr/local/Ascend/driver/version.info").unlink()
    assert not host.found()["NPU driver"].blocks
    assert "mount it into the container" in host.found()["NPU driver"].remark


def test_modules_that_torch_npu_needs_and_does_not_declare_are_named(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_versions, "_importable", lambda module: module not in ("attr", "decorator"))
    assert host.found()["needed by torch_npu"].remark == "pip install attrs decorator"


def test_versions_of_cann_have_an_order() -> None:
    rising = ["8.0.RC3", "8.0.0", "8.2.RC1", "8.3.RC1", "8.3.RC2", "8.5.0.alpha002", "8.5.0", "9.0.0", "9.1.0"]
    assert sorted(random.Random(1).sample(rising, len(rising)), key=cann_key) == rising
    assert cann_key("garbage") < cann_key("1.0")


@pytest.mark.parametrize(
    ("torch_npu", "cann"),
    [("2.9.0", "8.5.0"), ("2.9.0.post1", "8.5.0"), ("2.9.0.post2", "9.0.0"), ("2.10.0", "9.0.0"), ("2.13.0", "9.1.0")],
)
def test_each_torch_npu_has_the_cann_it_is_published_with(torch_npu: str, cann: str) -> None:
    assert needed_cann(torch_npu) == cann


@pytest.mark.parametrize(
    ("program", "blocks", "value"),
    [
        (
            """print('a banner'); print('nanovllm_dist:[["Ascend910B4", 1073741824, 2147483648]]'); print('bye')""",
            False,
            "Ascend910B4, 1 of 2 GiB free",
        ),
        ("print('a banner')", True, "no"),
        ("pass", True, "no"),
        ("raise SystemExit(3)", True, "no"),
        ("print('nanovllm_dist:[]')", True, "no device"),
    ],
)
def test_what_torch_npu_says_of_its_devices_is_told_from_what_libraries_print(
    monkeypatch: pytest.MonkeyPatch, program: str, blocks: bool, value: str
) -> None:
    monkeypatch.setattr(npu_versions, "_PROBE", program)
    finding = npu_versions._probe()
    assert (finding.blocks, finding.value) == (blocks, value)
