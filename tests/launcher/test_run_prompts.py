"""A file of prompts through a whole engine: a line that fails costs its own answer and no other, and an interrupt costs
no answer that was there."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from engine_sandbox import LLAMA, SMALL, Command, Sandbox, model, sandbox, wait_for
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, NanoVLLMError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.launcher.invocation import Invocation, Mode
from nanovllm_dist.launcher.jobs import Job, read_jobs
from nanovllm_dist.launcher.run_prompts import run_jobs
from nanovllm_dist.sampling_params import SamplingParams

__all__ = ["model", "sandbox"]  # fixtures
TEMPLATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}hello"
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture
def chatting_model(tmp_path: Path) -> str:
    """A tiny model with one word, whose template refuses a system's message."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    Tokenizer(WordLevel({"hello": 5, "?": 6}, unk_token="?")).save(str(directory / "tokenizer.json"))
    return str(directory)


def chat(role: str) -> Job:
    return Job(PARAMS, messages=[{"role": role, "content": "hi"}], id=role)


@pytest.mark.slow
def test_a_conversation_that_the_template_refuses_is_a_record_among_answers(
    chatting_model: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    engine = Engine.start(EngineConfig(model=chatting_model, launcher="local", **SMALL))
    mode = Mode(prompts_file="in.jsonl", output=str(tmp_path / "out.jsonl"))
    try:
        with pytest.raises(NanoVLLMError, match=r"1 of 3 prompts failed, first prompt 1: .*no system here"):
            run_jobs(engine, mode, [chat("user"), chat("system"), Job(PARAMS, [5, 6], id="ids")])
    finally:
        engine.stop()

    records: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["user", "system", "ids"]
    assert [record.get("num_tokens") for record in records] == [3, None, 3]
    assert records[1]["error"]["code"] == "invalid_request"
    assert records[1]["messages"] == [{"role": "system", "content": "hi"}]


@pytest.mark.slow
def test_half_a_surrogate_pair_in_a_prompt_is_written_as_json_escapes_it(
    chatting_model: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    engine = Engine.start(EngineConfig(model=chatting_model, launcher="local", **SMALL))
    mode = Mode(prompts_file="in.jsonl", output=str(tmp_path / "out.jsonl"))
    try:
        run_jobs(engine, mode, [Job(PARAMS, "a\ud800b", id="half"), Job(PARAMS, [5, 6], id="ids")])
    finally:
        engine.stop()

    records: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records[0]["prompt"] == "a\ud800b"
    assert [record["id"] for record in records] == ["half", "ids"]


def test_the_answers_of_an_interrupted_run_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    (tmp_path / "out.jsonl.part").write_text("precious")
    mode = Mode(prompts_file=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match="move or delete it first"):
        read_jobs(Invocation(EngineConfig(model="m"), mode, {}))


@pytest.mark.slow
def test_answers_go_where_a_link_leads(chatting_model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").write_text("of another run")
    engine = Engine.start(EngineConfig(model=chatting_model, launcher="local", **SMALL))

    run_jobs(engine, Mode(prompts_file="in.jsonl", output=str(tmp_path / "link")), [Job(PARAMS, [5, 6])])

    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real").read_text())["num_tokens"] == 3


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_an_error_of_the_output(chatting_model: str, sandbox: Sandbox) -> None:
    engine = Engine.start(EngineConfig(model=chatting_model, launcher="local", **SMALL))
    with pytest.raises(NanoVLLMError, match=r"--output /proc/none: .*No such file"):
        run_jobs(engine, Mode(prompts_file="in.jsonl", output="/proc/none"), [Job(PARAMS, [5, 6])])
    sandbox.assert_empty()


@pytest.mark.slow
def test_what_was_answered_before_an_interrupt_is_kept_in_order(model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    common = {"prompt": [1, 2, 3], "ignore_eos": True, "detokenize": False}
    lengths = {"a": 3, "b": 5, "endless": 4000, "late": 2}
    lines = [json.dumps({**common, "id": name, "max_tokens": length}) for name, length in lengths.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.part"
    command = Command(tmp_path, model, "local", "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(out))
    wait_for(lambda: (partial.exists() and partial.read_text().count("\n") == 2) or command.process.poll() is not None)

    command.process.send_signal(signal.SIGINT)

    assert command.process.wait(30) == 130
    assert [json.loads(line)["id"] for line in partial.read_text().splitlines()] == ["a", "b"]
    assert str(partial) in command.err.read_text()
    assert not out.exists()
    sandbox.assert_empty()
