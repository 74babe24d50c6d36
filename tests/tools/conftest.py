"""A checkpoint to convert, and one to spoil."""

import shutil
from pathlib import Path

import pytest
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody changes: 16 experts in two layers."""
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("source") / "mixtral")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(source, tmp_path / "mixtral"))
