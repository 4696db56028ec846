"""The command line: what it takes, what it refuses, and that it refuses before anything starts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanovllm_dist import SamplingParams, __version__
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, NanoVLLMError
from nanovllm_dist.launcher import cli
from nanovllm_dist.launcher.invocation import Invocation, build_invocation
from nanovllm_dist.launcher.jobs import read_jobs


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Invocation]:
    """Checked command lines end here instead of in an engine."""
    invocations: list[Invocation] = []
    monkeypatch.setattr(cli, "run", invocations.append)
    return invocations


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


# --- what it takes -----------------------------------------------------------------------------------------


def test_every_engine_option_can_be_set(parsed: list[Invocation]) -> None:
    result = invoke(
        *("--model", "m", "--served-model-name", "s", "--tokenizer", "t", "--device", "cpu", "--dtype", "float32"),
        *("--load-format", "dummy", "--hf-overrides", '{"vocab_size": 9}', "--tp", "2", "--max-model-len", "64"),
        *("--max-num-seqs", "3", "--max-num-batched-tokens", "32", "--prefill-chunk-size", "8", "--block-size", "16"),
        *("--kv-cache-memory", "4GiB", "--memory-utilization", "0.5", "--no-enable-prefix-caching"),
        *("--scheduling-policy", "priority", "--max-num-queued-reqs", "7", "--max-steps-in-flight", "2"),
        *("--enforce-eager", "--seed", "5", "--threads-per-worker", "1", "--startup-timeout", "9"),
        *("--step-timeout", "8"),
        *("--hub", "modelscope", "--launcher", "ray", "--ray-address", "h:1", "--transport", "tcp"),
        *("--host", "127.0.0.1", "--port", "5555"),
    )
    assert result.exit_code == 0, result.output
    assert parsed[0].config == EngineConfig(
        model="m",
        served_model_name="s",
        tokenizer="t",
        device="cpu",
        dtype="float32",
        load_format="dummy",
        hf_overrides={"vocab_size": 9},
        tensor_parallel_size=2,
        max_model_len=64,
        max_num_seqs=3,
        max_num_batched_tokens=32,
        prefill_chunk_size=8,
        block_size=16,
        kv_cache_memory=4 * 2**30,
        memory_utilization=0.5,
        enable_prefix_caching=False,
        scheduling_policy="priority",
        max_num_queued_reqs=7,
        max_steps_in_flight=2,
        enforce_eager=True,
        seed=5,
        threads_per_worker=1,
        startup_timeout=9.0,
        step_timeout=8.0,
        hub="modelscope",
        launcher="ray",
        ray_address="h:1",
        transport="tcp",
        host="127.0.0.1",
        port=5555,
    )
    assert parsed[0].mode.serves


@pytest.mark.parametrize("flag", ["--tp", "-tp", "--tensor-parallel-size"])
def test_names_that_users_of_other_engines_know_work(parsed: list[Invocation], flag: str) -> None:
    invoke("--model", "m", flag, "2", "--gpu-memory-utilization", "0.5", "--num-gpu-blocks-override", "9")
    config = parsed[0].config
    assert (config.tensor_parallel_size, config.memory_utilization, config.num_blocks) == (2, 0.5, 9)


def test_sampling_options_are_those_of_every_prompt(parsed: list[Invocation]) -> None:
    invoke("--model", "m", "--prompt", "a", "--prompt", "b", "--temperature", "0", "--top-k", "5", "--stop", "x")
    assert parsed[0].mode.prompt == ["a", "b"]
    assert parsed[0].params == SamplingParams(temperature=0, top_k=5, stop=["x"], max_tokens=256)


def test_help_names_every_group() -> None:
    output = invoke("--help").output
    for group in ("What to run", "Model", "KV cache", "Batching", "Processes and network", "Sampling"):
        assert group in output


def test_version() -> None:
    assert invoke("--version").output == f"nanovllm_dist {__version__}\n"


# --- the config file ---------------------------------------------------------------------------------------


def config_file(tmp_path: Path, text: str) -> str:
    (tmp_path / "engine.yaml").write_text(text)
    return str(tmp_path / "engine.yaml")


def test_a_config_file_sets_options_under_any_of_their_names(parsed: list[Invocation], tmp_path: Path) -> None:
    text = "model: m\ntp: 2\nmax_num_seqs: 3\nkv-cache-memory: 1MiB\nhf_overrides: {a: 1}\nprompt: hello\n"
    result = invoke("--config", config_file(tmp_path, text))
    assert result.exit_code == 0, result.output
    config = parsed[0].config
    assert (config.model, config.tensor_parallel_size, config.max_num_seqs) == ("m", 2, 3)
    assert (config.kv_cache_memory, config.hf_overrides) == (2**20, {"a": 1})
    assert parsed[0].mode.prompt == ["hello"]


def test_the_command_line_wins_over_the_config_file(parsed: list[Invocation], tmp_path: Path) -> None:
    invoke("--config", config_file(tmp_path, "model: m\nseed: 1\nenforce-eager: true\n"), "--seed", "2")
    assert (parsed[0].config.seed, parsed[0].config.enforce_eager) == (2, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "'modle' is no option; did you mean 'model'?"),
        ("model: m\ntp: 1\ntensor_parallel_size: 2", "sets tensor_parallel_size a second time"),
        ("model: m\ntp: two", "tensor_parallel_size"),
        ("- model", "expected a mapping"),
        ("model: [", "--config"),
        ("[" * 100_000, "nested too deeply"),
        ("model: m\nconfig: other.yaml", "'config' is no option"),
    ],
)
def test_a_bad_config_file_is_an_error_that_says_what(tmp_path: Path, text: str, message: str) -> None:
    result = invoke("--config", config_file(tmp_path, text))
    assert result.exit_code == cli.EXIT_USAGE
    assert message in result.output


# --- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was named"),
        (["--model", "m", "--temprature", "1"], "--temperature"),
        (["--model", "m", "--chat", "--prompt", "a"], "--prompt and --chat contradict each other"),
        (["--model", "m", "--prompt", "a", "--prompts-file", "f"], "--prompt and --prompts-file contradict"),
        (["--model", "m", "--output", "o"], "--output is for the answers to --prompts-file"),
        (["--model", "m", "--raw"], "--raw is for --prompt"),
        (["--model", "m", "--top-p", "0.5"], "nothing for --top-p to apply to"),
        (["--model", "m", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--model", "m", "--prompt", ""], "--prompt is empty"),
        (["--model", "m", "--num-blocks", "2", "--kv-cache-memory", "1GiB"], "give one of them"),
        (["--model", "m", "--kv-cache-memory", "much"], "not a size in bytes"),
        (["--model", "m", "--hf-overrides", "{"], "--hf-overrides is not JSON"),
        (["--model", "m", "--hf-overrides", "[" * 100_000], "--hf-overrides is not JSON"),
        (["--model", "m", "--dtype", "int4"], "--dtype"),
        (["--model", "m", "--max-num-seqs", "65537"], "max_num_seqs=65537 is not at most 65536"),
        (["--model", "m", "--threads-per-worker", "1025"], "threads_per_worker=1025 is not at most 1024"),
        (["--model", "m", "--num-blocks", str(2**31)], "num_blocks=2147483648 is not at most 2147483647"),
        (["--model", "m", "--tp", "0"], "tensor_parallel_size=0"),
        (["--model", "m", "--num-blocks", "1"], "num_blocks=1"),
        (["--model", "m", "--num-blocks", "2", "--block-size", "1"], "at least 3"),
        (["--model", "m", "--max-model-len", "1"], "max_model_len=1"),
        (["--model", "m", "--step-timeout", "-1"], "step_timeout=-1.0"),
        (["--model", "m", "--startup-timeout", "inf"], "startup_timeout=inf"),
        (["--model", "m", "--launcher", "local", "--ray-address", "h:1"], "drop one of them"),
        (["--model", "m", "--prompts-file", "/nonexistent.jsonl"], "/nonexistent.jsonl"),
    ],
)
def test_a_wrong_command_line_is_one_readable_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == cli.EXIT_USAGE
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_missing_model_is_a_failure_and_no_traceback() -> None:
    result = invoke("--model", "/no/such/model", "--prompt", "a")
    assert result.exit_code == cli.EXIT_FAILED
    assert "/no/such/model" in result.output
    assert "Traceback" not in result.output


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    source = (
        "import sys, nanovllm_dist.launcher.cli; sys.exit(str({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_were_closed_are_there_for_the_program_and_its_children(
    tmp_path: Path, closed: str
) -> None:
    report = tmp_path / "report"
    source = (
        "import os, sys; from nanovllm_dist.launcher import cli; sys.argv[1:] = ['--version']\n"
        "try: cli.main()\n"
        f"finally: open({str(report)!r}, 'w').write("
        "str([s is not None and os.get_inheritable(n) for n, s in enumerate((sys.stdin, sys.stdout, sys.stderr))]))"
    )
    subprocess.run(["sh", "-c", f"exec {shlex.quote(sys.executable)} -c {shlex.quote(source)} {closed}"], check=True)
    assert report.read_text() == "[True, True, True]"


# --- a file of prompts -------------------------------------------------------------------------------------


def jobs_of(tmp_path: Path, *lines: Any, **sampling: Any) -> list[Any]:
    path = tmp_path / "prompts.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode())
    return read_jobs(build_invocation({"model": "m", "prompts_file": str(path), **sampling}))


def test_a_line_may_be_text_token_ids_or_messages_with_an_id_and_parameters_of_its_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text, ids, chat = jobs_of(
        tmp_path,
        {"prompt": "a", "id": "first", "max_tokens": 3, "logit_bias": {"7": 1.0}},
        "",
        {"prompt": [1, 2]},
        {"messages": messages, "temperature": 0},
        temperature=0.5,
    )
    assert (text.prompt, text.id) == ("a", "first")
    assert text.params == SamplingParams(temperature=0.5, max_tokens=3, logit_bias={7: 1.0})
    assert (ids.prompt, ids.params) == ([1, 2], SamplingParams(temperature=0.5, max_tokens=256))
    assert (chat.messages, chat.params.temperature) == (messages, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2"),
        ("[" * 100_000, "line 2"),
        ('"text"', "line 2: expected an object"),
        ({"promt": "a"}, "line 2: unknown key 'promt'; did you mean 'prompt'?"),
        ({"id": 1}, "line 2: expected one of `prompt` and `messages`"),
        ({"prompt": "a", "messages": []}, "line 2: expected one of"),
        ({"prompt": ""}, "line 2: prompt is neither"),
        ({"prompt": [1, "a"]}, "line 2: prompt is neither"),
        ({"messages": []}, "line 2: messages is not"),
        ({"messages": [{"role": "user"}]}, "line 2: messages is not"),
        ({"prompt": "a", "top_p": 7}, "line 2: top_p=7"),
        ({"prompt": "a", "max_tokens": "many"}, "line 2: sampling params"),
        ({"prompt": "a", "id": [1]}, "line 2: id is neither"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(tmp_path, {"prompt": "fine"}, bad)
    assert message in str(caught.value)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(tmp_path: Path, character: str) -> None:
    lines = [json.dumps({"prompt": f"a{character}b"}, ensure_ascii=False), "\x0b\x0c", '{"prompt":\r"c"}\r']
    assert [job.prompt for job in jobs_of(tmp_path, *lines)] == [f"a{character}b", "c"]


def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    assert [job.prompt for job in jobs_of(tmp_path, '\ufeff{"prompt": "a"}')] == ["a"]


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NanoVLLMError, match="is empty"):
        jobs_of(tmp_path, "\n\n")


def test_an_output_that_is_no_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for output in (tmp_path, tmp_path / "fifo", tmp_path / "link"):
        with pytest.raises(ConfigError, match="it is a directory or a device"):
            jobs_of(tmp_path, {"prompt": "a"}, output=str(output))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for output in (tmp_path / "circle", tmp_path / ("long" * 100)):
        with pytest.raises(ConfigError, match=r"--output .*(loop|long|levels)"):
            jobs_of(tmp_path, {"prompt": "a"}, output=str(output))
    with pytest.raises(ConfigError, match="--output is empty"):
        jobs_of(tmp_path, {"prompt": "a"}, output="")


def test_an_output_in_no_directory_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        jobs_of(tmp_path, {"prompt": "a"}, output=str(tmp_path / "none" / "o.jsonl"))
