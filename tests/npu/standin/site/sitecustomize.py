"""Loaded by Python when this folder is on PYTHONPATH: prepares torch_npu's import for the stand-in.

Does nothing where NANOVLLM_NPU_SIMULATION is not set, and nothing but register a finder before torch_npu is imported.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

_STANDIN = Path(__file__).parents[2]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets modules be found as always, and runs something after some of them."""

    def __init__(self, actions):
        self.actions = actions
        self.looking = False

    def find_spec(self, name, path=None, target=None):
        if self.looking or name not in self.actions:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            self.act_after(spec.loader, self.actions[name])
        return spec

    def act_after(self, loader, action):
        run = loader.exec_module

        def run_and_act(module):
            run(module)
            action()

        loader.exec_module = run_and_act


def _simulate():
    from standin import simulation

    simulation.install()


def _replace_engine():
    from standin import engine

    engine.install()


def _prepare():
    # the simulated device computes in the thread that calls: nothing may be queued for another
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    # the folder that holds the package standin, last: its neighbours' names must not hide others
    sys.path.append(str(_STANDIN))
    sys.meta_path.insert(0, _AfterImport({"torch_npu": _simulate, "torchair.core._backend": _replace_engine}))


if os.environ.get("NANOVLLM_NPU_SIMULATION"):
    _prepare()
