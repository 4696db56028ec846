"""The command line's options, one annotated type each, named like the fields of EngineConfig and SamplingParams.

It knows how options are written and grouped. What they mean is checked where they end up.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nanovllm_dist import __version__
from nanovllm_dist.config import Dtype, Hub, LauncherKind, LoadFormat, Policy
from nanovllm_dist.config import GraphMode as GraphModeName
from nanovllm_dist.config import Transport as TransportKind
from nanovllm_dist.config import WeightFormat as WeightFormatName

_RUN, _MODEL, _CACHE = "What to run", "Model", "KV cache"
_BATCH, _PROCESSES, _SAMPLING = "Batching", "Processes and network", "Sampling (with --prompt, --prompts-file, --chat)"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanovllm_dist {__version__}")
        raise typer.Exit


# --- what to run -------------------------------------------------------------------------------------------

Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="Answer this and leave (may be repeated).", rich_help_panel=_RUN),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts-file",
        metavar="JSONL",
        help='Answer each line, {"prompt": ...} or {"messages": ...} with sampling parameters and an id of its own '
        "if need be, and leave.",
        rich_help_panel=_RUN,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="JSONL",
        help="Where the answers to --prompts-file go (stdout); JSONL.part until all are there.",
        rich_help_panel=_RUN,
    ),
]
Chat = Annotated[bool | None, typer.Option("--chat", help="Talk to the model in this terminal.", rich_help_panel=_RUN)]
Raw = Annotated[
    bool | None,
    typer.Option("--raw", help="Prompts go to the model as they are, without its chat template.", rich_help_panel=_RUN),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="YAML", help="Options from a file; the command line wins.", rich_help_panel=_RUN),
]
Version = Annotated[
    bool | None,
    typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.", rich_help_panel=_RUN),
]
Doctor = Annotated[
    bool | None,
    typer.Option("--doctor", help="Say what is installed here and whether --device can be used.", rich_help_panel=_RUN),
]

# --- model -------------------------------------------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A directory, a hub id, or a packaged model's name.", rich_help_panel=_MODEL),
]
ServedModelName = Annotated[
    str | None, typer.Option("--served-model-name", help="The name that clients see.", rich_help_panel=_MODEL)
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Another tokenizer than the model's.", rich_help_panel=_MODEL)
]
HubName = Annotated[Hub | None, typer.Option("--hub", help="Where hub ids are fetched from.", rich_help_panel=_MODEL)]
DtypeName = Annotated[Dtype | None, typer.Option("--dtype", help="(auto: the checkpoint's)", rich_help_panel=_MODEL)]
Format = Annotated[
    LoadFormat | None, typer.Option("--load-format", help="dummy: random weights.", rich_help_panel=_MODEL)
]
WeightFormat = Annotated[
    WeightFormatName | None,
    typer.Option(
        "--weight-format",
        help="int8: rounded at load (CPU, bfloat16). nz: tiled as Ascend's matrix unit reads. (plain)",
        rich_help_panel=_MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Tokens of prompt and answer (the model's).", rich_help_panel=_MODEL),
]
HfOverrides = Annotated[
    str | None,
    typer.Option("--hf-overrides", metavar="JSON", help="Replace keys of config.json.", rich_help_panel=_MODEL),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="For requests without a seed of their own.", rich_help_panel=_MODEL)
]

# --- KV cache ----------------------------------------------------------------------------------------------

BlockSize = Annotated[int | None, typer.Option("--block-size", help="Tokens per block.", rich_help_panel=_CACHE)]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        "--num-blocks", "--num-gpu-blocks-override", help="Blocks, instead of measuring.", rich_help_panel=_CACHE
    ),
]
KvCacheMemory = Annotated[
    str | None,
    typer.Option("--kv-cache-memory", metavar="SIZE", help="Per rank, such as 4GiB.", rich_help_panel=_CACHE),
]
MemoryUtilization = Annotated[
    float | None,
    typer.Option(
        "--memory-utilization",
        "--gpu-memory-utilization",
        help="Share of device memory that may be used (0.9).",
        rich_help_panel=_CACHE,
    ),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Share the cache of common beginnings (on).",
        rich_help_panel=_CACHE,
    ),
]

# --- batching ----------------------------------------------------------------------------------------------

MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", help="Requests that run at once.", rich_help_panel=_BATCH)
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", help="Tokens per step.", rich_help_panel=_BATCH)
]
PrefillChunkSize = Annotated[
    int | None,
    typer.Option("--prefill-chunk-size", help="Prompt tokens of one request per step.", rich_help_panel=_BATCH),
]
SchedulingPolicy = Annotated[
    Policy | None, typer.Option("--scheduling-policy", help="Who runs first.", rich_help_panel=_BATCH)
]
MaxNumQueuedReqs = Annotated[
    int | None,
    typer.Option("--max-num-queued-reqs", help="More are refused (4096).", rich_help_panel=_BATCH),
]
MaxStepsInFlight = Annotated[
    int | None, typer.Option("--max-steps-in-flight", help="1, or 2 to overlap steps.", rich_help_panel=_BATCH)
]
GraphMode = Annotated[
    GraphModeName | None,
    typer.Option("--graph-mode", help="How steps become device graphs (auto).", rich_help_panel=_BATCH),
]
GraphCacheDir = Annotated[
    str | None,
    typer.Option(
        "--graph-cache-dir", help="Of compiled graphs (~/.cache/nanovllm_dist/graphs).", rich_help_panel=_BATCH
    ),
]
EnforceEager = Annotated[bool | None, typer.Option("--enforce-eager", help="No device graphs.", rich_help_panel=_BATCH)]

# --- processes and network ---------------------------------------------------------------------------------

Device = Annotated[str | None, typer.Option("--device", help="(auto: what is present)", rich_help_panel=_PROCESSES)]
TensorParallel = Annotated[
    int | None,
    typer.Option("--tp", "-tp", "--tensor-parallel-size", help="Ranks, a device each (1).", rich_help_panel=_PROCESSES),
]
Launcher = Annotated[
    LauncherKind | None, typer.Option("--launcher", help="(auto: Ray if installed)", rich_help_panel=_PROCESSES)
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="Join this Ray cluster.", rich_help_panel=_PROCESSES)
]
Transport = Annotated[
    TransportKind | None,
    typer.Option("--transport", help="(auto: ipc on one host, else tcp)", rich_help_panel=_PROCESSES),
]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on (tcp).", rich_help_panel=_PROCESSES)]
Port = Annotated[int | None, typer.Option("--port", help="Port for clients (tcp) (any).", rich_help_panel=_PROCESSES)]
StartupTimeout = Annotated[
    float | None, typer.Option("--startup-timeout", help="Seconds until ready (600).", rich_help_panel=_PROCESSES)
]
StepTimeout = Annotated[
    float | None,
    typer.Option(
        "--step-timeout", help="Seconds that one step may take (600; 0: for ever).", rich_help_panel=_PROCESSES
    ),
]
ThreadsPerWorker = Annotated[
    int | None, typer.Option("--threads-per-worker", help="CPU threads (a fair share).", rich_help_panel=_PROCESSES)
]

# --- sampling ----------------------------------------------------------------------------------------------

Temperature = Annotated[float | None, typer.Option("--temperature", help="0 is greedy (1).", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus (1: off).", rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option("--top-k", help="Most likely tokens (0: off).", rich_help_panel=_SAMPLING)]
MinP = Annotated[float | None, typer.Option("--min-p", help="Share of the best (0: off).", rich_help_panel=_SAMPLING)]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Tokens per answer (256; --chat: no limit).", rich_help_panel=_SAMPLING),
]
MinTokens = Annotated[int | None, typer.Option("--min-tokens", help="No end before.", rich_help_panel=_SAMPLING)]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty", help="(0)", rich_help_panel=_SAMPLING)]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty", help="(0)", rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="(1)", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End at this text (may be repeated).", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[
    bool | None, typer.Option("--ignore-eos", help="Go on to --max-tokens.", rich_help_panel=_SAMPLING)
]
