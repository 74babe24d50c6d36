"""Fixtures for everything: a store made by hand, directories on disk and in memory."""

import gc
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings
from tests.fakes import TinyStore, tiny_store

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU
    from tests.interpreter import patch_once

    patch_once()

settings.register_profile(
    "tierrun",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tierrun")


def _started_since(before: set[threading.Thread]) -> list[str]:
    return [t.name for t in set(threading.enumerate()) - before if t.name.startswith("tierrun")]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Whatever a test started is over when it ends."""
    before = set(threading.enumerate())
    yield
    if _started_since(before):
        gc.collect()  # an error that was caught refers to its frames, and they to the engine
    left = _started_since(before)
    assert not left, f"threads left: {left}"


@pytest.fixture(autouse=True)
def _logs_as_by_default() -> None:
    """Whatever level the command line has set in a test before."""
    logging.getLogger("tierrun").setLevel(logging.NOTSET)


@pytest.fixture
def tiny() -> TinyStore:
    """Three layers of six experts of one page, top-2, in one shard; in memory only."""
    return tiny_store()


@pytest.fixture
def memory_directory() -> Iterator[Path]:
    """A directory on a tmpfs."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this platform")
    with TemporaryDirectory(dir="/dev/shm", prefix="tierrun-tests-") as directory:
        yield Path(directory)
