"""The simulated device keeps the promises of a real one that the project relies on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nanovllm_dist

pytestmark = pytest.mark.npu


@pytest.fixture(autouse=True)
def first_device() -> Iterator[None]:
    torch.npu.set_device(0)
    torch.manual_seed(0)
    yield
    torch.npu.synchronize()


def test_tensors_compute_as_on_the_cpu() -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    on_device = [tensor.npu() for tensor in (x, weight)]

    def compute(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, weight))
        hidden[1:3].mul_(2)
        top = hidden.max(-1)
        return [hidden, *top, hidden.t().contiguous(), hidden.to(torch.bfloat16), torch.cat([hidden, hidden])[::2]]

    for got, want in zip(compute(*on_device), compute(x, weight), strict=True):
        assert got.device == torch.device("npu", 0)
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        torch.testing.assert_close(got.cpu(), want)


def test_factories_make_tensors_on_the_device() -> None:
    assert torch.arange(5, device="npu").tolist() == [0, 1, 2, 3, 4]
    assert torch.full((2,), 3, dtype=torch.int32, device="npu").tolist() == [3, 3]
    assert torch.zeros(2, 2, device="npu").sum().item() == 0
    assert torch.ones(3).npu().new_tensor([7]).device.type == "npu"


def test_an_operator_that_nobody_emulates_fails_by_name() -> None:
    x = torch.randn(2, 8).npu()

    with pytest.raises(RuntimeError, match=r"stand-in for CANN has no operator|not found"):
        torch.ops.npu.npu_geglu(x)[0].cpu()


def test_memory_is_limited_and_what_is_free_can_be_asked() -> None:
    # what earlier tests left in torch's cache would be given back when memory runs out
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()

    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total + 1, dtype=torch.uint8, device="npu")

    kept = torch.empty(total // 4, dtype=torch.uint8, device="npu")
    assert torch.npu.mem_get_info()[0] <= free - kept.numel()


def test_pinned_memory_is_read_when_the_copy_runs_and_other_memory_when_it_is_asked_for() -> None:
    from standin import runtime

    pinned, pageable = torch.zeros(1).pin_memory(), torch.zeros(1)
    late, early = torch.empty(1, device="npu"), torch.empty(1, device="npu")
    with runtime.held_back():
        late.copy_(pinned, non_blocking=True)
        early.copy_(pageable, non_blocking=True)
        pinned.fill_(5)
        pageable.fill_(5)

    assert (late.item(), early.item()) == (5, 0)


def test_work_that_is_held_back_runs_before_its_result_is_read() -> None:
    from standin import runtime

    x = torch.zeros(3, device="npu")
    with runtime.held_back():
        x.add_(1)
        doubled = x * 2
        back = torch.zeros(3).pin_memory()
        back.copy_(doubled, non_blocking=True)
        assert back.tolist() == [0, 0, 0]
        torch.npu.current_stream().synchronize()
        assert back.tolist() == [2, 2, 2]


def test_streams_are_ordered_by_events_and_by_nothing_else() -> None:
    from standin import runtime

    first, second = torch.npu.Stream(), torch.npu.Stream()
    x, seen_late, seen_early = (torch.zeros(1, device="npu") for _ in range(3))
    done = torch.npu.Event()
    with runtime.held_back():
        with torch.npu.stream(second):
            seen_early.copy_(x)
        with torch.npu.stream(first):
            x.fill_(1)
            done.record()
        second.wait_event(done)
        with torch.npu.stream(second):
            seen_late.copy_(x)
    torch.npu.synchronize()

    assert (seen_early.item(), seen_late.item()) == (0, 1)


def test_a_capture_runs_nothing_and_each_replay_runs_all_of_it() -> None:
    counter, x = torch.zeros(2, device="npu"), torch.ones(2, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        counter.add_(x)
        doubled = counter * 2
    assert counter.tolist() == [0, 0]

    graph.replay()
    x.fill_(10)
    graph.replay()

    assert counter.tolist() == [11, 11]
    assert doubled.tolist() == [22, 22]


def test_a_captured_stream_cannot_be_waited_for() -> None:
    graph = torch.npu.NPUGraph()
    x = torch.zeros(1, device="npu")

    with pytest.raises(RuntimeError), torch.npu.graph(graph):
        x.add_(1).item()


def test_streams_that_a_capture_forks_into_are_captured_too() -> None:
    side = torch.npu.Stream()
    x, y = torch.zeros(1, device="npu"), torch.zeros(1, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            y.add_(1)
        main.wait_stream(side)
        x.add_(y)
    assert (x.item(), y.item()) == (0, 0)

    graph.replay()

    assert (x.item(), y.item()) == (1, 1)


class CapturedAttention:
    """One decode attention whose lengths can be changed after it was captured, with or without waiting for that."""

    def __init__(self, waits: bool) -> None:
        self.query, self.cache = torch.randn(2, 4, 1, 16).npu(), torch.randn(9, 2, 16, 16).npu()
        self.out = [torch.empty_like(self.query), torch.empty(0, device="npu")]
        self.options = {
            "block_table": torch.arange(8, dtype=torch.int32).view(2, 4).npu(),
            "num_heads": 4,
            "num_key_value_heads": 2,
            "scale": 0.25,
            "input_layout": "BNSD",
            "block_size": 16,
        }
        self.updates = torch.npu.Stream()
        self.updated = torch.npu.ExternalEvent()
        self.waits = waits
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            if waits:
                self.updated.wait(stream)
                self.updated.reset(stream)
            torch.npu.graph_task_group_begin(stream)
            self.attend([1, 1])
            self.handle = torch.npu.graph_task_group_end(stream)
            self.result = self.out[0] * 2

    def attend(self, lengths: list[int]) -> None:
        torch.ops.npu.npu_fused_infer_attention_score.out(
            self.query, self.cache, self.cache, actual_seq_lengths_kv=lengths, out=self.out, **self.options
        )

    def update(self, lengths: list[int]) -> None:
        with torch.npu.stream(self.updates):
            torch.npu.graph_task_update_begin(self.updates, self.handle)
            self.attend(lengths)
            torch.npu.graph_task_update_end(self.updates)
            if self.waits:
                self.updated.record(self.updates)

    def expected(self, lengths: list[int]) -> torch.Tensor:
        out, _ = torch.ops.npu.npu_fused_infer_attention_score(
            self.query, self.cache, self.cache, actual_seq_lengths_kv=lengths, **self.options
        )
        return out.cpu() * 2


def test_a_replay_that_waits_for_its_update_uses_the_lengths_of_its_step() -> None:
    attention = CapturedAttention(waits=True)

    for lengths in ([3, 60], [4, 61], [64, 1]):
        attention.graph.replay()
        attention.update(lengths)
        assert torch.equal(attention.result.cpu(), attention.expected(lengths))


def test_a_replay_that_does_not_wait_uses_the_lengths_of_the_step_before() -> None:
    attention = CapturedAttention(waits=False)

    attention.graph.replay()
    attention.update([3, 60])

    assert torch.equal(attention.result.cpu(), attention.expected([1, 1]))


def test_a_wait_that_nobody_ends_is_an_error_that_says_so() -> None:
    attention = CapturedAttention(waits=True)

    attention.graph.replay()

    with pytest.raises(RuntimeError, match="waits for an event that nobody records"):
        attention.result.cpu()
    attention.update([2, 2])


def test_an_update_with_another_number_of_tasks_is_refused() -> None:
    attention = CapturedAttention(waits=False)

    torch.npu.graph_task_update_begin(attention.updates, attention.handle)
    with torch.npu.stream(attention.updates):
        attention.attend([1, 1])
        attention.attend([1, 1])
    with pytest.raises(RuntimeError, match="task group of 1 tasks was updated with 2"):
        torch.npu.graph_task_update_end(attention.updates)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )


def test_a_process_that_gets_simulated_devices_says_so_once() -> None:
    done = run_python("import torch_npu, torch; torch.ones(1).npu(); print(torch.npu.device_count())")

    assert done.stdout.split()[-1] == "2"
    assert done.stderr.count("SIMULATED Ascend NPUs") == 1


def test_visible_devices_are_counted_as_the_real_runtime_does() -> None:
    done = run_python("import torch_npu; print(torch_npu.npu.device_count())", ASCEND_RT_VISIBLE_DEVICES="1,7,0")

    assert done.stdout.split()[-1] == "1"


def test_without_the_variable_the_simulation_is_refused() -> None:
    without = {"NANOVLLM_NPU_SIMULATION": ""}
    done = run_python(
        "import sys; sys.path.append('tests/npu'); from standin import simulation; simulation.install()", **without
    )

    assert done.returncode == 1
    assert "NANOVLLM_NPU_SIMULATION is not set" in done.stderr


def test_the_package_does_not_know_of_the_simulation() -> None:
    sources = Path(nanovllm_dist.__file__).parent.rglob("*.py")
    named = re.compile(r"NPU_SIMULATION|import standin|from standin")
    assert [str(path) for path in sources if named.search(path.read_text())] == []
