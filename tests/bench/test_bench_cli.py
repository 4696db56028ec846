"""The command line: grouped help, one list of engine options, readable errors with the launcher's exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner, Result

from nanovllm_dist.bench.cli import app
from nanovllm_dist.bench.options import engine_config
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError

COMMANDS = ("throughput", "latency", "startup", "load", "suite")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def options_of(command: str) -> dict[str, click.Parameter]:
    group = typer.main.get_command(app)
    return {str(parameter.name): parameter for parameter in group.commands[command].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_engine_option_of_the_launcher_is_there(command: str) -> None:
    from nanovllm_dist.launcher.cli import app as launcher

    theirs = {parameter.name: parameter.opts for parameter in typer.main.get_command(launcher).params}
    ours = options_of(command)
    for field in sorted({*EngineConfig.__struct_fields__} - {"model_source"}):  # which resolving fills in
        assert ours[field].opts == theirs[field]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped_and_names_the_workloads(command: str) -> None:
    result = bench(command, "--help")
    assert result.exit_code == 0
    for heading in ("Measurement", "Model", "Batching", "KV cache", "Processes and network"):
        assert heading in result.output
    if command not in ("startup", "load"):
        assert "upstream_seed0" in result.output
    assert "Sampling" not in result.output


def test_the_engine_gets_the_options_that_were_set_and_no_others() -> None:
    given = {"model": "m", "tensor_parallel_size": 2, "kv_cache_memory": "1GiB", "dtype": None}
    assert engine_config(given) == EngineConfig(model="m", tensor_parallel_size=2, kv_cache_memory=2**30)


def test_a_config_file_sets_engine_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: m\ntp: 2\nmax-num-seqs: 8\n")
    config = engine_config({"config": str(path), "max_num_seqs": 4})
    assert config == EngineConfig(model="m", tensor_parallel_size=2, max_num_seqs=4)


def test_a_config_file_with_an_option_that_is_none_names_the_closest(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: m\nmax-num-seq: 8\n")
    with pytest.raises(ConfigError, match="did you mean 'max-num-seqs'"):
        engine_config({"config": str(path)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("throughput", "-m", "x", "-w", "c3"), ("'c3'", "upstream_seed0", "ascend_143770", "c1", "c2", "random")),
        (("throughput", "-m", "x", "-w", "c1", "--input-len", "5"), ("--input-len", "random", "fixed")),
        (("throughput", "-m", "x", "-w", "random", "--range-ratio", "2"), ("--range-ratio 2.0",)),
        (("throughput", "-m", "x", "--runs", "0"), ("--runs 0",)),
        (("latency", "-m", "x", "--temperature", "-1"), ("temperature=-1.0",)),
        (("latency", "-m", "x", "--bandwidth", "44"), ("both --bandwidth and --flops",)),
        (("latency", "-m", "x", "--bandwidth", "0", "--flops", "1"), ("positive",)),
        (("startup", "-m", "x", "--json", "/nowhere/at/all.json"), ("--json /nowhere/at/all.json",)),
        (("load", "-m", "x", "--rate", "0"), ("--rate 0",)),
        (("load", "-m", "x", "--rate", "4", "--rate", "-1"), ("--rate 4 -1",)),
        (("load", "-m", "x", "--seconds", "0"), ("--seconds 0",)),
        (("load", "-m", "{tiny}", "--range-ratio", "1"), ("--range-ratio 1.0",)),
        (("suite", "-m", "x", "-w", "c3", "--output", "out"), ("'c3'", "single")),
        (("suite", "-m", "x", "-w", "c1", "--num-requests", "4", "-w", "single", "-o", "/dev/null/x"), ("--output",)),
        (("scheduler", "--steps", "0"), ("--steps 0",)),
        (("scheduler", "--plot", "/nowhere/at/all.svg"), ("--plot /nowhere/at/all.svg",)),
        (("startup", "-m", "x", "--tp", "0"), ("tensor_parallel_size=0",)),
        (("startup",), ("--model",)),
        (("throughput", "-m", "x", "--device", "abacus"), ("abacus",)),
    ],
)
def test_a_wrong_command_line_is_one_readable_line_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...], tiny_model: Path
) -> None:
    result = bench(*(str(tiny_model) if one == "{tiny}" else one for one in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_an_unknown_rival_is_refused() -> None:
    assert bench("throughput", "-m", "x", "--compare", "nothing").exit_code == 2


def test_a_model_that_is_not_there_is_exit_code_1(tmp_path: Path) -> None:
    result = bench("startup", "-m", str(tmp_path / "absent"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "absent" in result.stderr


def test_work_that_does_not_fit_the_model_is_refused_before_an_engine_starts(tiny_model: Path) -> None:
    result = bench("throughput", "-m", str(tiny_model), "--load-format", "dummy", "-w", "upstream_seed0")
    assert result.exit_code == 2
    assert "workload upstream_seed0 has a request of" in result.stderr
    assert "512" in result.stderr


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = bench("scheduler", "--plot", str(tmp_path / "costs.svg"))
    assert result.exit_code == 2
    assert result.stderr == "error: --plot needs matplotlib: install nanovllm_dist[bench]\n"


@pytest.mark.parametrize("command", ["throughput", "load", "suite"])
@pytest.mark.parametrize("steps", ["1", "10001"])
def test_a_number_of_steps_that_cannot_be_traced_is_refused(command: str, steps: str, tmp_path: Path) -> None:
    where = ("--output", str(tmp_path)) if command == "suite" else ()
    result = bench(command, "-m", "none", *where, "--trace-steps", steps)
    assert result.exit_code == 2
    assert f"--trace-steps {steps} is not from 2 to 10,000" in result.output


@pytest.mark.parametrize("command", ["throughput", "load"])
def test_a_trace_that_could_not_be_kept_is_refused_before_the_measurement(command: str, tmp_path: Path) -> None:
    result = bench(command, "-m", "none", "--trace", str(tmp_path / "no" / "such.trace"))
    assert result.exit_code == 2
    assert "--trace" in result.output
