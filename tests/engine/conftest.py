"""Converted tiny models, made once for all tests that share them."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.checkpoints import quiet, reference
from tests.engine.models import prompt_tokens, save_runnable

import tierrun
from tierrun.io.errors import BudgetError
from tierrun.io.store import Store
from tierrun.tiers.budget import plan_tier

PROMPT = prompt_tokens()


@dataclass(frozen=True)
class Model:
    """A checkpoint, its store, and the smallest budget that runs it."""

    family: str
    checkpoint: Path
    store: Path
    smallest: int

    @property
    def expert_bytes(self) -> int:
        """A budget for all experts."""
        return Store.open([self.store]).manifest.expert_bytes


@dataclass(frozen=True)
class Reference:
    """What transformers itself gives for a checkpoint and `PROMPT`."""

    logits: torch.Tensor
    greedy: list[int]


@pytest.fixture(scope="session", autouse=True)
def _quietly() -> Iterator[None]:
    """One thread, since the matrices are tiny, and no advice from transformers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Family → its converted tiny model."""

    @cache
    def make(family: str) -> Model:
        directory = tmp_path_factory.mktemp(family)
        save_runnable(family, directory / "checkpoint")
        return convert(family, directory / "checkpoint", directory / "store")

    return make


def convert(family: str, checkpoint: Path, store: Path) -> Model:
    manifest = tierrun.convert(checkpoint, store)
    with pytest.raises(BudgetError) as caught:
        plan_tier(0, manifest, landing=True)
    smallest = re.search(r"(\d+) bytes", str(caught.value))
    assert smallest is not None
    return Model(family, checkpoint, store, int(smallest[1]))


@pytest.fixture(scope="session")
def reference_of(model_of: Callable[[str], Model]) -> Callable[[str], Reference]:
    """Family → what transformers gives."""

    @cache
    def make(family: str) -> Reference:
        model = reference(model_of(family).checkpoint)
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            logits = model(ids).logits[0]
            greedy = model.generate(
                ids, max_new_tokens=32, do_sample=False, use_cache=True, eos_token_id=None
            )
        return Reference(logits, greedy[0, len(PROMPT) :].tolist())

    return make


@pytest.fixture(scope="session")
def model(model_of: Callable[[str], Model]) -> Model:
    """A plain Mixture of Experts, where the family does not matter. Do not change its files."""
    return model_of("qwen3_moe")


@pytest.fixture(scope="session")
def packed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model in a store where everything that can be in Q8_0 is. Do not change its files."""
    store = tmp_path_factory.mktemp("packed") / "store"
    with quiet():
        tierrun.convert(model.checkpoint, store, quant="q8_0", quant_resident="q8_0")
    return store


@pytest.fixture
def own_store(model: Model, tmp_path: Path) -> Path:
    """A copy of that model's store as converted, to damage or change."""
    unused = shutil.ignore_patterns("usage.*")
    return shutil.copytree(model.store, tmp_path / "own", ignore=unused)
