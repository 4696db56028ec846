"""A converted GGUF file is the model it was made from."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_tiny import CONTROL, HEADS, HIDDEN, KV_HEADS, LAYERS, TEMPLATE, TOKENS, as_gguf, random_weights, write_gguf
from safetensors.torch import load_file

from nanovllm_dist.errors import ConfigError, UnsupportedModelError, WeightsError
from nanovllm_dist.launcher import gguf_convert
from nanovllm_dist.launcher.gguf_convert import convert_gguf, unpermute_rows
from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.text.tokenizer import Tokenizer


@pytest.fixture
def converted(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf"), tmp_path)
    return tmp_path


def test_weights_come_back_under_their_hugging_face_names(converted):
    weights = load_file(converted / "model.safetensors")

    assert weights.keys() == random_weights().keys()
    for name, values in random_weights().items():
        assert weights[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(weights[name].float().numpy(), values, err_msg=name)


def test_quantised_weights_come_back_within_their_step(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf", quantisation=gguf.GGMLQuantizationType.Q4_1), tmp_path)
    weights, step = load_file(tmp_path / "model.safetensors"), 0.5 / 15

    for name, values in random_weights().items():
        if values.ndim == 2:
            assert np.abs(weights[name].float().numpy() - values).max() <= 0.6 * step, name


@pytest.mark.parametrize("heads", [HEADS, KV_HEADS])
def test_unpermuting_undoes_the_row_order_of_gguf(heads):
    name = "q_proj" if heads == HEADS else "k_proj"
    values = np.random.default_rng(1).standard_normal((heads * HIDDEN // HEADS, HIDDEN)).astype(np.float32)

    np.testing.assert_array_equal(unpermute_rows(as_gguf(name, values), heads), values)


def test_the_config_is_one_that_the_engine_reads(converted):
    config = read_model_config(converted)

    assert (config.architecture, config.num_layers, config.num_kv_heads) == ("LlamaForCausalLM", LAYERS, KV_HEADS)
    assert (config.rope.theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


def test_a_model_with_an_output_matrix_is_not_tied(tmp_path):
    head = np.zeros((len(TOKENS), HIDDEN), dtype=np.float32)
    convert_gguf(write_gguf(tmp_path / "model.gguf", extra={"output.weight": head}), tmp_path)

    assert not read_model_config(tmp_path).tie_word_embeddings
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


def test_the_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(converted):
    tokenizer = Tokenizer.from_directory(converted)

    assert [tokenizer.token(i) for i in tokenizer.encode("the the12<|im_end|>")] == [
        "the",
        "Ġthe",
        "1",
        "2",
        "<|im_end|>",
    ]
    assert {tokenizer.token(i) for i in tokenizer.special_ids} == set(CONTROL)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"
    assert json.loads((converted / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("options", "said"), [({"architecture": "gemma"}, "architecture 'gemma'"), ({"pre": "llama-bpe"}, "'llama-bpe'")]
)
def test_what_it_cannot_convert_is_refused_by_name(tmp_path, options, said):
    with pytest.raises(UnsupportedModelError, match=said):
        convert_gguf(write_gguf(tmp_path / "model.gguf", **options), tmp_path)


def test_a_tensor_that_a_llama_has_not_is_refused_by_name(tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}

    with pytest.raises(WeightsError, match=r"blk\.0\.attn_q_norm\.weight"):
        convert_gguf(write_gguf(tmp_path / "model.gguf", extra=extra), tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not gguf" * 100)

    with pytest.raises(UnsupportedModelError, match=r"model\.gguf"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"nanovllm_dist\[cpu\]"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


@pytest.mark.slow
def test_transformers_computes_the_same_logits_from_the_directory(converted):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((converted / "config.json").read_text()))
    original = LlamaForCausalLM(config).float().eval()
    original.load_state_dict({n: torch.from_numpy(v) for n, v in random_weights().items()}, strict=False)
    ids = torch.arange(20)[None]

    loaded = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()

    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0, atol=0)
