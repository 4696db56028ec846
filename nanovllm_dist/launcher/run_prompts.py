"""Answers jobs with an engine: one streams to the terminal, several run together, a file becomes a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nanovllm_dist.client import DistLLM
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.launcher.invocation import Mode
from nanovllm_dist.launcher.jobs import Job
from nanovllm_dist.outputs import RequestOutput


def run_jobs(engine: Engine, mode: Mode, jobs: list[Job]) -> None:
    """Answer `jobs` on stdout or in the output file, then write one line of statistics to stderr.

    The engine is stopped afterwards. Raises NanoVLLMError when a job failed; the answers of the others are kept.
    """
    with DistLLM.from_engine(engine) as llm:
        prompts = [_prepared(llm, job, mode.raw) for job in jobs]
        started = time.monotonic()
        if mode.prompts_file:
            outputs = _answer_all(llm, prompts, jobs)
            with _writer(mode.output) as file:
                for job, output in zip(jobs, outputs, strict=True):
                    file.write(json.dumps(_record(job, output), ensure_ascii=False) + "\n")
        elif len(jobs) == 1:
            outputs = [_stream(llm, prompts[0], jobs[0])]
        else:
            outputs = _answer_all(llm, prompts, jobs)
            for job, output in zip(jobs, outputs, strict=True):
                sys.stdout.write(f">>> {job.prompt}\n{output.text}\n\n")
        sys.stdout.flush()
        _write_statistics(outputs, time.monotonic() - started)
    _raise_failures(outputs)


def prepare(llm: DistLLM, job: Job, raw: bool) -> Any:
    """What the engine is given: a conversation, or text for a model that chats, goes through the chat template."""
    if job.messages is not None:
        return llm.tokenizer.apply_chat_template(job.messages)
    if raw or not isinstance(job.prompt, str) or not llm.tokenizer.has_chat_template:
        return job.prompt
    return llm.tokenizer.apply_chat_template([{"role": "user", "content": job.prompt}])


def _prepared(llm: DistLLM, job: Job, raw: bool) -> Any:
    """`prepare`, with the error in place of what a chat template refuses."""
    try:
        return prepare(llm, job, raw)
    except NanoVLLMError as error:
        return error


def _answer_all(llm: DistLLM, prompts: list[Any], jobs: list[Job]) -> list[RequestOutput]:
    """An output for each job, in order; where there is an error in place of a prompt, that."""
    runnable = {index: prompt for index, prompt in enumerate(prompts) if not isinstance(prompt, NanoVLLMError)}
    params = [jobs[index].params for index in runnable]
    answers = llm.generate(list(runnable.values()), params, use_tqdm=sys.stderr.isatty(), return_errors=True)
    outputs = dict(zip(runnable, answers, strict=True))
    return [outputs.get(index) or RequestOutput.refused(None, [], prompt) for index, prompt in enumerate(prompts)]


def _stream(llm: DistLLM, prompt: Any, job: Job) -> RequestOutput:
    if isinstance(prompt, NanoVLLMError):
        raise prompt
    whole: RequestOutput | None = None
    for output in llm.stream(prompt, job.params):
        sys.stdout.write(output.text)
        sys.stdout.flush()
        if whole is None:
            whole = output
        else:
            output.outputs[0].token_ids = whole.token_ids + output.token_ids
            whole = output
    sys.stdout.write("\n")
    if whole is None:
        raise NanoVLLMError("the answer ended before it began")
    return whole


@contextlib.contextmanager
def _writer(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name when it is complete."""
    if path is None:
        yield sys.stdout
        return
    partial = Path(f"{path}.part")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    os.replace(partial, path)


def _record(job: Job, output: RequestOutput) -> dict[str, Any]:
    record: dict[str, Any] = {} if job.id is None else {"id": job.id}
    record |= {"prompt": job.prompt} if job.messages is None else {"messages": job.messages}
    if output.error is not None:
        return {**record, "error": {"code": output.error.code, "message": str(output.error)}}
    answers = [
        {"text": answer.text, "finish_reason": answer.finish_reason, "num_tokens": len(answer.token_ids)}
        for answer in output.outputs
    ]
    record["num_prompt_tokens"] = len(output.prompt_token_ids)
    return {**record, **answers[0]} if len(answers) == 1 else {**record, "answers": answers}


def _write_statistics(outputs: list[RequestOutput], seconds: float) -> None:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    first = sorted(one.first_token for one in metrics if one.first_token >= 0)
    wait = f", first token after {first[len(first) // 2]:.3f} s" if first else ""
    requests = "1 request" if len(outputs) == 1 else f"{len(outputs)} requests"
    line = f"{requests}: {prompt} prompt + {generated} new tokens in {seconds:.2f} s"
    sys.stderr.write(f"{line} ({generated / max(seconds, 1e-9):.1f} tokens/s{wait})\n")


def _raise_failures(outputs: list[RequestOutput]) -> None:
    failed = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
    if failed:
        index, error = failed[0]
        raise NanoVLLMError(f"{len(failed)} of {len(outputs)} prompts failed, first prompt {index}: {error}")
