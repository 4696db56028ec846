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

from nanovllm_dist.batch_run import OnOutput
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
            with _writer(mode.output) as file:
                outputs = _answer_all(llm, prompts, jobs, _LinesInOrder(jobs, file).put)
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


def _answer_all(
    llm: DistLLM, prompts: list[Any], jobs: list[Job], on_output: OnOutput = lambda index, output: None
) -> list[RequestOutput]:
    """An output for each job, in order; an error in place of a prompt becomes one too. `on_output` is told each with
    the index of its job, as it comes."""
    outputs: dict[int, RequestOutput] = {}

    def keep(index: int, output: RequestOutput) -> None:
        outputs[index] = output
        on_output(index, output)

    runnable = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, NanoVLLMError):
            keep(index, RequestOutput.refused(None, [], prompt))
        else:
            runnable.append(index)
    llm.generate(
        [prompts[index] for index in runnable],
        [jobs[index].params for index in runnable],
        use_tqdm=sys.stderr.isatty(),
        return_errors=True,
        on_output=lambda place, output: keep(runnable[place], output),
    )
    return [outputs[index] for index in range(len(prompts))]


class _LinesInOrder:
    """Writes a line for each job, in their order, each as soon as those before it are written."""

    def __init__(self, jobs: list[Job], file: TextIO) -> None:
        self._jobs, self._file = jobs, file
        self._early: dict[int, RequestOutput] = {}
        self._next = 0

    def put(self, index: int, output: RequestOutput) -> None:
        """The output of one job."""
        self._early[index] = output
        while self._next in self._early:
            record = _record(self._jobs[self._next], self._early.pop(self._next))
            line = json.dumps(record, ensure_ascii=False)
            # half a surrogate pair, which a prompt may hold, is no UTF-8: the escape is what JSON has for it
            self._file.write(line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
            self._next += 1
        self._file.flush()


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
    """Standard output, or a file that appears under its name when it is complete, and is NAME.part until then."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path).resolve()
    partial = Path(f"{target}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, target)
    except BaseException as error:
        if partial.exists():
            if partial.stat().st_size:
                sys.stderr.write(f"what was answered until now, in order, is in {partial}\n")
            else:
                partial.unlink()
        if isinstance(error, OSError) and not isinstance(error, NanoVLLMError):
            raise NanoVLLMError(f"--output {path}: {error}") from None
        raise


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
