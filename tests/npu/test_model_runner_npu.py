"""A worker's ModelRunner on a simulated NPU gives the tokens of the CPU's, in every graph mode and kind of step.

In fp32, which a card's attention does not take: only so can tokens be expected to be equal.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from npu_rig import SMALL

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, pack_ints, unpack_ints
from nanovllm_dist.workers.model_runner import ModelRunner
from nanovllm_dist.workers.platform import get_platform, npu_limits

pytestmark = pytest.mark.npu
PROMPTS = [[3, 1, 4, 1, 5, 9], [2] * 130, [7, 7, 7]]
LATE = [11, 12, 13, 14, 15]
DECODES = 5
BLOCKS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    raw = {**SMALL["qwen3"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


class Driver:
    """What a coordinator does of it: slots, blocks, steps."""

    def __init__(self, model: Path, device: str, **options: object) -> None:
        config, model_config = resolve_config(
            EngineConfig(
                model=str(model), device=device, dtype="float32", load_format="dummy", max_num_seqs=4, num_blocks=16,
                max_model_len=256, max_num_batched_tokens=512, block_size=128, **options,
            ),  # type: ignore[arg-type]
            progress=False,
        )  # fmt: skip
        platform = get_platform(config.device)
        opened = platform.open_device(0, config)
        self._runner = ModelRunner(config, model_config, platform, SingleRank(), opened)
        self._fill()
        self._runner.allocate(self._runner.measure_blocks())
        self._number = 0

    def _fill(self) -> None:
        """Dummy weights are made by a generator of the device: those of the CPU everywhere."""
        from nanovllm_dist.models.loader import dummy_weights
        from nanovllm_dist.models.registry import build_model

        runner = self._runner
        source = build_model(runner._model_config, SingleRank(), runner._kernels, torch.float32, torch.device("cpu"))
        dummy_weights(source, 0)
        for mine, made in zip(runner.model.parameters(), source.parameters(), strict=True):
            mine.data.copy_(made)
        runner.model.finalize()

    def run(self, counts: list[tuple[int, int]], entering: dict[int, tuple[list[int], SamplingParams]]) -> list[int]:
        rows = [
            NewRow(
                slot=slot,
                tokens=pack_ints(prompt),
                prompt_len=len(prompt),
                num_computed=0,
                num_cached=0,
                blocks=pack_ints(range(1 + slot * BLOCKS, 1 + (slot + 1) * BLOCKS)),
                seed=slot,
                params=params,
                bad_words=[],
            )
            for slot, (prompt, params) in entering.items()
        ]
        slots, tokens = zip(*counts, strict=True)
        step = Step(0, self._number, pack_ints(slots), pack_ints(tokens), b"", b"", rows)
        self._number += 1
        running = self._runner.start(step)
        assert running is not None
        return unpack_ints(running.result().tokens)


def script(driver: Driver) -> list[list[int]]:
    """A prefill, decodes, a prefill beside decodes, and decodes of all, some greedy and some drawn."""
    plain = SamplingParams(temperature=1.0, seed=1)
    special = SamplingParams(temperature=0.8, top_k=5, seed=2)
    greedy = SamplingParams(temperature=0.0)
    first = {slot: (prompt, (greedy, plain, special)[slot]) for slot, prompt in enumerate(PROMPTS)}
    made = [driver.run([(slot, len(prompt)) for slot, prompt in enumerate(PROMPTS)], first)]
    made += [driver.run([(0, 1), (1, 1), (2, 1)], {}) for _ in range(DECODES)]
    made.append(driver.run([(0, 1), (1, 1), (2, 1), (3, len(LATE))], {3: (LATE, greedy)}))
    made += [driver.run([(3, 1), (0, 1), (1, 1), (2, 1)], {}) for _ in range(DECODES)]
    return made


@pytest.mark.parametrize("mode", ["eager", "aclgraph", "torchair", "auto"])
def test_every_graph_mode_gives_the_tokens_of_the_cpu(
    mode: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_limits, "ATTENTION_DTYPES", ("float32",))

    found = script(Driver(model, "npu", graph_mode=mode, graph_cache_dir=str(tmp_path)))

    assert found == script(Driver(model, "cpu"))


def test_fp32_is_refused_where_no_test_allows_it(model: Path) -> None:
    from nanovllm_dist.errors import ConfigError

    with pytest.raises(ConfigError, match="change dtype"):
        Driver(model, "npu")
