"""One rank of a numerics test, with a simulated NPU of its own: runs a script of steps, keeps its logits in a file.

    python numerics_rank.py RANK RANKS STORE OUTPUT MODEL DTYPE GRAPHS

STORE is where the ranks meet, GRAPHS where compiled graphs are kept.
"""

from __future__ import annotations

import sys

import torch
from npu_rig import SMALL, Rig, Sequence, random_sequences

from nanovllm_dist.models.parallel import Communicator, SingleRank

LENGTHS = [150, 40, 300, 1, 129]
DECODES = 3
SIZE = 8


def run_script(model: str, rig: Rig, decode_by_graph: bool) -> dict[str, torch.Tensor]:
    """Logits of this rank's vocabulary by kind of step: prefill, chunked prefill, mixed, decode."""
    raw = SMALL[model]
    first, second, third, short, late = random_sequences(LENGTHS, raw["vocab_size"])
    decoder = random_sequences([60], raw["vocab_size"], seed=2)[0]
    decoder.row = 5
    made = {"prefill": rig.step([(first, 149), (second, 39), (decoder, 50)])}
    chunks = [rig.step([(third, 100)]), rig.step([(third, 128)]), rig.step([(third, 71)])]
    made["chunked"] = torch.cat(chunks)
    made["mixed"] = rig.step([(decoder, 1), (short, 1), (late, 128)])
    running = [first, second, third, decoder, late]
    decode = _by_graph(rig) if decode_by_graph else _by_operator(rig)
    parts = []
    for _ in range(DECODES):
        parts.append(decode(running))
        for sequence in running:
            sequence.tokens.append((7 * sequence.computed + sequence.row) % raw["vocab_size"])
    made["decode"] = torch.cat(parts)
    return made


def _by_operator(rig: Rig):  # type: ignore[no-untyped-def]
    return lambda running: rig.step([(sequence, 1) for sequence in running])


def _by_graph(rig: Rig):  # type: ignore[no-untyped-def]
    """Through torchair: traced, lowered, saved, loaded, and run by the simulated graph engine."""
    from nanovllm_dist.workers.platform.npu_torchair import TorchairRecorder

    step = rig.decode_step()
    recorder = TorchairRecorder(rig.config, rig.model_config, rig.layers, rig.comm)  # type: ignore[arg-type]
    inputs = rig.decode_inputs([], SIZE)
    with torch.inference_mode():
        replay = recorder.record(SIZE, step.forward, inputs, [1] * SIZE)

    @torch.inference_mode()
    def decode(running: list[Sequence]) -> torch.Tensor:
        for kept, new in zip(inputs, rig.decode_inputs(running, SIZE), strict=True):
            kept.copy_(new)
        lengths = [sequence.computed + 1 for sequence in running]
        _tokens, logits = replay(lengths + [1] * (SIZE - len(running)))
        for sequence in running:
            sequence.computed += 1
        return logits[: len(running), : rig.model.lm_head.vocab_size].float().cpu()

    return decode


def main() -> None:
    import torch_npu  # noqa: F401

    from nanovllm_dist.workers.platform.npu_hccl import open_communicator

    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    store, output, model, dtype, graphs = sys.argv[3:]
    torch.set_num_threads(1)
    device = torch.device("npu", rank)
    torch.npu.set_device(device)
    comm: Communicator = SingleRank()
    if ranks > 1:
        comm = open_communicator(rank, ranks, torch.distributed.FileStore(store, ranks))
    rig = Rig(SMALL[model], getattr(torch, dtype), comm=comm, graph_cache_dir=graphs, device=device)
    torch.save(run_script(model, rig, decode_by_graph=True), output)


if __name__ == "__main__":
    main()
