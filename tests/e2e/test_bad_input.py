"""Bad input, each kind a clear typed error, with the engine alive and other requests unharmed."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from nanovllm_dist import LLM, SamplingParams
from nanovllm_dist.errors import (
    ConfigError,
    EngineStartError,
    InvalidRequestError,
    InvalidSamplingParamsError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel

IDS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
OPTIONS: dict[str, object] = {"launcher": "local", "progress": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    """The real model, with a cache smaller than the model's length."""
    with LLM(str(smollm2), num_blocks=64, block_size=16, **OPTIONS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def still_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the engine answers as before."""
    yield
    if "llm" in request.fixturenames:
        llm: LLM = request.getfixturevalue("llm")
        assert llm.generate([[5, 6, 7]], IDS, use_tqdm=False)[0].finish_reason == "length"
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 49152], "outside the vocabulary"),
        ([1, -1], "outside the vocabulary"),
        ([1, 2**40], "outside the vocabulary"),
        ([1.5], "1.5"),
        (None, "None"),
        ([1] * 9000, "at most"),  # longer than the model
        ([1] * 1500, "at most 1007 fit"),  # longer than the cache
        ("word " * 60_000, "at most"),  # 300 KB
    ],
    ids=str,
)
def test_a_bad_prompt(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[3, 4], prompt], IDS, use_tqdm=False)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n=0"),
        ({"n": 2, "temperature": 0.0}, "n=2"),
        ({"min_tokens": 2**63 - 1, "max_tokens": None}, "min_tokens"),
        ({"stop": ["x" * 100_000]}, "stop"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9"),
        ({"stop": ["x"] * 65}, "stop has 65 strings: at most 64"),
        ({"bad_words": ["x"] * 4097}, "bad_words has 4097 words: at most 4096"),
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids has 4097 token ids: at most 4096"),
        ({"logit_bias": dict.fromkeys(range(4097), 1.0)}, "logit_bias has 4097 entries: at most 4096"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"], "detokenize": False}, "detokenize"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"logprobs": 1000}, "logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logit_bias": {1: 1000.0}}, "logit_bias"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 2**80}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"output_kind": "everything"}, "output_kind"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_or_contradictory_sampling_params(params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=message):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_an_unknown_sampling_parameter() -> None:
    with pytest.raises(TypeError, match="temperatur"):
        SamplingParams(temperatur=1.0)  # type: ignore[call-arg]


@pytest.mark.slow
def test_params_that_only_the_model_can_judge(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        llm.generate([[1]], SamplingParams(stop_token_ids=[50_000], detokenize=False), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 prompts but 3 sampling params"):
        llm.generate([[1], [2]], [IDS] * 3, use_tqdm=False)


@pytest.mark.slow
def test_with_return_errors_the_other_prompts_get_their_answers(llm: LLM) -> None:
    good, bad, last = llm.generate([[3, 4], [99_999], [5]], IDS, use_tqdm=False, return_errors=True)
    assert (good.finish_reason, bad.finish_reason, last.finish_reason) == ("length", "error", "length")
    assert isinstance(bad.error, InvalidRequestError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [({"priority": 2**40}, "priority"), ({"priority": "high"}, "priority"), ({"cache_salt": 7}, "cache_salt")],
    ids=str,
)
def test_a_bad_option_of_one_call_does_not_end_what_others_run(llm: LLM, options: dict[str, Any], message: str) -> None:
    running = llm.stream([5, 6], SamplingParams(max_tokens=32, ignore_eos=True, detokenize=False))
    next(running)
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([[3, 4]], IDS, use_tqdm=False, **options)
    assert list(running)[-1].finish_reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize("frame", [b"\xff" * 100, bytes(wire.RESULT_FRAME_LIMIT + 1)], ids=["garbage", "oversized"])
def test_a_bad_frame_on_each_socket(llm: LLM, frame: bytes) -> None:
    directory = Path(llm.address.removeprefix("ipc://")).parent
    sockets = [path for path in directory.rglob("*") if stat.S_ISSOCK(path.stat().st_mode)]
    assert len(sockets) == 2
    for path in sockets:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        for identity in (b"", wire.worker_identity(0)):
            channel = Channel(context, f"ipc://{path}", wire.RESULT_FRAME_LIMIT, None, identity)
            channel.send(frame)
            channel.receive(0.3)
            channel.close()
        context.destroy(linger=0)


# --- models ------------------------------------------------------------------------------------------------


def broken(model: Path, directory: Path, **config: object) -> Path:
    """A copy of a model that a test may break; `config` replaces keys of config.json."""
    shutil.copytree(model, directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | config))
    return directory


def start(model: Path | str, **options: object) -> None:
    """Start an engine that should not start."""
    LLM(str(model), **(OPTIONS | options)).close()


def test_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        start("no-such-model-anywhere")


def test_an_unknown_option_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        LLM("smollm2-135m", blok_size=16)


@pytest.mark.slow
def test_a_truncated_checkpoint(smollm2: Path, tmp_path: Path) -> None:
    model = broken(smollm2, tmp_path / "model")
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(100_000_000)
    with pytest.raises(EngineStartError, match=r"model\.safetensors") as caught:
        start(model)
    assert isinstance(caught.value.__cause__, WeightsError)


@pytest.mark.slow
def test_a_git_lfs_pointer(tiny_model: Path, tmp_path: Path) -> None:
    model = broken(tiny_model, tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"
    (model / "model.safetensors").write_text(pointer)
    with pytest.raises(EngineStartError, match=r"(?i)git.lfs") as caught:
        start(model)
    assert isinstance(caught.value.__cause__, WeightsError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"architectures": ["NobodysForCausalLM"]}, "NobodysForCausalLM"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported(
    tiny_model: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):  # and no EngineStartError: before any process
        start(broken(tiny_model, tmp_path / "model", **config), load_format="dummy")


def test_more_ranks_than_heads(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="at most 4 ranks"):
        start(tiny_model, load_format="dummy", tensor_parallel_size=5)


@pytest.mark.parametrize("value", [object(), {1: {"x": b"\xff".decode("utf-8", "surrogateescape")}}], ids=str)
def test_overrides_that_cannot_be_sent_to_the_processes(value: object) -> None:
    with pytest.raises(ConfigError, match="hf_overrides holds what JSON cannot"):
        start("smollm2-135m", hf_overrides={"x": value})


@pytest.mark.slow
def test_a_cache_that_no_memory_holds(tiny_model: Path) -> None:
    with pytest.raises(EngineStartError, match="lower num_blocks") as caught:
        start(tiny_model, load_format="dummy", num_blocks=2**31 - 1, block_size=4096)
    assert isinstance(caught.value.__cause__, ConfigError)
    assert "Traceback" not in str(caught.value)


def test_contradictory_options(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        start(tiny_model, num_blocks=10, kv_cache_memory=2**30)
    with pytest.raises(ConfigError, match="max_model_len"):
        start(tiny_model, max_model_len=100_000)
