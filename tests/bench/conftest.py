"""A synthetic model of toy size, made once: what the benchmarks build at real size."""

from pathlib import Path

import pytest

from tierrun.bench.checkpoint import Shape, build_checkpoint
from tierrun.tools.convert import convert

TOY = Shape(
    layers=2,
    experts=16,
    top_k=2,
    hidden=64,
    intermediate=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=512,
)


@pytest.fixture
def shape() -> Shape:
    return TOY


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoint/` and `store/`."""
    directory = tmp_path_factory.mktemp("synthetic")
    build_checkpoint(directory / "checkpoint", TOY)
    convert(directory / "checkpoint", directory / "store")
    return directory
