"""`nanovllm-bench`: measure an engine's throughput, latency or start-up time.

Exit codes: 0 done, 1 the engine or a request failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from nanovllm_dist.bench import options as o
from nanovllm_dist.errors import ConfigError, InvalidRequestError, NanoVLLMError
from nanovllm_dist.launcher.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from nanovllm_dist.launcher.signals import handle_signals

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure an engine. Each command starts one of its own, with the engine options of nanovllm-launch.",
    context_settings=_SETTINGS,
)


@app.command(context_settings=_SETTINGS)
@o.with_engine_options
def throughput(
    workload: o.WorkloadName = "c1",
    num_requests: o.NumRequests = None,
    input_len: o.InputLen = None,
    output_len: o.OutputLen = None,
    range_ratio: o.RangeRatio = None,
    temperature: o.Temperature = 0.6,
    runs: o.Runs = 3,
    itl: o.Gaps = True,
    compare: o.Compare = None,
    json_file: o.JsonFile = None,
    bandwidth: o.Bandwidth = None,
    flops: o.Flops = None,
    all_reduce_us: o.AllReduceUs = None,
    **engine: Any,
) -> None:
    """Run a whole workload at once: tokens per second, and times per request."""
    from nanovllm_dist.bench.report import show_throughput, write_json
    from nanovllm_dist.bench.throughput import ThroughputSettings, measure_throughput

    with _readable_errors():
        work = o.chosen_workload(
            workload,
            num_requests=num_requests,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
        )
        settings = ThroughputSettings(
            runs=o.check_runs(runs),
            temperature=o.check_temperature(temperature),
            gaps=itl,
            compare=compare is not None,
            hardware=o.hardware(bandwidth, flops, all_reduce_us),
        )
        _check_writable(json_file)
        report = measure_throughput(o.engine_config(engine), work, settings, _notify)
        show_throughput(report)
        write_json(report, json_file)


@app.command(context_settings=_SETTINGS)
@o.with_engine_options
def latency(
    workload: o.WorkloadName = "c2",
    num_requests: o.NumRequests = None,
    input_len: o.InputLen = None,
    output_len: o.OutputLen = None,
    range_ratio: o.RangeRatio = None,
    temperature: o.Temperature = 0.6,
    runs: o.Runs = 5,
    json_file: o.JsonFile = None,
    bandwidth: o.Bandwidth = None,
    flops: o.Flops = None,
    all_reduce_us: o.AllReduceUs = None,
    **engine: Any,
) -> None:
    """Run the requests of a workload one after another: time to the first token, and between tokens."""
    from nanovllm_dist.bench.latency import LatencySettings, measure_latency
    from nanovllm_dist.bench.report import show_latency, write_json

    with _readable_errors():
        work = o.chosen_workload(
            workload,
            num_requests=num_requests,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
        )
        settings = LatencySettings(
            runs=o.check_runs(runs),
            temperature=o.check_temperature(temperature),
            hardware=o.hardware(bandwidth, flops, all_reduce_us),
        )
        _check_writable(json_file)
        report = measure_latency(o.engine_config(engine), work, settings, _notify)
        show_latency(report)
        write_json(report, json_file)


@app.command(context_settings=_SETTINGS)
@o.with_engine_options
def startup(runs: o.Starts = 3, json_file: o.JsonFile = None, **engine: Any) -> None:
    """Start engines in fresh processes: time until ready, and until the first token."""
    from nanovllm_dist.bench.report import show_startup, write_json
    from nanovllm_dist.bench.startup import measure_startup

    with _readable_errors():
        o.check_runs(runs)
        _check_writable(json_file)
        report = measure_startup(o.engine_config(engine), runs, _notify)
        show_startup(report)
        write_json(report, json_file)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Typed errors become a line on standard error and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except NanoVLLMError as error:
        typer.echo(f"error: {error}", err=True)
        usage = isinstance(error, ConfigError | InvalidRequestError)
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from None


def _check_writable(json_file: str | None) -> None:
    """Say before the measurement that its report could not be kept."""
    if json_file is not None and (Path(json_file).is_dir() or not Path(json_file).absolute().parent.is_dir()):
        raise ConfigError(f"--json {json_file}: give a file in a directory that exists")


def _notify(line: str) -> None:
    typer.echo(f"nanovllm-bench: {line}", err=True)


def main() -> None:
    """Console entry point. SIGTERM is handled as Ctrl-C."""
    handle_signals()
    app()


if __name__ == "__main__":
    main()
