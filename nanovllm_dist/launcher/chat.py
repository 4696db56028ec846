"""A conversation in the terminal. It streams answers and keeps the history; it knows no processes."""

from __future__ import annotations

import sys
from typing import Any

from nanovllm_dist.client import DistLLM
from nanovllm_dist.errors import ConfigError, InvalidRequestError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.launcher.signals import Terminated
from nanovllm_dist.sampling_params import SamplingParams

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def run_chat(engine: Engine, params: SamplingParams) -> None:
    """Talk until the user leaves; the engine is stopped then. Raises ConfigError: the model has no chat template."""
    with DistLLM.from_engine(engine) as llm:
        if not llm.tokenizer.has_chat_template:
            raise ConfigError(f"{llm.info.model} has no chat template: use --prompt")
        sys.stdout.write(f"{llm.info.model}: {_HELP}\n")
        history: list[dict[str, Any]] = []
        while (line := _read_line()) is not None:
            if line == "/exit":
                return
            if line == "/reset":
                history.clear()
            elif line.startswith("/"):
                sys.stdout.write(_HELP + "\n")
            elif line:
                _turn(llm, history, line, params)


def _read_line() -> str | None:
    """A line without its blanks, empty at Ctrl-C; None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its editing keys)
    try:
        return input("> ").strip()
    except EOFError:
        sys.stdout.write("\n")
        return None
    except Terminated:
        raise
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return ""


def _turn(llm: DistLLM, history: list[dict[str, Any]], line: str, params: SamplingParams) -> None:
    """Ask and stream the answer; both enter the history, an answer that was stopped as far as it came."""
    history.append({"role": "user", "content": line})
    answer = ""
    try:
        for output in llm.stream(llm.tokenizer.apply_chat_template(history), params):
            answer += output.text
            sys.stdout.write(output.text)
            sys.stdout.flush()
    except Terminated:
        raise
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    except InvalidRequestError as error:
        history.pop()
        sys.stdout.write(f"{error} (/reset starts anew)\n")
        return
    sys.stdout.write("\n")
    history.append({"role": "assistant", "content": answer})
