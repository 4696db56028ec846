"""Commands in deploy/ and docs/ascend.md are ones that exist: every option is looked up in the command line itself."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from nanovllm_dist.launcher.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["docs/ascend.md", "deploy/volcano.yaml", "deploy/Dockerfile", "README.md", "README.zh-CN.md"]
LAUNCH_OPTIONS = {
    flag
    for parameter in typer.main.get_command(app).params
    for flag in (*parameter.opts, *parameter.secondary_opts)
    if flag.startswith("-")
} | {"--help"}


def commands(text: str, program: str) -> list[list[str]]:
    """The words after each call of `program` in code, continued lines joined; comments and closing quotes end one."""
    joined = re.sub(r"\\\n\s*", " ", text)
    calls = re.findall(rf"(?<![\w/-]){re.escape(program)}((?: +[^\n`#]*)?)", joined)
    return [shlex.split(call, comments=True, posix=False) for call in calls]


def options(words: list[str]) -> set[str]:
    """Those among the words that are options, without values."""
    return {word.split("=")[0].rstrip(",;:") for word in words if re.match(r"--?[a-z]", word)}


def submit_parser() -> Any:
    spec = importlib.util.spec_from_file_location("submit_ray_job", ROOT / "scripts" / "submit_ray_job.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._parser()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_of_nanovllm_launch_exists(document: str) -> None:
    calls = commands((ROOT / document).read_text(), "nanovllm-launch")
    assert {flag for call in calls for flag in options(call)} - LAUNCH_OPTIONS == set()


def test_the_pages_do_show_commands() -> None:
    shown = [
        flag
        for name in DOCUMENTS[:2]
        for call in commands((ROOT / name).read_text(), "nanovllm-launch")
        for flag in call
    ]
    assert {"--tp", "--graph-mode", "--doctor", "--ray-address", "--prompts-file"} <= set(shown)


def test_jobs_are_submitted_as_the_page_says() -> None:
    parser = submit_parser()
    calls = commands((ROOT / "docs/ascend.md").read_text(), "scripts/submit_ray_job.py")
    assert {call[0] for call in calls} >= {"generate", "list", "stop"}
    for call in calls:
        given, rest = parser.parse_known_args(call)
        assert given.action == call[0]
        assert options(rest) <= LAUNCH_OPTIONS


def test_the_page_opens_the_dashboard_that_its_jobs_are_sent_to() -> None:
    page = (ROOT / "docs/ascend.md").read_text()
    (head,) = (call for call in commands(page, "ray start") if "--head" in call)
    opened = {word.split("=")[1] for word in head if word.startswith("--dashboard-host=")}
    assert opened == set(re.findall(r"http://([^:/\s]+):8265", page))


def test_the_pods_run_scripts_that_the_shell_and_python_can_read() -> None:
    job = yaml.safe_load((ROOT / "deploy/volcano.yaml").read_text())
    scripts = [task["template"]["spec"]["containers"][0]["args"][0] for task in job["spec"]["tasks"]]
    programs = []
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
        # what the shell itself hands to Python, after its quotes
        shown = (
            f"python3() {{ printf '%s\\0' \"$2\" >&2; echo 16; }}; ray() {{ :; }}; nanovllm-launch() {{ :; }}\n{script}"
        )
        done = subprocess.run(["bash", "-ec", shown], capture_output=True, text=True, check=True, timeout=30)
        programs += [program for program in done.stderr.split("\0") if program]
    assert [ast.unparse(ast.parse(program)).count("cluster_resources") for program in programs] == [1]


def test_the_job_asks_for_as_many_npus_as_its_engine_has_ranks() -> None:
    job = yaml.safe_load((ROOT / "deploy/volcano.yaml").read_text())
    devices, scripts = 0, []
    for task in job["spec"]["tasks"]:
        (container,) = task["template"]["spec"]["containers"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests
        devices += task["replicas"] * limits["huawei.com/Ascend910"]
        scripts.append(container["args"][0])
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in task["template"]["spec"]["volumes"]
        }
    assert job["spec"]["minAvailable"] == sum(task["replicas"] for task in job["spec"]["tasks"])
    assert f"--tp {devices}" in scripts[0]
    assert all("--resources='{\"NPU\": 8}'" in script for script in scripts)
