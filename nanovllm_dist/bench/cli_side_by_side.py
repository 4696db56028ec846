"""`nanovllm-bench side-by-side`: its options, and how they become a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from nanovllm_dist.bench import options as o
from nanovllm_dist.bench.contestant import RIVALS, Rivals

_RIVALS = "Rivals"

Compare = Annotated[
    list[str],
    typer.Option("--compare", help=f"One of {', '.join(RIVALS)}; may be repeated.", rich_help_panel=_RIVALS),
]
VllmPython = Annotated[
    str, typer.Option("--vllm-python", metavar="FILE", help="Python that has vLLM.", rich_help_panel=_RIVALS)
]
VllmPreload = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-preload", metavar="FILE", help="Library to preload for vLLM; may be repeated.", rich_help_panel=_RIVALS
    ),
]
LlamaServer = Annotated[
    str, typer.Option("--llama-server", metavar="FILE", help="llama.cpp's server.", rich_help_panel=_RIVALS)
]
Gguf = Annotated[
    str, typer.Option("--gguf", metavar="FILE", help="The same model for llama.cpp.", rich_help_panel=_RIVALS)
]
Work = Annotated[
    list[str] | None,
    typer.Option("--workload", "-w", help="May be repeated (c2 and c1).", rich_help_panel="Work"),
]


def run(
    engine: dict[str, Any],
    workload: list[str] | None,
    rivals: Rivals,
    runs: int,
    temperature: float,
    json_file: str | None,
    notify: Callable[[str], None],
) -> None:
    """Measure, show, and write the report. Raises NanoVLLMError."""
    from nanovllm_dist.bench.report import write_json
    from nanovllm_dist.bench.report_side_by_side import show_side_by_side
    from nanovllm_dist.bench.side_by_side import SideBySideSettings, measure_side_by_side

    works = [o.chosen_workload(name) for name in dict.fromkeys(workload or ("c2", "c1"))]
    settings = SideBySideSettings(rivals, o.check_runs(runs), o.check_temperature(temperature))
    report = measure_side_by_side(o.engine_config(engine), works, settings, notify)
    show_side_by_side(report)
    write_json(report, json_file)
