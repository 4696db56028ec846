"""The steps that a worker runs before it measures its memory: a prefill as large as the budget, then decodes
of many rows and of one.

They go through everything a real step goes through, so what is compiled or allocated at first use is there when the
first request comes. The rows share their blocks: what comes out means nothing.
"""

from __future__ import annotations

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, pack_ints


def profile_steps(config: EngineConfig, num_tokens: int) -> tuple[list[Step], int]:
    """(steps, blocks of the cache they need, the null block included); `num_tokens` in the prefill.

    There are as many rows as may sample at once, of equal length, as long as each has two tokens to run.
    """
    rows = max(1, min(config.max_num_seqs, num_tokens // 2))
    counts = [rows, 1][: config.max_model_len - 1]  # of rows in each decode, as far as there is room for their tokens
    length = max(1, min(num_tokens // rows, config.max_model_len - len(counts)))
    num_blocks = -(-(length + len(counts)) // config.block_size)
    slots = list(range(rows))
    new_rows = [
        NewRow(
            slot=slot,
            tokens=pack_ints([0] * length),
            prompt_len=length,
            num_computed=0,
            num_cached=0,
            blocks=pack_ints(range(1, num_blocks + 1)),
            seed=slot,
            params=SamplingParams(temperature=float(slot % 2)),
            bad_words=[],
        )
        for slot in slots
    ]
    prefill = Step(-1, -2, pack_ints(slots), pack_ints([length] * rows), b"", b"", new_rows)
    decodes = [Step(-1, -1, pack_ints(slots[:count]), pack_ints([1] * count), b"", b"", []) for count in counts]
    return [prefill, *decodes], num_blocks + 1
