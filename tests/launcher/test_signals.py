"""How a process ends after an interrupt that it caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INTERRUPTED = """
import sys
from nanovllm_dist.launcher.signals import forget_interrupt

try:
    exec("raise KeyboardInterrupt")  # as while a dataclass is made
except KeyboardInterrupt:
    forget_interrupt()
sys.exit(130)
"""


def test_an_interrupt_within_an_exec_does_not_decide_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)

    ended = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, check=False)

    assert ended.returncode == 130
