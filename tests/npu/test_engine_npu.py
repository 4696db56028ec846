"""A whole engine on SIMULATED devices: Ray, ZeroMQ, the real ProcessGroupHCCL and torch_npu over the stand-in for CANN.

What is shown is that every step reaches the device as it should and comes back, in each graph mode. Kernels, their
numerics and their speed are not: those take a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from npu_engine import Launched, greedy_tokens
from prompts import PROMPTS

pytestmark = [pytest.mark.npu, pytest.mark.slow]


@pytest.fixture(scope="module")
def cpu_tokens(smollm2: Path) -> Iterator[list[list[int]]]:
    """Greedy tokens of the same model on two ranks of the CPU."""
    engine = Launched(model=smollm2, device="cpu", tp=2, launcher="local")
    try:
        yield greedy_tokens(*engine.address())
    finally:
        engine.stop()


@pytest.mark.timeout(900)  # torchair compiles four sizes on each rank: 150 s on two cores
@pytest.mark.parametrize("mode", ["eager", "aclgraph", "torchair"])
def test_two_simulated_npus_give_the_tokens_of_the_cpu(
    mode: str, cpu_tokens: list[list[int]], smollm2: Path, tmp_path: Path
) -> None:
    cache = {"graph_cache_dir": str(tmp_path / "graphs")} if mode == "torchair" else {}
    engine = Launched(model="smollm2-135m", device="npu", tp=2, launcher="ray", graph_mode=mode, **cache)
    try:
        tokens = greedy_tokens(*engine.address())
    finally:
        engine.stop()

    assert [len(each) for each in tokens] == [32] * len(PROMPTS)
    assert tokens == cpu_tokens
