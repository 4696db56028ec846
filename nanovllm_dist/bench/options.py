"""The benchmark's own options, and the launcher's engine options for every command.

The engine options are read from `nanovllm-launch` itself, so that there is one list of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from nanovllm_dist.bench.roofline import Hardware
from nanovllm_dist.bench.workloads import RANDOM, Workload, make_workload, workload_names
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.launcher.cli import app, launch
from nanovllm_dist.launcher.invocation import build_invocation, read_config_file
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import TRACE_LIMIT

_WORK, _MEASURE, _LIMIT = "Work", "Measurement", "Physical limit (of one device)"

WorkloadName = Annotated[
    str, typer.Option("--workload", "-w", help=f"One of {', '.join(workload_names())}.", rich_help_panel=_WORK)
]
NumRequests = Annotated[int | None, typer.Option("--num-requests", help="random: (64)", rich_help_panel=_WORK)]
InputLen = Annotated[int | None, typer.Option("--input-len", help="random: prompt tokens (128)", rich_help_panel=_WORK)]
OutputLen = Annotated[
    int | None, typer.Option("--output-len", help="random: answer tokens (128)", rich_help_panel=_WORK)
]
RangeRatio = Annotated[
    float | None,
    typer.Option("--range-ratio", help="random: lengths vary by this share, up and down (0)", rich_help_panel=_WORK),
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.", rich_help_panel=_WORK)]
Runs = Annotated[int, typer.Option("--runs", help="Measured runs after the warm-up.", rich_help_panel=_MEASURE)]
Starts = Annotated[int, typer.Option("--runs", help="Engines started, one after another.", rich_help_panel=_MEASURE)]
Gaps = Annotated[
    bool,
    typer.Option("--itl/--no-itl", help="One more run, streamed, for inter-token latency.", rich_help_panel=_MEASURE),
]
Compare = Annotated[
    Literal["transformers"] | None,
    typer.Option(
        "--compare", help="Take turns with Hugging Face generate, in batches of 32.", rich_help_panel=_MEASURE
    ),
]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the whole report here.", rich_help_panel=_MEASURE)
]
TraceFile = Annotated[
    str | None,
    typer.Option(
        "--trace", metavar="FILE", help="Write the traced steps as a Chrome trace (Perfetto).", rich_help_panel=_MEASURE
    ),
]
Traces = Annotated[
    bool,
    typer.Option("--trace", help="Also keep the traced steps, as Chrome traces NAME.trace.", rich_help_panel=_MEASURE),
]
TraceSteps = Annotated[
    int,
    typer.Option(
        "--trace-steps", help="Steps in a row whose phases are timed, in the middle of a run.", rich_help_panel=_MEASURE
    ),
]
WorkloadNames = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        "-w",
        help=f"Of {', '.join(workload_names())}; may be repeated (the three of upstream, and single).",
        rich_help_panel=_WORK,
    ),
]
Rates = Annotated[
    list[float] | None,
    typer.Option("--rate", help="Arrivals per second; may be repeated (16).", rich_help_panel=_WORK),
]
SuiteRates = Annotated[
    list[float] | None,
    typer.Option("--rate", help="Of a load, arrivals per second; may be repeated (no load).", rich_help_panel=_WORK),
]
Seconds = Annotated[float, typer.Option("--seconds", help="Of arrivals, at each rate.", rich_help_panel=_WORK)]
LoadInputLen = Annotated[
    int, typer.Option("--input-len", help="Prompt tokens, of a load and of random.", rich_help_panel=_WORK)
]
LoadOutputLen = Annotated[
    int, typer.Option("--output-len", help="Answer tokens, of a load and of random.", rich_help_panel=_WORK)
]
LoadRangeRatio = Annotated[
    float, typer.Option("--range-ratio", help="Lengths vary by this share, up and down.", rich_help_panel=_WORK)
]
OutputDirectory = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="Where the reports go.", rich_help_panel=_MEASURE)
]
Steps = Annotated[int, typer.Option("--steps", help="Timed at every point.", rich_help_panel=_MEASURE)]
Plot = Annotated[
    str | None,
    typer.Option("--plot", metavar="FILE.svg", help="Draw the curves (needs matplotlib).", rich_help_panel=_MEASURE),
]
Bandwidth = Annotated[
    float | None, typer.Option("--bandwidth", metavar="GB/S", help="Memory read.", rich_help_panel=_LIMIT)
]
Flops = Annotated[
    float | None, typer.Option("--flops", metavar="TFLOP/S", help="Matrix products.", rich_help_panel=_LIMIT)
]
AllReduceUs = Annotated[
    float | None, typer.Option("--all-reduce-us", metavar="US", help="One all-reduce (0).", rich_help_panel=_LIMIT)
]


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, which takes `**engine`, every option of the launcher that is a field of EngineConfig."""
    fields = {*EngineConfig.__struct_fields__, "config"}
    hints = get_type_hints(launch, include_extras=True)
    engine = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(launch).parameters.items()
        if name in fields
    ]
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        command(**options)

    wrapped.__signature__ = inspect.Signature([*own, *engine])  # type: ignore[attr-defined]
    return wrapped


