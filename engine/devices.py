"""Which device computes: `auto`, `cpu`, `cuda` or `cuda:N`, and why not another."""

import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from tierrun.io.errors import UsageError

log = logging.getLogger(__name__)

_LEAST_CAPABILITY = (8, 0)


class DeviceChoice(NamedTuple):
    """The device, and how it came to be that one."""

    device: torch.device
    reason: str


def choose_device(asked: str) -> DeviceChoice:
    """The device for `asked`; `auto` takes a GPU where there is one that works.

    Raises:
        UsageError: not a device, one that is not there, or one that is too old.
    """
    if asked == "cpu":
        return DeviceChoice(torch.device("cpu"), "as asked")
    if asked == "auto":
        obstacle = obstacle_to_gpu(0)
        if obstacle is not None:
            return DeviceChoice(torch.device("cpu"), f"auto: {obstacle}")
        return DeviceChoice(torch.device("cuda", 0), f"auto: {torch.cuda.get_device_name(0)}")
    index = _cuda_index(asked)
    obstacle = obstacle_to_gpu(index)
    if obstacle is not None:
        raise UsageError(f"--device {asked}: {obstacle}; --device cpu works everywhere")
    return DeviceChoice(torch.device("cuda", index), torch.cuda.get_device_name(index))


def _cuda_index(asked: str) -> int:
    kind, _, number = asked.partition(":")
    if kind != "cuda" or (":" in asked and not number.isdecimal()):
        raise UsageError(f"--device {asked}: choose auto, cpu, cuda or cuda:N")
    return int(number) if number else 0


def obstacle_to_gpu(index: int) -> str | None:
    """Why GPU number `index` cannot be used, in a clause; None if it can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install one with it"
    try:
        start: Callable[[], None] = torch.cuda.init
        start()
    except (RuntimeError, AssertionError) as error:  # no driver, or one older than this torch
        return str(error).strip().splitlines()[0].rstrip(".")
    count = torch.cuda.device_count()
    if index >= count:
        return f"this machine has {count} GPU{'s' * (count != 1)}, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        found = ".".join(map(str, capability))
        return f"its compute capability is {found}, {least} is needed (Ampere or later)"
    if importlib.util.find_spec("triton") is None:
        return "triton, in which its kernels are written, is not installed; pip install triton"
    return None
