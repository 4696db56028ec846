"""The side-by-side report as tables in the terminal. It measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nanovllm_dist.bench.distribution import median
from nanovllm_dist.bench.report import environment_line
from nanovllm_dist.bench.side_by_side import ContestantReport, SideBySideReport, ratio

_NOTHING = "–"  # noqa: RUF001  (a dash for the eye)


def show_side_by_side(report: SideBySideReport, console: Console | None = None) -> None:
    """Print a table of starts and memory, and one for each workload."""
    console = console or Console()
    ours = report.contestants[0]
    console.print(_starts(report))
    for work in report.workloads:
        sums = f"{work.num_requests} requests, {work.prompt_tokens:,} tokens in, {work.output_tokens:,} out"
        table = _table(f"{work.name} ({sums}), temperature {work.temperature:g}, medians of {report.runs} runs")
        for column in ("output tokens/s", "ours : its", "first token, ms", "then tokens/s", "ours : its"):
            table.add_column(column, justify="right")
        for one in report.contestants:
            table.add_row(one.name, *_row(one, ours, work.name))
        console.print(table)
    console.print(f"{report.model}, {report.dtype}, TP {report.tensor_parallel_size}")
    console.print(environment_line(report.environment))


def _starts(report: SideBySideReport) -> Table:
    table = _table("Start and memory")
    table.add_column("version")
    for column in ("ready, s", "first token, s", "peak memory, MiB"):
        table.add_column(column, justify="right")
    for one in report.contestants:
        times = (f"{one.ready:.2f}", f"{one.first_token:.2f}")
        table.add_row(one.name, one.version, *times, f"{one.peak_memory / 2**20:,.0f}")
    return table


def _row(one: ContestantReport, ours: ContestantReport, workload: str) -> list[str]:
    work, mine = one.work[workload], ours.work[workload]
    first = [1e3 * value for value in work.first_token if value is not None]
    row = [_number(work.output_tokens_per_second)]
    row += [_ratio(mine.output_tokens_per_second, work.output_tokens_per_second), _number(first, 0)]
    row += [_number(work.decode_tokens_per_second)]
    return [*row, _ratio(mine.decode_tokens_per_second, work.decode_tokens_per_second)]


def _number(values: Sequence[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):,.{digits}f}" if known else _NOTHING


def _ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    value = ratio(ours, theirs)
    return _NOTHING if value is None else f"{value:.2f}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    return table
