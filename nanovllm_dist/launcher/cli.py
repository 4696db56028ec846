"""`nanovllm-launch`: start an engine and serve it, answer prompts, or chat.

Exit codes: 0 done, 1 the engine or a request failed (--doctor: something must be mended), 2 the command line is wrong,
130 interrupted. It imports neither torch nor transformers nor Ray, so that the engine's processes can start as early as
possible.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from typing import Any, NoReturn

import typer

from nanovllm_dist.errors import ConfigError, InvalidRequestError, NanoVLLMError
from nanovllm_dist.launcher import options as o
from nanovllm_dist.launcher.invocation import Invocation, build_invocation, read_config_file
from nanovllm_dist.launcher.jobs import read_jobs
from nanovllm_dist.launcher.signals import forget_interrupt, handle_signals

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_USAGE_ERRORS = (ConfigError, InvalidRequestError)
_NOT_OF_AN_ENGINE = ("version", "doctor")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def launch(
    context: typer.Context,
    prompt: o.Prompt = None,
    prompts_file: o.PromptsFile = None,
    output: o.Output = None,
    chat: o.Chat = None,
    raw: o.Raw = None,
    config: o.ConfigFile = None,
    version: o.Version = None,
    doctor: o.Doctor = None,
    model: o.Model = None,
    served_model_name: o.ServedModelName = None,
    tokenizer: o.Tokenizer = None,
    hub: o.HubName = None,
    dtype: o.DtypeName = None,
    load_format: o.Format = None,
    weight_format: o.WeightFormat = None,
    max_model_len: o.MaxModelLen = None,
    hf_overrides: o.HfOverrides = None,
    seed: o.Seed = None,
    device: o.Device = None,
    tensor_parallel_size: o.TensorParallel = None,
    launcher: o.Launcher = None,
    ray_address: o.RayAddress = None,
    transport: o.Transport = None,
    host: o.Host = None,
    port: o.Port = None,
    startup_timeout: o.StartupTimeout = None,
    step_timeout: o.StepTimeout = None,
    threads_per_worker: o.ThreadsPerWorker = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    prefill_chunk_size: o.PrefillChunkSize = None,
    scheduling_policy: o.SchedulingPolicy = None,
    max_num_queued_reqs: o.MaxNumQueuedReqs = None,
    max_steps_in_flight: o.MaxStepsInFlight = None,
    enforce_eager: o.EnforceEager = None,
    graph_mode: o.GraphMode = None,
    graph_cache_dir: o.GraphCacheDir = None,
    block_size: o.BlockSize = None,
    num_blocks: o.NumBlocks = None,
    kv_cache_memory: o.KvCacheMemory = None,
    memory_utilization: o.MemoryUtilization = None,
    enable_prefix_caching: o.PrefixCaching = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    min_p: o.MinP = None,
    max_tokens: o.MaxTokens = None,
    min_tokens: o.MinTokens = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    repetition_penalty: o.RepetitionPenalty = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
) -> None:
    """Start an engine. Without --prompt, --prompts-file or --chat it serves until Ctrl-C."""
    if doctor:
        from nanovllm_dist.launcher.doctor import examine

        raise typer.Exit(examine(device or "auto"))
    # the values are read from the context, where they have the names of the fields that they set
    try:
        run(_invocation(context))
    except KeyboardInterrupt:
        forget_interrupt()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except NanoVLLMError as error:
        _fail(error)


def run(invocation: Invocation) -> None:
    """Start the engine, do what was asked, stop the engine. Raises KeyboardInterrupt, NanoVLLMError."""
    from nanovllm_dist.launcher.engine import Engine

    jobs = read_jobs(invocation)  # what is wrong with them is said before anything starts
    if not invocation.mode.serves:
        threading.Thread(target=_import_ahead, daemon=True).start()

    engine = Engine.start(invocation.config, progress=True)
    try:
        if invocation.mode.serves:
            _serve(engine.address, engine.key_file, engine.wait)
        elif invocation.mode.chat:
            from nanovllm_dist.launcher.chat import run_chat

            run_chat(engine, invocation.params)
        else:
            from nanovllm_dist.launcher.run_prompts import run_jobs

            run_jobs(engine, invocation.mode, jobs)
    finally:
        engine.stop()


def _import_ahead() -> None:
    """What the first answer needs, imported while the engine starts: a second of work."""
    for module in ("nanovllm_dist.client", "transformers.utils.chat_template_utils"):
        importlib.import_module(module)


def _serve(address: str, key_file: Any, wait: Any) -> None:
    key = f" key-file={key_file}" if key_file is not None else ""
    typer.echo(f"ready {address}{key}")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        wait()


def _invocation(context: typer.Context) -> Invocation:
    # an option that may be repeated and is not given is an empty list or tuple
    given = {
        name: value
        for name, value in context.params.items()
        if value not in (None, [], ()) and name not in _NOT_OF_AN_ENGINE
    }
    path = given.pop("config", None)
    if path is not None:
        given = {**read_config_file(path, _option_names(context)), **given}
    return build_invocation(given)


def _option_names(context: typer.Context) -> dict[str, str]:
    """Every long name of every option that a file may set, without its dashes, to the option's field."""
    return {
        flag.lstrip("-"): str(parameter.name)
        for parameter in context.command.params
        if parameter.name not in ("config", *_NOT_OF_AN_ENGINE)
        for flag in (*parameter.opts, str(parameter.name).replace("_", "-"))
        if flag.startswith("--") or not flag.startswith("-")
    }


def _fail(error: NanoVLLMError) -> NoReturn:
    typer.echo(f"error: {_readable(error)}", err=True)
    raise typer.Exit(EXIT_USAGE if isinstance(error, _USAGE_ERRORS) else EXIT_FAILED)


def _readable(error: NanoVLLMError) -> str:
    """The message; the log of a process that failed only where no typed error explains it."""
    from nanovllm_dist.launcher.deployment import LOG_HEADING

    explained = isinstance(error.__cause__, NanoVLLMError) and type(error.__cause__) is not NanoVLLMError
    return str(error).partition(LOG_HEADING)[0] if explained else str(error)


def main() -> None:
    """Console entry point. SIGTERM is handled as Ctrl-C."""
    _open_standard_streams()
    handle_signals()
    app()


def _open_standard_streams() -> None:
    """Whoever started us may have closed some; a socket that got such a number would be written to as a stream."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            device = os.open(os.devnull, os.O_RDWR)
            os.dup2(device, number)
            if device != number:
                os.close(device)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    main()
