"""The context takes memory from the experts and gives it back; what cannot be is refused."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import Model, convert
from tests.engine.models import save_runnable
from tests.fakes import Experts
from tests.tiers.vramrig import VramRig, make_vram

from tierrun.engine.engine import Engine
from tierrun.engine.gpu.backend import GpuBackend
from tierrun.engine.gpu.room import ContextRoom
from tierrun.engine.options import Options
from tierrun.io.errors import BudgetError
from tierrun.io.extent import PAGE
from tierrun.io.store import Store
from tierrun.tiers.arbiter import Arbiter

LAYERS = [Experts(12, 2), Experts(12, 2), Experts(12, 2)]


class FakeCache:
    """A page for each two tokens; running out of memory when a `device` has no more."""

    def __init__(self, capacity: int) -> None:
        self.room, self.capacity, self.resets, self.failures = 2, capacity, 0, 0

    @property
    def nbytes(self) -> int:
        return self.room // 2 * PAGE

    def room_for(self, length: int) -> int:
        return min(self.capacity, 1 << (max(2, length) - 1).bit_length())

    def nbytes_more(self, room: int) -> int:
        return (room - self.room) // 2 * PAGE

    def resize(self, room: int) -> None:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError
        self.room = room

    def reset(self) -> None:
        self.resets += 1


class Generous(Arbiter):
    """The experts get what they would use, however quickly a context of a few bytes grows."""

    def worth_to_context(self, nbytes: int, tokens: int) -> float:
        return 0.0


class Full:
    """A device on which cache and experts have everything but `spare` bytes."""

    def __init__(self, it: VramRig, capacity: int = 64, spare: int = 0, workspace: int = 0) -> None:
        self.it, self.cache, self.forgotten = it, FakeCache(capacity), 0
        self.whole = it.vram.nbytes + self.cache.nbytes + spare
        arbiter = Generous(it.rig.counters)
        self.room = ContextRoom(
            cast(Any, self.cache), it.vram, arbiter, self.spare, workspace, self.forget
        )

    def spare(self) -> int:
        return self.whole - self.it.vram.nbytes - self.cache.nbytes

    def forget(self) -> None:
        self.forgotten += 1

    def use(self, *experts: int) -> None:
        """Some tokens that use these."""
        for _ in range(3):
            self.it.vram.next_step()
            for first in range(0, len(experts), 2):
                self.it.decode(0, experts[first : first + 2])
            self.it.account()


@pytest.fixture
def full() -> Iterator[Full]:
    """Eight experts in four chunks, of which two can go: four pages, so eight tokens more."""
    with make_vram(layers=LAYERS, vram=(8,), warm=(12,)) as it:
        yield Full(it)


def test_a_context_grows_with_what_the_experts_give_and_a_shorter_one_returns_it(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    full.use(*range(8))
    with caplog.at_level(logging.INFO, "tierrun"):
        full.room.grow_to(2)
        assert full.forgotten == 0
        full.room.grow_to(5)
        assert full.cache.room == 8 and full.it.vram.nbytes == 4 * PAGE and full.forgotten == 1
        full.it.check_idle()
        full.use(*range(8))
        assert not full.room.shrink_to(5)
        assert full.room.shrink_to(2)
    assert full.cache.room == 2 and full.cache.resets == 1 and full.forgotten == 2
    assert full.it.vram.nbytes == 8 * PAGE
    full.it.check_idle()
    grown, back = (record.getMessage() for record in caplog.records)
    assert grown.startswith(
        "VRAM: context grew to 8 tokens: 12.0 KiB more, 16.0 KiB of it from the experts (worth "
    )
    assert back.startswith("VRAM: context back to 2 tokens: 16.0 KiB to the experts (worth ")


def test_what_nobody_has_is_taken_first() -> None:
    with make_vram(layers=LAYERS, vram=(8,), warm=(12,)) as it:
        full = Full(it, spare=3 * PAGE)
        full.room.grow_to(8)
        assert it.vram.nbytes == 8 * PAGE and full.spare() == 0
        assert full.room.longest() == 16
        with pytest.raises(BudgetError):
            full.room.grow_to(17)


def test_more_than_the_experts_can_give_is_refused_with_what_fits(full: Full) -> None:
    full.use(*range(8))
    before = full.it.vram.slots.slot_of.copy()
    with pytest.raises(
        BudgetError, match=r"grow to 16 tokens.*28.0 KiB more.*8 tokens are the most"
    ):
        full.room.grow_to(9)
    assert full.cache.room == 2 and full.forgotten == 0 and full.cache.resets == 0
    assert (full.it.vram.slots.slot_of == before).all()
    full.room.grow_to(8)


def test_a_longer_context_computes_in_more_memory() -> None:
    with make_vram(layers=LAYERS, vram=(8,), warm=(12,)) as it:
        full = Full(it, workspace=PAGE // 2)
        full.room.grow_to(4)
        assert it.vram.nbytes == 6 * PAGE
        with pytest.raises(BudgetError):
            full.room.grow_to(8)


def test_memory_that_the_experts_would_not_use_stays_with_the_context(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    full.room.grow_to(8)  # nobody has used any expert
    with caplog.at_level(logging.DEBUG, "tierrun"):
        assert not full.room.shrink_to(2)
    assert full.cache.room == 8 and full.cache.resets == 0 and full.forgotten == 1
    assert "keeps 12.0 KiB" in caplog.text


def test_somebody_who_was_quicker_costs_the_experts_more(full: Full) -> None:
    full.cache.failures = 1
    full.room.grow_to(4)
    assert full.cache.room == 4 and full.it.vram.nbytes == 4 * PAGE
    full.cache.failures = 1
    with pytest.raises(BudgetError):
        full.room.grow_to(8)
    assert full.cache.room == 4


def test_when_the_device_runs_out_room_for_longer_contexts_goes_first(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    full.room.grow_to(4)
    assert full.room.relieve(1, 2) == PAGE and full.cache.room == 2
    assert caplog.text == ""
    assert full.room.relieve(1, 2) == 2 * PAGE
    assert full.room.relieve(1, 2) == 0
    assert len(caplog.records) == 1
    assert "memory ran out: the hot tier gave 8.0 KiB back and goes on with 16.0 KiB" in caplog.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=12), st.integers(0, 9))
def test_never_more_than_there_is_and_all_is_regained(
    contexts: list[tuple[int, bool]], spare: int
) -> None:
    with make_vram(layers=LAYERS, vram=(8,), warm=(12,)) as it:
        full = Full(it, capacity=16, spare=spare * PAGE)
        budget = it.vram.nbytes
        for length, begins in contexts:
            full.use(*range(8))
            if begins:
                full.room.shrink_to(length)
            try:
                full.room.grow_to(length)
                assert full.cache.room >= min(length, 16)
            except BudgetError:
                assert full.room.longest() < length
            assert full.spare() >= 0 and it.vram.nbytes <= budget
            it.check_idle()
        full.use(*range(12))
        full.room.shrink_to(1)
        assert it.vram.nbytes == budget and full.cache.room == 2


# -- the whole engine ----------------------------------------------------------------------------


class SmallEngine(Engine):
    """On the CPU, kernels interpreted; the context begins with room for four tokens."""

    backend: GpuBackend
    least_room = 4

    def _make_backend(self, weights: Any) -> GpuBackend:
        device = torch.device("cpu")
        given = self.store, weights, self.options, self.ledger, device, 16
        return GpuBackend(*given, least_room=self.least_room)


class LargeEngine(SmallEngine):
    least_room = 16


PROMPT = [n * 7 % 48 for n in range(1, 21)]

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("one_layer")
    sizes = dict(num_hidden_layers=1, vocab_size=48, max_position_embeddings=2048)
    save_runnable("qwen3_moe", directory / "checkpoint", **sizes)
    return convert("qwen3_moe", directory / "checkpoint", directory / "store")


def load(kind: type[SmallEngine], model: Model, vram: int) -> SmallEngine:
    given = Options(ram="1GiB", device="cpu", ubatch=2, vram=str(vram), exact=True)
    return kind(Store.open([model.store]), given)


@interpreted
def test_logits_do_not_depend_on_who_has_the_memory(
    one_layer: Model, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for kind in (SmallEngine, LargeEngine):
        with (
            caplog.at_level(logging.INFO, "tierrun"),
            load(kind, one_layer, one_layer.expert_bytes) as engine,
        ):
            engine.warm_up()
            session = engine.session()
            found.append(torch.cat([session.logits(PROMPT[:n]) for n in (2, 1, 1, 1)]))
            engine.check_integrity()
            assert not engine.backend.damaged()
            full = engine.stats().hot_bytes == one_layer.expert_bytes
            assert full == (kind is LargeEngine)
    assert "context grew to 8 tokens" in caplog.text
    assert "all of the context at once" in caplog.text
    assert torch.allclose(*found, atol=1e-5)


@interpreted
def test_a_refused_step_leaves_the_session_usable(one_layer: Model) -> None:
    with load(SmallEngine, one_layer, one_layer.smallest) as engine:
        session = engine.session()
        session.prefill(PROMPT[:2])
        with pytest.raises(BudgetError, match="4 tokens are the most"):
            session.prefill(PROMPT[:3])
        assert session.tokens == PROMPT[:2]
        with pytest.raises(BudgetError):
            session.extend_to(PROMPT[10:15])
        session.prefill(PROMPT[2:3])
        assert session.tokens == PROMPT[:3]
        engine.check_integrity()


# -- on a GPU ------------------------------------------------------------------------------------


class MovingEngine(Engine):
    """The context begins with room for 512 tokens, and moves at the 513th."""

    backend: GpuBackend
    least_room = 512

    def _make_backend(self, weights: Any) -> GpuBackend:
        given = self.store, weights, self.options, self.ledger, self.device, 2048
        return GpuBackend(*given, least_room=self.least_room)


class StayingEngine(MovingEngine):
    least_room = 2048


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_cache_that_moved_is_recorded_anew(
    one_layer: Model, caplog: pytest.LogCaptureFixture
) -> None:
    found, tokens = [], PROMPT * 27
    for kind, graphs in ((MovingEngine, True), (StayingEngine, True), (MovingEngine, False)):
        given = Options(
            ram="1GiB",
            device="cuda",
            ubatch=128,
            vram=str(one_layer.expert_bytes),
            exact=True,
            graphs=graphs,
        )
        with (
            caplog.at_level(logging.INFO, "tierrun"),
            kind(Store.open([one_layer.store]), given) as engine,
        ):
            session = engine.session()
            session.prefill(tokens[:500])
            steps = [session.prefill([token]) for token in tokens[500:530]]
            session.reset()
            session.prefill(tokens[:20])
            steps += [session.prefill([token]) for token in tokens[20:30]]
            found.append(torch.stack(steps))
            engine.check_integrity()
    assert caplog.text.count("context grew to 1024 tokens") == 2
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
