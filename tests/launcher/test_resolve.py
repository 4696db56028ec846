"""Before any process starts every option has its value, and contradictions have been refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from nanovllm_dist.launcher.resolve import resolve_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def resolve(model: str, **options: Any) -> EngineConfig:
    return resolve_config(EngineConfig(model=model, **options), progress=False)[0]


def test_every_option_left_open_is_filled_in(model: str) -> None:
    config = resolve(model)
    assert (config.model, config.served_model_name, config.tokenizer) == (model, model, model)
    assert (config.device, config.launcher) == ("cpu", "ray")
    assert config.max_model_len == 512
    for field in ("block_size", "max_num_seqs", "max_num_batched_tokens", "prefill_chunk_size", "max_steps_in_flight"):
        assert getattr(config, field) > 0, field


def test_what_was_set_stays_as_it_was_set(model: str) -> None:
    given = {
        "served_model_name": "mine",
        "device": "cpu",
        "dtype": "float16",
        "max_model_len": 128,
        "block_size": 16,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 64,
        "prefill_chunk_size": 32,
        "max_steps_in_flight": 2,
        "launcher": "local",
    }
    config = resolve(model, **given)
    assert {name: getattr(config, name) for name in given} == given


def test_the_typed_model_config_comes_with_it(model: str) -> None:
    _, parsed = resolve_config(EngineConfig(model=model, hf_overrides={"vocab_size": 300}), progress=False)
    assert (parsed.architecture, parsed.vocab_size) == ("LlamaForCausalLM", 300)


def test_resolving_twice_changes_nothing(model: str) -> None:
    once = resolve(model)
    assert resolve_config(once, progress=False)[0] == once


@pytest.mark.parametrize(
    ("named", "expected"),
    [({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float16"), ({}, "float32")],
)
def test_dtype_auto_is_the_checkpoints_or_else_the_devices(
    tmp_path: Path, named: dict[str, str], expected: str
) -> None:
    content = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps({**content, **named}))
    assert resolve(str(tmp_path)).dtype == expected


def test_a_checkpoint_dtype_that_cannot_be_run_asks_for_one_that_can(model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"float8_e4m3fn.*set the dtype option"):
        resolve(model, hf_overrides={"torch_dtype": "float8_e4m3fn"})


def test_other_hosts_are_told_what_was_asked_for_and_not_what_it_is_called(model: str) -> None:
    config = resolve(model, served_model_name="mine")
    assert (config.model_source, config.served_model_name) == (model, "mine")


def test_compiled_graphs_are_kept_where_every_process_finds_them(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(model, graph_cache_dir="graphs").graph_cache_dir == str(tmp_path / "graphs")
    assert resolve(model, graph_cache_dir="~/graphs").graph_cache_dir == "~/graphs"  # each host's own
    assert resolve(model).graph_cache_dir == ""


def test_a_default_gives_way_to_a_limit_that_was_set(model: str) -> None:
    few_tokens = resolve(model, max_num_batched_tokens=8)
    assert few_tokens.max_num_seqs == 8
    many_requests = resolve(model, max_num_seqs=65_536)
    assert many_requests.max_num_batched_tokens == 65_536


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1024}, "max_model_len=1024 is above the model's max_position_embeddings=512"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size=5 is too many"),
        ({"prefill_chunk_size": 4096, "max_num_batched_tokens": 64}, "prefill_chunk_size=4096 is above"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"transport": "ipc", "port": 5555}, "host and port are for transport=tcp"),
        ({"host": "0.0.0.0"}, "listens on every interface"),
        ({"graph_cache_dir": "~no-such-user/graphs"}, "graph_cache_dir='~no-such-user/graphs'"),
        ({"ray_address": "ray://h:1"}, "is Ray Client"),
    ],
)
def test_a_contradiction_is_refused_with_what_to_change(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        resolve(model, **options)


def test_an_unknown_model_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        resolve(str(tmp_path / "nowhere"))


def test_every_tensor_parallel_size_up_to_the_number_of_heads_is_accepted(model: str) -> None:
    assert [resolve(model, tensor_parallel_size=size).tensor_parallel_size for size in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_resolving_imports_neither_torch_nor_ray(model: str) -> None:
    source = (
        "import sys; from nanovllm_dist.config import EngineConfig;"
        "from nanovllm_dist.launcher.resolve import resolve_config;"
        f"resolve_config(EngineConfig(model={model!r}), progress=False);"
        "sys.exit(str(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
