"""Which device computes, and what is said where one cannot."""

import importlib.util
from typing import Any

import pytest
import torch

from tierrun.engine.devices import choose_device
from tierrun.io.errors import UsageError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with two good GPUs; change what it says."""
    machine: dict[str, Any] = {"count": 2, "capability": (8, 6), "error": None, "triton": True}

    def init() -> None:
        if machine["error"]:
            raise RuntimeError(machine["error"])

    find = importlib.util.find_spec
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine["count"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: find(name) if name != "triton" or machine["triton"] else None,
    )
    return machine


def test_auto_takes_a_gpu_that_works(gpu: dict[str, Any]) -> None:
    assert choose_device("auto").device == torch.device("cuda", 0)
    assert choose_device("cuda:1").device == torch.device("cuda", 1)
    assert choose_device("cpu").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "0 GPUs"),
        ({"capability": (7, 5)}, "capability is 7.5, 8.0 is needed"),
        ({"error": "The NVIDIA driver on your system is too old.\nmore"}, "driver .* too old"),
        ({"triton": False}, "pip install triton"),
    ],
)
def test_what_keeps_a_gpu_from_use_is_said(
    change: dict[str, Any], said: str, gpu: dict[str, Any]
) -> None:
    gpu.update(change)
    with pytest.raises(UsageError, match=said) as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)
    choice = choose_device("auto")
    assert choice.device == torch.device("cpu") and choice.reason.startswith("auto: ")


def test_a_gpu_that_is_not_there(gpu: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--device cuda:7: this machine has 2 GPUs"):
        choose_device("cuda:7")


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="built without CUDA"):
        choose_device("cuda")
    assert choose_device("auto").device == torch.device("cpu")


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:-1", "tpu", ""])
def test_no_device_at_all(asked: str) -> None:
    with pytest.raises(UsageError, match="choose auto, cpu, cuda or cuda:N"):
        choose_device(asked)
