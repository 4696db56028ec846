"""Checkpoints: every tensor accounted for by name, every broken file refused by name, each rank reads its part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import CPU, PagedModel, run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_reference, random_tokens, reference_logits

from nanovllm_dist.errors import WeightsError
from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.loader import dummy_weights, load_weights
from nanovllm_dist.models.parallel import Communicator, SingleRank
from nanovllm_dist.models.registry import build_model

Tensors = dict[str, torch.Tensor]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def build(directory: Path, comm: Communicator | None = None, dtype: torch.dtype = torch.float32) -> DecoderLM:
    return build_model(read_model_config(directory), comm or SingleRank(), TorchLayers(TorchAttention()), dtype, CPU)


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def refuse(directory: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights(build(directory), directory)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", ["llama_biases", "qwen2_tied", "qwen3_biased_tied"])
def test_loading_fills_every_element_of_every_parameter(name: str, world_size: int, tmp_path: Path) -> None:
    make_reference(name, tmp_path)

    def work(comm: Communicator) -> bool:
        model = build(tmp_path, comm)
        for shard in model.shards():
            shard.target.fill_(float("nan"))
        load_weights(model, tmp_path)
        return all(bool(parameter.isfinite().all()) for parameter in model.parameters())

    assert run_ranks(world_size, work) == [True] * world_size


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    reference = make_reference("llama", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = random_tokens(9)
    logits = PagedModel(tmp_path, SingleRank()).logits(tokens)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_dtype_of_the_model(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    model = build(tmp_path, dtype=wanted)
    load_weights(model, tmp_path)
    expected = load_file(tmp_path / SINGLE)["model.norm.weight"].to(wanted)
    assert torch.equal(model.norm.weight, expected)


def test_progress_is_reported_per_tensor_up_to_the_total(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    calls: list[tuple[int, int]] = []
    load_weights(build(tmp_path), tmp_path, lambda done, total: calls.append((done, total)))
    total = len(load_file(tmp_path / SINGLE))
    assert calls == [(done, total) for done in range(total + 1)]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(K_PROJ))
    refuse(tmp_path, K_PROJ, SINGLE)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(1)}))
    refuse(tmp_path, "model.layers.0.extra", SINGLE)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 63)}))
    refuse(tmp_path, K_PROJ, SINGLE, "[32, 63]", "[32, 64]")


def test_a_tensor_of_another_dtype_is_named(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 64, dtype=torch.int8)}))
    refuse(tmp_path, K_PROJ, SINGLE, "I8")


def test_known_leftovers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_reference("llama_tied", tmp_path)
    leftovers = {
        "lm_head.weight": torch.zeros(101, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(leftovers))
    load_weights(build(tmp_path), tmp_path)


def test_an_untied_model_needs_its_own_output_weight(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    refuse(tmp_path, "lm_head.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:keep])
    refuse(tmp_path, SINGLE, "truncated")


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    content = bytearray((tmp_path / SINGLE).read_bytes())
    content[8:16] = b"\xff" * 8
    (tmp_path / SINGLE).write_bytes(bytes(content))
    refuse(tmp_path, SINGLE)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"
    (tmp_path / SINGLE).write_text(pointer)
    refuse(tmp_path, SINGLE, "Git-LFS", "git lfs pull")


def sharded(directory: Path) -> dict[str, str]:
    make_reference("llama", directory, max_shard_size="100KB")
    weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    return weight_map


def test_a_file_that_only_the_index_knows_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    file = sharded(tmp_path)[K_PROJ]
    (tmp_path / file).unlink()
    refuse(tmp_path, file, INDEX, "model.")


def test_a_tensor_that_only_the_index_knows_is_named_with_its_file(tmp_path: Path) -> None:
    file = sharded(tmp_path)[K_PROJ]
    tensors = load_file(tmp_path / file)
    del tensors[K_PROJ]
    save_file(tensors, tmp_path / file)
    refuse(tmp_path, K_PROJ, file)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}']
)
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    refuse(tmp_path, INDEX)


def test_other_weight_formats_are_refused_and_never_opened(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "pytorch_model.bin", "only safetensors is read")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    (tmp_path / SINGLE).unlink()
    refuse(tmp_path, "no *.safetensors")


def shard_values(config_dir: Path, comm: Communicator, seed: int) -> dict[str, tuple[int, int, int, torch.Tensor]]:
    model = build(config_dir, comm)
    dummy_weights(model, seed)
    return {shard.name: (shard.dim, shard.start, shard.end, shard.target.clone()) for shard in model.shards()}


def test_dummy_weights_are_one_model_at_every_degree(tmp_path: Path) -> None:
    make_reference("llama_9_3", tmp_path)
    [whole] = run_ranks(1, lambda comm: shard_values(tmp_path, comm, 3))
    for part in run_ranks(4, lambda comm: shard_values(tmp_path, comm, 3)):
        for name, (dim, start, end, values) in part.items():
            assert torch.equal(values, whole[name][3].narrow(dim, start, end - start)), name


def test_dummy_weights_cross_chunk_borders_alike_on_every_rank(tmp_path: Path) -> None:
    make_reference("llama_tied", tmp_path)
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "vocab_size": 2500}))
    name = "model.embed_tokens.weight"
    [whole] = run_ranks(1, lambda comm: shard_values(tmp_path, comm, 0)[name][3])
    parts = run_ranks(3, lambda comm: shard_values(tmp_path, comm, 0)[name][3])
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[:1024], whole[1024:2048])


def test_dummy_weights_depend_on_the_seed_and_leave_norms_at_one(tmp_path: Path) -> None:
    make_reference("qwen3", tmp_path)
    first, again, other = (shard_values(tmp_path, SingleRank(), seed) for seed in (0, 0, 1))
    assert torch.equal(first[K_PROJ][3], again[K_PROJ][3])
    assert not torch.equal(first[K_PROJ][3], other[K_PROJ][3])
    assert all(bool((values == 1).all()) for name, (*_, values) in first.items() if "norm" in name)