def engine_config(engine: Mapping[str, Any]) -> EngineConfig:
    """The config that the engine options, and the file named by --config, ask for. Raises ConfigError."""
    given = {name: value for name, value in engine.items() if value is not None}
    path = given.pop("config", None)
    if path is not None:
        given = {**read_config_file(path, _option_names()), **given}
    return build_invocation(given).config


def chosen_workload(name: str, **random_options: Any) -> Workload:
    """The workload, with the options of `random` where they were given. Raises ConfigError."""
    given = {option: value for option, value in random_options.items() if value is not None}
    if given and name != RANDOM and name in workload_names():
        flags = " and ".join("--" + option.replace("_", "-") for option in given)
        raise ConfigError(f"{flags} is for --workload {RANDOM}: the lengths of {name} are fixed")
    return make_workload(name, **given)


def hardware(bandwidth: float | None, flops: float | None, all_reduce_us: float | None) -> Hardware | None:
    """What --bandwidth (GB/s), --flops (TFLOP/s) and --all-reduce-us describe; None without them.

    Raises ConfigError: one of the rates is missing or out of range.
    """
    if bandwidth is None and flops is None and all_reduce_us is None:
        return None
    if bandwidth is None or flops is None:
        raise ConfigError("the physical limit needs both --bandwidth and --flops")
    return Hardware(bandwidth * 1e9, flops * 1e12, (all_reduce_us or 0.0) * 1e-6)


def check_runs(runs: int) -> int:
    """Raises ConfigError unless there is at least one."""
    if runs < 1:
        raise ConfigError(f"--runs {runs} is not at least 1")
    return runs


def check_trace_steps(steps: int) -> int:
    """Raises ConfigError unless there are two, of which the first only tells when the second could begin, or more."""
    if not 2 <= steps <= TRACE_LIMIT:
        raise ConfigError(f"--trace-steps {steps} is not from 2 to {TRACE_LIMIT:,}")
    return steps


def check_temperature(temperature: float) -> float:
    """Raises InvalidSamplingParamsError unless it is one that the sampler takes."""
    return SamplingParams(temperature=temperature).temperature


def check_writable(file: str | None, option: str = "--json") -> None:
    """Raises ConfigError, before the measurement, where its report could not be kept."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ConfigError(f"{option} {file}: give a file in a directory that exists")


def made_directory(output: str) -> Path:
    """The directory `--output` names, made if need be. Raises ConfigError."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
    return Path(output)


def _option_names() -> dict[str, str]:
    """Every way a config file may write an engine option, without dashes in front, to the field it sets."""
    return {
        spelling.lstrip("-"): str(parameter.name)
        for parameter in typer.main.get_command(app).params
        if parameter.name in EngineConfig.__struct_fields__
        for spelling in (*parameter.opts, str(parameter.name).replace("_", "-"))
    }
