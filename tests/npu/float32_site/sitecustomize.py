"""For a process of the simulated device whose engine runs in float32: lifts the one limit in the way, and prepares the
stand-in as its own sitecustomize would.

A card's attention takes 16 bits only, which tokens cannot be compared in: another order of sums gives another token
where two are nearly equal.
"""

import runpy
from pathlib import Path

from nanovllm_dist.workers.platform import npu_limits

npu_limits.ATTENTION_DTYPES = (*npu_limits.ATTENTION_DTYPES, "float32")
runpy.run_path(str(Path(__file__).parents[1] / "standin" / "site" / "sitecustomize.py"))
