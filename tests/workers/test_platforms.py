"""Which device `auto` takes, and what is said where the asked-for one cannot be had."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.workers.platform import cpu, cuda, get_platform, npu
from nanovllm_dist.workers.platform.base import Platform


def test_a_torch_without_cuda_is_told_from_one_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, (line, expected) in enumerate(
        [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True), ("cuda = '12.8'", True)]
    ):
        package = tmp_path / str(number) / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__all__ = ['cuda']\n{line}\nhip: Optional[str] = None\n")

        class Found:
            origin = str(package / "__init__.py")

        monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name, found=Found: found)
        assert cuda._torch_has_cuda() is expected


def test_an_unknown_device_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"auto, npu, cuda, cpu"):
        get_platform("abacus")


TINY = Path(__file__).parents[2] / "scripts" / "models" / "tiny"


@pytest.mark.parametrize(("block_size", "head_dim", "named"), [(48, 64, "block_size=48"), (64, 320, "head_dim=320")])
def test_gpu_kernels_refuse_sizes_they_cannot_take(block_size: int, head_dim: int, named: str) -> None:
    model = read_model_config(TINY, {"head_dim": head_dim})
    config = EngineConfig(model="tiny", block_size=block_size)
    with pytest.raises(ConfigError, match=named):
        cuda.CudaPlatform().check(config, model)


@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (64, 80), (64, 96), (128, 128), (256, 256)])
def test_gpu_kernels_take_the_usual_sizes(block_size: int, head_dim: int) -> None:
    cuda.CudaPlatform().check(
        EngineConfig(model="tiny", block_size=block_size), read_model_config(TINY, {"head_dim": head_dim})
    )


@pytest.mark.parametrize("options", [{"weight_format": "nz"}, {"graph_mode": "torchair"}])
def test_an_option_of_another_device_is_refused_by_name(options: dict[str, str], tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu", **options)  # type: ignore[arg-type]
    (name,) = options
    with pytest.raises(ConfigError, match=rf"{name}=.* is not for device=cpu"):
        get_platform("cpu").check(config, read_model_config(str(tiny_model), {}))


@pytest.mark.parametrize("platform", [cuda.CudaPlatform(), npu.NpuPlatform()], ids=["cuda", "npu"])
def test_int8_weights_are_for_the_cpu(platform: Platform) -> None:
    config = EngineConfig(model="tiny", dtype="bfloat16", weight_format="int8")
    with pytest.raises(ConfigError, match=r"weight_format='int8' is not for device="):
        platform.check(config, read_model_config(TINY, {}))


def test_int8_weights_go_with_bfloat16_alone(tiny_model: Path) -> None:
    model = read_model_config(tiny_model, {})
    config = EngineConfig(model=str(tiny_model), device="cpu", dtype="bfloat16", weight_format="int8")
    get_platform("cpu").check(config, model)
    with pytest.raises(ConfigError, match="weight_format=int8 is for dtype=bfloat16, not float32"):
        get_platform("cpu").check(config.replace(dtype="float32"), model)


def test_a_cache_on_the_cpu_takes_at_most_a_gibibyte_or_as_much_as_the_process(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu")
    alone = get_platform("cpu").cache_bytes(config)
    assert 0 < alone <= max(2**30, 2 * psutil.Process().memory_info().rss)
    assert get_platform("cpu").cache_bytes(config.replace(kv_cache_memory=12345)) == 12345


@pytest.mark.parametrize("free", [2**30, 2**50], ids=["a quarter of little memory", "the most of plenty"])
def test_ranks_on_the_cpu_share_what_one_would_take(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(cpu, "SMALL_CACHE_BYTES", 2**40)  # more than this process takes
    monkeypatch.setattr(cpu, "_available_memory", lambda: free)
    config = EngineConfig(model=str(tiny_model), device="cpu")
    alone, *shared = (get_platform("cpu").cache_bytes(config.replace(tensor_parallel_size=n)) for n in (1, 2, 4))
    assert shared == [alone // 2, alone // 4]
