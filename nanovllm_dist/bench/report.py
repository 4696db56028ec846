"""Reports as tables in the terminal and as JSON in a file. It measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from nanovllm_dist.bench.distribution import Distribution
from nanovllm_dist.bench.engine_run import EngineCounters
from nanovllm_dist.bench.environment import Environment
from nanovllm_dist.bench.latency import LatencyReport
from nanovllm_dist.bench.load import LoadReport
from nanovllm_dist.bench.report_steps import show_steps
from nanovllm_dist.bench.roofline import Achieved, Limit
from nanovllm_dist.bench.scheduler_cost import SchedulerReport
from nanovllm_dist.bench.session import EngineSummary, WorkloadSummary
from nanovllm_dist.bench.side_by_side import SideBySideReport
from nanovllm_dist.bench.startup import StartupReport
from nanovllm_dist.bench.throughput import Comparison, ThroughputReport

Report = ThroughputReport | LatencyReport | StartupReport | LoadReport | SchedulerReport | SideBySideReport
_HISTOGRAM_ROWS = 8


def write_json(report: Report, path: str | None) -> None:
    """Write the whole report to `path`, indented; `read_json` is the inverse. Nothing happens without a path."""
    if path is not None:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read_json(path: str) -> Report:
    """The report in a file that `write_json` wrote. Raises msgspec.ValidationError for anything else."""
    report: Report = msgspec.json.decode(Path(path).read_bytes(), type=Report)
    return report


def show_throughput(report: ThroughputReport, console: Console | None = None) -> None:
    """Print the tables of a throughput report."""
    console = console or Console()
    rates = report.rates
    table = _titled("Throughput", report.workload)
    table.add_row("output tokens/s, median", f"{rates.median_output_tokens_per_second:,.1f}")
    table.add_row("total tokens/s, median", f"{rates.median_total_tokens_per_second:,.1f}")
    table.add_row("output tokens/s of each run", _listed(rates.output_tokens_per_second))
    table.add_row("seconds of each run", _listed(rates.seconds, 2))
    if report.comparison is not None:
        _add_comparison(table, report.comparison)
    _add_limit(table, report.limit, report.achieved.share if report.achieved is not None else None)
    _add_bandwidth(table, report.achieved)
    console.print(table)
    console.print(
        times_table({"TTFT": report.ttft, "TPOT": report.tpot, "ITL (streamed run)": report.itl, "E2E": report.e2e})
    )
    show_steps(report.steps, console)
    show_engine(console, report.counters, sum(rates.seconds), report.engine, report.environment)


def show_latency(report: LatencyReport, console: Console | None = None) -> None:
    """Print the tables of a latency report."""
    console = console or Console()
    table = _titled(f"Latency, one request at a time, {report.runs} runs", report.workload)
    if report.decode_tokens_per_second is not None:
        table.add_row("decode tokens/s, median", f"{report.decode_tokens_per_second:,.1f}")
    _add_limit(table, report.limit, report.share_of_limit, one_request=True)
    console.print(table)
    console.print(times_table({"TTFT": report.ttft, "ITL": report.itl, "E2E": report.e2e}))
    seconds = report.e2e.mean * report.e2e.count if report.e2e is not None else 0.0
    show_engine(console, report.counters, seconds, report.engine, report.environment)


def show_startup(report: StartupReport, console: Console | None = None) -> None:
    """Print the table of a start-up report."""
    console = console or Console()
    table = plain_table(f"Start-up of {report.model}, launcher {report.launcher}, {report.dtype} on {report.device}")
    for phase, began in report.phases.items():
        table.add_row(f"{phase} began after, median s", f"{began:.2f}")
    table.add_row("ready after, median s", f"{report.median_ready:.2f}")
    table.add_row("first token after, median s", f"{report.median_first_token:.2f}")
    table.add_row("ready, each run", _listed(report.ready, 2))
    table.add_row("first token, each run", _listed(report.first_token, 2))
    table.add_row("stopped within, each run", _listed(report.stop, 2))
    console.print(table)
    console.print(environment_line(report.environment))


def _add_comparison(table: Table, comparison: Comparison) -> None:
    rates, name = comparison.rates, f"{comparison.rival}, batches of {comparison.batch_size}"
    table.add_row("OpenMP waiting of the rival", comparison.waiting)
    table.add_row(f"{name}: output tokens/s, median", f"{rates.median_output_tokens_per_second:,.1f}")
    table.add_row(f"{name}: of each run", _listed(rates.output_tokens_per_second))
    table.add_row("ratio of medians", f"{comparison.ratio:.2f} x")
    table.add_row("ratio of each pair", _listed(comparison.ratios, 2))


def _add_limit(table: Table, limit: Limit | None, share: float | None, one_request: bool = False) -> None:
    if limit is None:
        return
    rate = limit.one_request_tokens_per_second if one_request else limit.output_tokens_per_second
    table.add_row("physical limit, output tokens/s", f"{rate:,.0f}")
    if share is not None:
        table.add_row("share of the limit", f"{share:.0%}")


def _add_bandwidth(table: Table, achieved: Achieved | None) -> None:
    if achieved is None:
        return
    table.add_row("keys and values read, GB/s per device, over the whole run", f"{achieved.cache_bandwidth / 1e9:,.0f}")
    if achieved.attention_bandwidth is not None:
        bandwidth = f"{achieved.attention_bandwidth / 1e9:,.0f}"
        table.add_row("the same, if all else took no more than its limit", bandwidth)


def show_engine(
    console: Console, counters: EngineCounters, seconds: float, engine: EngineSummary, environment: Environment
) -> None:
    """Print what the engine counted during `seconds` of measurement, and what engine it was where."""
    table = plain_table("Engine, over all measured runs")
    table.add_row("steps", f"{counters.steps:,}")
    if counters.steps:
        table.add_row("wall time per step, mean ms", f"{1e3 * seconds / counters.steps:.2f}")
    for running, host in counters.host_us_per_step.items():
        table.add_row(f"coordinator µs per step, up to {running} running", f"{host.mean_us:,.0f}  ({host.steps} steps)")
    for running, answer in counters.answer_us_per_step.items():
        name = f"µs from a result to the next step, up to {running} running"
        table.add_row(name, f"{answer.mean_us:,.0f}  ({answer.steps} steps)")
    table.add_row("rows per step: steps", _histogram(counters.batch_histogram))
    table.add_row("preemptions", f"{counters.preemptions:,}")
    table.add_row("prefix cache: hits of queries, tokens", f"{counters.prefix_hits:,} of {counters.prefix_queries:,}")
    console.print(table)
    about = (
        f"{engine.model} ({engine.architecture}), {engine.dtype} on {engine.device}, TP {engine.tensor_parallel_size}"
    )
    console.print(f"{about}, launcher {engine.launcher}, {engine.num_blocks} blocks of {engine.block_size}")
    console.print(environment_line(environment))


def environment_line(environment: Environment) -> str:
    """Versions, processor and how busy the host was."""
    names = ("nanovllm_dist", "python", "torch", "transformers")
    versions = ", ".join(f"{name} {getattr(environment, name) or 'not installed'}" for name in names)
    load = f"load {environment.load:g} before the start"
    warning = ": the host was busy, the figures are noise" if environment.busy else ""
    return f"{versions}; {environment.cpu}, {environment.cores} cores, {load}{warning}"


def times_table(rows: Mapping[str, Distribution | None]) -> Table:
    """Seconds, shown in milliseconds, a row for each name that was measured."""
    table = Table(title="Times, ms", title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("mean", "p50", "p90", "p99", "count"):
        table.add_column(column, justify="right")
    for name, values in rows.items():
        if values is not None:
            times = (f"{1e3 * value:,.1f}" for value in (values.mean, values.p50, values.p90, values.p99))
            table.add_row(name, *times, f"{values.count:,}")
    return table


def _titled(title: str, work: WorkloadSummary) -> Table:
    sums = f"{work.num_requests} requests, {work.prompt_tokens:,} tokens in, {work.output_tokens:,} out"
    return plain_table(f"{title}: {work.name} ({sums}), temperature {work.temperature:g}")


def plain_table(title: str) -> Table:
    """Two columns without headings."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    return table


def _listed(values: list[float], digits: int = 1) -> str:
    return "  ".join(f"{value:,.{digits}f}" for value in values)


def _histogram(rows: Mapping[int, int]) -> str:
    """The most frequent batch sizes, smallest first."""
    frequent = sorted(sorted(rows, key=lambda count: rows[count], reverse=True)[:_HISTOGRAM_ROWS])
    text = "  ".join(f"{count}: {rows[count]}" for count in frequent)
    return text if len(rows) <= _HISTOGRAM_ROWS else f"{text}  (and {len(rows) - _HISTOGRAM_ROWS} other sizes)"
