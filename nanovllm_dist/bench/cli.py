"""`nanovllm-bench`: measure an engine's throughput, latency, behaviour under load or start-up time, or its scheduler.

Exit codes: 0 done, 1 the engine or a request failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from nanovllm_dist.bench import cli_side_by_side as beside
from nanovllm_dist.bench import options as o
from nanovllm_dist.bench.contestant import Rivals
from nanovllm_dist.bench.step_breakdown import DEFAULT_STEPS
from nanovllm_dist.bench.workloads import RANDOM
from nanovllm_dist.errors import ConfigError, InvalidRequestError, NanoVLLMError
from nanovllm_dist.launcher.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from nanovllm_dist.launcher.signals import forget_interrupt, handle_signals

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure an engine. Each command starts one of its own, with the engine options of nanovllm-launch; "
    "only `scheduler` needs none.",
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
    trace: o.TraceFile = None,
    trace_steps: o.TraceSteps = DEFAULT_STEPS,
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
            trace_steps=o.check_trace_steps(trace_steps),
            trace_file=trace,
        )
        o.check_writable(json_file)
        o.check_writable(trace, "--trace")
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
        o.check_writable(json_file)
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
        o.check_writable(json_file)
        report = measure_startup(o.engine_config(engine), runs, _notify)
        show_startup(report)
        write_json(report, json_file)


@app.command(context_settings=_SETTINGS)
@o.with_engine_options
def load(
    rate: o.Rates = None,
    seconds: o.Seconds = 45.0,
    input_len: o.LoadInputLen = 768,
    output_len: o.LoadOutputLen = 128,
    range_ratio: o.LoadRangeRatio = 0.33,
    temperature: o.Temperature = 0.6,
    json_file: o.JsonFile = None,
    trace: o.TraceFile = None,
    trace_steps: o.TraceSteps = DEFAULT_STEPS,
    **engine: Any,
) -> None:
    """Let requests arrive at random, at one rate after another: times per request and per token."""
    from nanovllm_dist.bench.load import LoadSettings, measure_load
    from nanovllm_dist.bench.report import write_json
    from nanovllm_dist.bench.report_load import show_load

    with _readable_errors():
        o.check_temperature(temperature)
        settings = LoadSettings(
            rates=tuple(rate or (16.0,)),
            seconds=seconds,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
            temperature=temperature,
            trace_steps=o.check_trace_steps(trace_steps),
            trace_file=trace,
        )
        o.check_writable(json_file)
        o.check_writable(trace, "--trace")
        report = measure_load(o.engine_config(engine), settings, _notify)
        show_load(report)
        write_json(report, json_file)


@app.command(context_settings=_SETTINGS)
def scheduler(steps: o.Steps = 500, plot: o.Plot = None, json_file: o.JsonFile = None) -> None:
    """Time the scheduler alone, without an engine: by running requests, and by the length of its queue."""
    from nanovllm_dist.bench.report import write_json
    from nanovllm_dist.bench.report_scheduler import show_scheduler
    from nanovllm_dist.bench.scheduler_cost import measure_scheduler
    from nanovllm_dist.bench.scheduler_plot import load_figure, plot_scheduler

    with _readable_errors():
        o.check_writable(json_file)
        o.check_writable(plot, "--plot")
        if plot is not None:
            load_figure()  # said before the measurement
        report = measure_scheduler(_notify, steps)
        show_scheduler(report)
        write_json(report, json_file)
        if plot is not None:
            plot_scheduler(report, plot)


@app.command(context_settings=_SETTINGS)
@o.with_engine_options
def suite(
    output: o.OutputDirectory,
    workload: o.WorkloadNames = None,
    num_requests: o.NumRequests = None,
    rate: o.SuiteRates = None,
    seconds: o.Seconds = 45.0,
    input_len: o.LoadInputLen = 768,
    output_len: o.LoadOutputLen = 128,
    range_ratio: o.LoadRangeRatio = 0.33,
    temperature: o.Temperature = 0.6,
    runs: o.Runs = 3,
    trace: o.Traces = False,
    trace_steps: o.TraceSteps = DEFAULT_STEPS,
    bandwidth: o.Bandwidth = None,
    flops: o.Flops = None,
    all_reduce_us: o.AllReduceUs = None,
    **engine: Any,
) -> None:
    """Measure throughput of several workloads, then a load, on one engine; a report each in a directory."""
    from nanovllm_dist.bench.load import LoadReport, LoadSettings
    from nanovllm_dist.bench.report import show_throughput, write_json
    from nanovllm_dist.bench.report_load import show_load
    from nanovllm_dist.bench.suite import SUITE_WORKLOADS, run_suite
    from nanovllm_dist.bench.throughput import ThroughputReport, ThroughputSettings

    def keep(name: str, report: ThroughputReport | LoadReport) -> None:
        write_json(report, str(directory / f"{name}.json"))
        show_load(report) if isinstance(report, LoadReport) else show_throughput(report)

    with _readable_errors():
        lengths: dict[str, Any] = {"input_len": input_len, "output_len": output_len, "range_ratio": range_ratio}
        lengths["num_requests"] = num_requests
        names = dict.fromkeys(workload or SUITE_WORKLOADS)
        works = [o.chosen_workload(name, **(lengths if name == RANDOM else {})) for name in names]
        settings = ThroughputSettings(
            runs=o.check_runs(runs),
            temperature=o.check_temperature(temperature),
            gaps=False,
            hardware=o.hardware(bandwidth, flops, all_reduce_us),
            trace_steps=o.check_trace_steps(trace_steps),
        )
        arrivals = None
        if rate:
            arrivals = LoadSettings(tuple(rate), seconds, input_len, output_len, range_ratio, temperature, trace_steps)
        directory = o.made_directory(output)
        run_suite(o.engine_config(engine), works, settings, arrivals, _notify, keep, directory if trace else None)


@app.command("side-by-side", context_settings=_SETTINGS)
@o.with_engine_options
def side_by_side(
    compare: beside.Compare,
    workload: beside.Work = None,
    temperature: o.Temperature = 0.6,
    runs: o.Runs = 3,
    vllm_python: beside.VllmPython = "",
    vllm_preload: beside.VllmPreload = None,
    llama_server: beside.LlamaServer = "",
    gguf: beside.Gguf = "",
    json_file: o.JsonFile = None,
    **engine: Any,
) -> None:
    """Take turns with rivals on the same work: speed, start-up and memory of each."""
    with _readable_errors():
        o.check_writable(json_file)
        names = tuple(dict.fromkeys(compare))
        rivals = Rivals(names, vllm_python, tuple(vllm_preload or ()), llama_server, gguf)
        beside.run(engine, workload, rivals, runs, temperature, json_file, _notify)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Typed errors become a line on standard error and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        forget_interrupt()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except NanoVLLMError as error:
        typer.echo(f"error: {error}", err=True)
        usage = isinstance(error, ConfigError | InvalidRequestError)
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from None


def _notify(line: str) -> None:
    typer.echo(f"nanovllm-bench: {line}", err=True)


def main() -> None:
    """Console entry point. SIGTERM is handled as Ctrl-C."""
    handle_signals()
    app()


if __name__ == "__main__":
    main()
