"""The limit agrees with figures worked out elsewhere for real models and devices."""

from __future__ import annotations

import pytest

from nanovllm_dist.bench.roofline import Hardware, achieved, limit
from nanovllm_dist.bench.workloads import Workload, make_workload
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig, parse_model_config

H100 = Hardware(3.09e12, 790e12)
H200 = Hardware(4.3e12, 790e12, 7e-6)


def qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        }
    )


QWEN3_600M = qwen3(1024, 3072, 28, 16)
QWEN3_32B = qwen3(5120, 25600, 64, 64)


@pytest.mark.parametrize(("seed", "rate"), [(0, 26_518), (1, 25_521), (2, 26_283)])
def test_a_small_model_on_one_device(seed: int, rate: float) -> None:
    found = limit(QWEN3_600M, make_workload(f"upstream_seed{seed}"), H100)
    assert found.output_tokens_per_second == pytest.approx(rate, rel=0.001)


@pytest.mark.parametrize(("seed", "rate"), [(0, 14_221), (1, 15_651), (2, 14_598)])
def test_a_large_model_over_four_devices(seed: int, rate: float) -> None:
    found = limit(QWEN3_32B, make_workload(f"upstream_seed{seed}"), H200, tp=4)
    assert found.output_tokens_per_second == pytest.approx(rate, rel=0.001)


def test_one_request_is_bound_by_the_weights_and_the_all_reduces() -> None:
    workload = make_workload("upstream_seed0")
    assert limit(QWEN3_600M, workload, H100).one_request_tokens_per_second == pytest.approx(2_592, abs=1)
    assert limit(QWEN3_32B, workload, H200, tp=4).one_request_tokens_per_second == pytest.approx(217, abs=1)


def test_a_batch_that_its_arithmetic_binds_is_not_called_bandwidth_bound() -> None:
    workload = Workload("wide", (1,) * 512, (2,) * 512)
    slow_arithmetic = limit(QWEN3_600M, workload, Hardware(3e12, 1e12))
    assert slow_arithmetic.decode == pytest.approx(2 * limit(QWEN3_600M, workload, Hardware(3e12, 2e12)).decode)


def test_fewer_requests_at_once_need_more_reads_of_the_weights() -> None:
    workload = make_workload("c1")
    all_at_once, few = limit(QWEN3_600M, workload, H100), limit(QWEN3_600M, workload, H100, max_num_seqs=4)
    assert few.decode > all_at_once.decode


def test_weights_of_a_byte_are_read_in_half_the_time_and_the_cache_is_not() -> None:
    workload = make_workload("upstream_seed0")
    bf16, int8 = (limit(QWEN3_600M, workload, H100, weight_itemsize=size) for size in (2, 1))
    assert int8.weight_bytes == bf16.weight_bytes / 2
    assert int8.cache_bytes == bf16.cache_bytes
    assert int8.one_request_tokens_per_second == 2 * bf16.one_request_tokens_per_second


def test_one_device_pays_for_no_all_reduce() -> None:
    assert limit(QWEN3_600M, make_workload("c1"), H200).all_reduce == 0.0


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, -1.0)])
def test_a_rate_that_is_not_positive_is_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Hardware(*rates)


def test_a_run_at_the_limit_reaches_all_of_it_and_the_whole_bandwidth_in_attention() -> None:
    workload = make_workload("upstream_seed0")
    bound = limit(QWEN3_600M, workload, H100)
    fastest = achieved(bound, H100, workload.output_tokens / bound.output_tokens_per_second)
    assert fastest.share == pytest.approx(1.0)
    assert fastest.attention_bandwidth == pytest.approx(H100.bandwidth)
    # nine tenths of this workload's limit are keys and values
    assert fastest.cache_bandwidth == pytest.approx(0.9 * H100.bandwidth, rel=0.03)


def test_a_run_of_twice_the_time_has_half_the_share_and_half_the_mean_bandwidth() -> None:
    bound = limit(QWEN3_600M, make_workload("upstream_seed0"), H100)
    once, twice = achieved(bound, H100, 6.0), achieved(bound, H100, 12.0)
    assert twice.share == pytest.approx(once.share / 2)
    assert twice.cache_bandwidth == pytest.approx(once.cache_bandwidth / 2)
    assert once.attention_bandwidth is not None
    assert twice.attention_bandwidth is not None
    assert once.cache_bandwidth < once.attention_bandwidth
    assert twice.attention_bandwidth < once.attention_bandwidth / 2


def test_each_of_four_devices_reads_a_quarter_of_the_keys_and_values() -> None:
    workload = make_workload("upstream_seed0")
    alone, shared = limit(QWEN3_32B, workload, H200), limit(QWEN3_32B, workload, H200, tp=4)
    # 2 (key, value) x 2 bytes x 64 layers x 8 heads x 128 for each position read
    positions = sum(
        p * (o - 1) + o * (o - 1) // 2 for p, o in zip(workload.prompt_lens, workload.output_lens, strict=True)
    )
    assert alone.cache_bytes == 2 * 2 * 64 * 8 * 128 * positions
    assert shared.cache_bytes == alone.cache_bytes / 4
    assert shared.weight_bytes == alone.weight_bytes / 4


def test_no_attention_bandwidth_is_made_up_for_a_run_that_the_figures_call_impossible() -> None:
    bound = limit(QWEN3_600M, make_workload("upstream_seed0"), H100)
    assert achieved(bound, H100, 0.001).attention_bandwidth is None
