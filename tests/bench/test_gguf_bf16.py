"""A quantised GGUF file becomes one with the same metadata and vectors, and matrices in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm_dist.bench.gguf_bf16 import rewrite
from nanovllm_dist.errors import ConfigError


def test_matrices_are_rounded_to_bfloat16_and_the_rest_is_kept(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    matrix = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    vector = np.arange(64, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "from.gguf", "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    quantised = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("w.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("n.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rewrite(tmp_path / "from.gguf", tmp_path / "to.gguf")
    reader = gguf.GGUFReader(tmp_path / "to.gguf")
    assert reader.fields["llama.context_length"].contents() == 77
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"w.weight": "BF16", "n.weight": "F32"}
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    restored = gguf.quants.dequantize(by_name["w.weight"].data, by_name["w.weight"].tensor_type)
    exact = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(restored - exact).max() <= 2**-8 * np.abs(exact).max()
    assert (by_name["n.weight"].data == vector).all()


def test_a_file_that_is_no_gguf_is_a_readable_error(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "from.gguf").write_bytes(b"no such thing" * 10)
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        rewrite(tmp_path / "from.gguf", tmp_path / "to.gguf")
