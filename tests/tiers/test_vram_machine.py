"""Whatever is fetched, streamed, slow, failing, given up or resized: VRAM keeps its invariants."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.fakes import Experts
from tests.tiers.streams import FakeStreams
from tests.tiers.vramrig import CUDA, make_vram, on_cuda

from tierrun.io.errors import CorruptError, ReadError
from tierrun.io.extent import PAGE
from tierrun.io.store import ExpertKey
from tierrun.tiers.copies import Copies, CudaCopies, HostCopies
from tierrun.tiers.slottable import InRam
from tierrun.tiers.tier import NOBODY

LAYERS = (Experts(6, 2, pages=2), Experts(5, 2, pages=3), Experts(6, 2, pages=2))
"""Two record classes, one slot per extent for both; two and three parts per record."""

TOP_K = 2

SHAPES = {
    "both at their minimum": ((3, 3), (3, 3)),
    "vram at its minimum": ((3, 3), (8, 4)),
    "room for most": ((6, 4), (6, 3)),
    "room for all in vram": ((12, 5), (3, 3)),
    "room for all in both": ((12, 5), (12, 5)),
}
"""Slots per record class, VRAM and warm."""

layers = st.integers(0, len(LAYERS) - 1)
some_experts = st.lists(st.integers(0, 5), unique=True, max_size=TOP_K)
many_experts = st.lists(st.integers(0, 5), unique=True, max_size=6)


def of_layer(layer: int, experts: list[int]) -> list[int]:
    return [expert for expert in experts if expert < LAYERS[layer].num]


class VramMachine(RuleBasedStateMachine):
    """One model's thread, as random as it likes, on a device that is as late as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.flips: dict[tuple[int, int], int] = {}
        self.lookups = 0
        self.copied_ahead = False
        self.stale: list[Iterator[object]] = []
        self.resources = ExitStack()

    def make_copies(self, seed: int) -> Copies:
        raise NotImplementedError

    @initialize(
        shape=st.sampled_from(list(SHAPES.values())),
        policy=st.sampled_from(["lru", "lfru", "rates"]),
        depth=st.integers(1, 3),
        window=st.integers(1, 4),
        chunks=st.integers(1, 4),
        flips=st.dictionaries(st.tuples(layers, st.integers(0, 4)), st.integers(1, 2), max_size=2),
        seed=st.integers(0, 1000),
        straight=st.booleans(),
        in_ram=st.sampled_from(InRam),
    )
    def set_up(
        self,
        shape: tuple[tuple[int, int], tuple[int, int]],
        policy: str,
        depth: int,
        window: int,
        chunks: int,
        flips: dict[tuple[int, int], int],
        seed: int,
        straight: bool,
        in_ram: InRam,
    ) -> None:
        vram, warm = shape
        made = make_vram(
            self.make_copies(seed),
            vram=vram,
            warm=warm,
            layers=LAYERS,
            policy=policy,
            depth=depth,
            window=window,
            chunks=chunks,
            straight=straight,
            in_ram=in_ram,
        )
        self.it = self.resources.enter_context(made)
        self.budget = self.it.vram.nbytes
        self.flips = flips
        for key, count in flips.items():
            self.it.rig.reader.flips[self.it.rig.place(*key)] = count

    @rule(
        layer=layers,
        experts=many_experts,
        patience=st.sampled_from([0, 1, 2, 9, 9, 9]),
        copied=st.sampled_from([9, 9, 1, 0]),
    )
    def decode(self, layer: int, experts: list[int], patience: int, copied: int) -> None:
        """A layer for one or several tokens, perhaps given up after a few lists.

        At most `copied` of what RAM has at a time go up, the others are computed there.
        """
        self.begin_token()
        self.it.choose = lambda held: min(copied, len(held))
        experts = of_layer(layer, experts)
        if not experts:
            return
        known = self.it.here(layer) | (self.it.warm(layer) if self.it.in_place else set())
        missing = [e for e in experts if e not in known]
        try:
            brought = self.it.decode(layer, experts, patience)
            assert len(set(brought)) == len(brought) and set(brought) <= set(missing)
            if patience == 9:
                assert set(brought) == set(missing)
                self.it.account()
                assert self.it.rig.counters.lookups - self.lookups == len(experts)
        except (ReadError, CorruptError) as error:
            self.check_error(layer, experts, error)
        self.count(experts)

    @rule(
        layer=layers,
        experts=many_experts,
        group=st.sampled_from([None, 1, 2, 5]),
        patience=st.sampled_from([0, 1, 2, 9, 9, 9]),
    )
    def prefill(self, layer: int, experts: list[int], group: int | None, patience: int) -> None:
        """A layer of a prompt, perhaps given up after a few groups."""
        experts = of_layer(layer, experts)
        if not experts:
            return
        self.it.account()
        self.lookups = self.it.rig.counters.lookups
        here, proven = self.it.here(layer), self.it.vram.slots.proven_experts.copy()
        coming = sorted(self.it.vram._promotions.coming)  # may land, and displace one each
        try:
            groups = self.it.prefill(layer, experts, group, patience)
            seen = [expert for group in groups for expert in group]
            assert len(set(seen)) == len(seen)
            if patience == 9:
                assert set(seen) == set(experts)
                assert self.it.rig.counters.lookups - self.lookups == len(experts)
            hits = here & set(experts)
            assert not hits or set(groups[0]) == hits, "those that are here come first"
        except (ReadError, CorruptError) as error:
            self.check_error(layer, experts, error)
        now = self.it.vram.slots.proven_experts
        lost, come = int((proven & ~now).sum()), int((now & ~proven)[coming].sum())
        assert lost <= come, "prefill took what was proven"
        self.count(experts)

    def count(self, experts: list[int]) -> None:
        self.it.account()
        now = self.it.rig.counters.lookups
        assert 0 <= now - self.lookups <= len(experts)
        self.lookups = now

    @rule(layer=layers, experts=some_experts, streamed=st.booleans())
    def leave_half_done(self, layer: int, experts: list[int], streamed: bool) -> None:
        """An exception keeps a generator alive longer than anyone wants."""
        self.begin_token()
        experts = of_layer(layer, experts)
        self.it.letter(layer, experts)
        self.it.account()
        call = self.it.vram.stream if streamed else self.it.fetched
        generator = call(layer, experts)
        try:
            arrived = next(generator, None)
            if arrived is not None:
                self.it.copies.ready()
                self.it.launch(layer, arrived)
        except (ReadError, CorruptError) as error:
            self.check_error(layer, experts, error)
        self.stale.append(generator)
        self.it.vram.next_step()
        self.count(experts)

    @rule()
    def drop_what_was_left(self) -> None:
        for generator in self.stale:
            generator.close()
        self.stale.clear()

    @rule(used=st.lists(st.tuples(layers, some_experts), max_size=3))
    def next_token(self, used: list[tuple[int, list[int]]]) -> None:
        self.it.vram.next_step()
        for layer, experts in used:
            self.it.vram.used(layer, of_layer(layer, experts))

    @rule(layer=layers, experts=many_experts)
    def copy_ahead(self, layer: int, experts: list[int]) -> None:
        self.it.vram.abandon()
        self.it.vram.copy_ahead(layer, of_layer(layer, experts))
        self.copied_ahead = True

    def begin_token(self) -> None:
        """Before a lookup: a prompt that copied ahead is over."""
        if self.copied_ahead:
            self.it.vram.next_step()
            self.copied_ahead = False

    @rule(nbytes=st.sampled_from([1, 6 * PAGE]))
    def shrink(self, nbytes: int) -> None:
        can_give, before = self.it.vram.chunks.can_drop, self.it.vram.nbytes
        given = self.it.vram.shrink(nbytes)
        assert self.it.vram.nbytes == before - given
        assert (given == 0) == (can_give == 0)

    @rule(nbytes=st.sampled_from([PAGE, 6 * PAGE, 1 << 40]))
    def grow(self, nbytes: int) -> None:
        """What is here stays, byte for byte, wherever the memory comes from."""
        self.it.vram.abandon()
        here, before = self.it.vram.slots.slot_of.copy(), self.it.vram.nbytes
        taken = self.it.vram.grow(nbytes)
        assert taken <= nbytes and self.it.vram.nbytes == before + taken <= self.budget
        held = here != NOBODY  # what was on its way up may have come meanwhile
        assert (self.it.vram.slots.slot_of[held] == here[held]).all()

    @rule(order=st.lists(st.tuples(layers, st.integers(0, 4)), max_size=8))
    def warm_up(self, order: list[tuple[int, int]]) -> None:
        self.it.letter(0, [0])
        try:
            self.it.vram.warm_up(list(dict.fromkeys(ExpertKey(*key) for key in order)))
        except (ReadError, CorruptError):
            pass
        self.lookups = self.it.rig.counters.lookups

    @rule(milliseconds=st.sampled_from([0, 0, 0.2, 1]), shift=st.integers(0, 3))
    def slow_down(self, milliseconds: float, shift: int) -> None:
        self.it.rig.reader.delay = lambda shard, offset: (
            milliseconds / 1000 * ((offset // PAGE + shift) % 3)
        )

    @rule(layer=layers, expert=st.integers(0, 4), count=st.integers(1, 3), part=st.integers(0, 1))
    def fail(self, layer: int, expert: int, count: int, part: int) -> None:
        shard, offset = self.it.rig.place(layer, expert)
        self.it.rig.reader.failures[shard, offset + part * PAGE] += count
        self.failures[layer, expert] += count

    @rule()
    def heal(self) -> None:
        self.it.rig.reader.failures.clear()

    @rule()
    def check_everything(self) -> None:
        self.it.vram.abandon()
        self.it.check_idle()

    def check_error(self, layer: int, experts: list[int], error: Exception) -> None:
        """A named cause, and one that was put there: a single failure is never seen."""
        if isinstance(error, ReadError):
            assert error.layer == layer and error.expert in experts
            assert self.failures[layer, error.expert] > 1
        else:
            named = [e for e in experts if f"layer {layer}, expert {e} " in str(error)]
            assert [self.flips.get((layer, expert)) for expert in named] == [2]

    @invariant()
    def the_books_of_the_host_agree(self) -> None:
        """Without waiting for anything, so that what is late stays late."""
        if not hasattr(self, "it"):
            return
        tier, slots = self.it.tier, self.it.vram.slots
        tier.check_integrity(slots.deferred)
        assert self.it.vram.nbytes <= self.budget
        assert all(slots.slack(record_class) >= 0 for record_class in range(2))
        counters = self.it.rig.counters
        assert counters.demoted_bytes <= counters.promoted_bytes

    def teardown(self) -> None:
        with self.resources:
            if hasattr(self, "it"):
                self.drop_what_was_left()
                self.it.rig.drain()
                self.it.vram.abandon()
                self.it.check_idle()
                figures = self.it.rig.queue.figures()
                straight = self.it.rig.counters.read_bytes - figures.nbytes
                assert 0 <= straight <= self.it.drive.nbytes  # what was given up counts there only


class OnHost(VramMachine):
    """Copies at once: after every step everything is looked at."""

    def make_copies(self, seed: int) -> Copies:
        return HostCopies()

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if hasattr(self, "it"):
            self.it.vram.abandon()
            self.it.check_idle()


class OnLateStreams(VramMachine):
    """Nothing is copied or computed before somebody waits for it."""

    def make_copies(self, seed: int) -> Copies:
        return FakeStreams()


class OnWanderingStreams(VramMachine):
    """Each stream gets ahead at random."""

    def make_copies(self, seed: int) -> Copies:
        return FakeStreams(random.Random(seed))


class OnCuda(VramMachine):
    def make_copies(self, seed: int) -> Copies:
        return CudaCopies(CUDA)


FEW = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.timeout(240)
class TestOnHost(OnHost.TestCase):
    settings = FEW


@pytest.mark.timeout(240)
class TestOnLateStreams(OnLateStreams.TestCase):
    settings = FEW


@pytest.mark.timeout(240)
class TestOnWanderingStreams(OnWanderingStreams.TestCase):
    settings = FEW


@on_cuda
@pytest.mark.timeout(280)
class TestOnCuda(OnCuda.TestCase):
    settings = FEW
