"""An engine over two Ray nodes with a SIMULATED device each, declared as Ray resources: what several hosts need, but
for the network between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from npu_engine import Launched, environment, greedy_tokens
from two_nodes import TwoNodes, two_nodes

pytestmark = [pytest.mark.npu, pytest.mark.slow]


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    paths = {"PYTHONPATH": environment()["PYTHONPATH"]}
    first, second = ({**paths, "ASCEND_RT_VISIBLE_DEVICES": device} for device in "01")
    with two_nodes(['--resources={"NPU": 1}'], (first, second)) as nodes:
        yield nodes


def test_ranks_on_two_nodes_give_the_tokens_of_one_host(nodes: TwoNodes, smollm2: Path) -> None:
    tokens = {}
    for name, options in {
        "two nodes": {"launcher": "ray", "ray_address": nodes.address},
        "one host": {"launcher": "local"},
    }.items():
        engine = Launched(nodes.environment, model=smollm2, device="npu", tp=2, graph_mode="aclgraph", **options)
        try:
            ready = engine.address()
            tokens[name] = greedy_tokens(*ready)
        finally:
            engine.stop()
        assert ready[0].startswith("tcp://" if name == "two nodes" else "ipc://")
    assert tokens["two nodes"] == tokens["one host"]
