"""NpuPlatform on a SIMULATED device: torch_npu's own code, over memory and streams that are the host's."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform import get_platform, npu_versions
from nanovllm_dist.workers.transfers import packed_size, views

pytestmark = pytest.mark.npu

CONFIG = EngineConfig(model="m", max_steps_in_flight=2)


@pytest.fixture
def device() -> torch.device:
    return get_platform("npu").open_device(0, CONFIG)


def test_the_device_is_found_and_taken_where_none_is_named() -> None:
    assert get_platform("auto").name == "npu"
    assert get_platform("npu").count_devices() == 2


def test_a_device_that_is_not_there_says_which_are() -> None:
    with pytest.raises(ConfigError, match=r"NPU 2 was asked for and 2 are usable \(ASCEND_RT_VISIBLE_DEVICES=all\)"):
        get_platform("npu").open_device(2, CONFIG)


def test_without_cann_the_error_says_what_to_install_and_to_source() -> None:
    program = (
        "from nanovllm_dist.config import EngineConfig\n"
        "from nanovllm_dist.workers.platform import get_platform\n"
        "get_platform('npu').open_device(0, EngineConfig(model='m'))"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    bare = {**bare, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "NANOVLLM_NPU_SIMULATION": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=bare)
    assert "ConfigError: device=npu: torch_npu cannot be imported: libhccl.so" in done.stderr
    assert "source set_env.sh of CANN" in done.stderr


def test_uploads_keep_their_values_while_their_buffers_are_used_again(device: torch.device) -> None:
    transfers = get_platform("npu").transfers(CONFIG)
    sent = [[np.arange(number, number + 5), np.full((2, 3), number, dtype=np.float32)] for number in range(40)]
    received = [transfers.upload(arrays) for arrays in sent]
    for arrays, tensors in zip(sent, received, strict=True):
        assert [tensor.device.type for tensor in tensors] == ["npu", "npu"]
        for array, tensor in zip(arrays, tensors, strict=True):
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def test_an_upload_into_place_larger_than_the_staging_buffer_arrives_whole(device: torch.device) -> None:
    transfers = get_platform("npu").transfers(CONFIG)
    arrays = [np.arange(400_000, dtype=np.int64)]
    packed = torch.zeros(packed_size(arrays), dtype=torch.uint8, device=device)
    transfers.upload_into(packed, arrays)
    np.testing.assert_array_equal(views(packed, arrays)[0].cpu().numpy(), arrays[0])


def test_a_download_gives_the_tokens(device: torch.device) -> None:
    copy = get_platform("npu").transfers(CONFIG).download(torch.arange(7, device=device))
    assert copy.tokens() == list(range(7))
    assert copy.done()


def test_the_cache_takes_what_weights_and_the_largest_step_leave(device: torch.device) -> None:
    platform = get_platform("npu")
    assert platform.cache_bytes(CONFIG.replace(kv_cache_memory=12345)) == 12345

    torch.npu.reset_peak_memory_stats()
    before = platform.cache_bytes(CONFIG)
    weights = torch.zeros(2**26, dtype=torch.uint8, device=device)
    with_weights = platform.cache_bytes(CONFIG)
    activations = torch.zeros(2**25, dtype=torch.uint8, device=device)
    del activations
    with_step = platform.cache_bytes(CONFIG)

    assert 0 <= before - with_weights - weights.nbytes < 2**22
    assert with_weights - with_step >= 2 * 2**25  # once for steps, once for graphs


def test_the_doctor_asks_torch_npu_itself_in_a_process_of_its_own() -> None:
    finding = npu_versions._probe()
    assert not finding.blocks, finding.remark
    assert finding.value.count("GiB free") == 2  # a device each
