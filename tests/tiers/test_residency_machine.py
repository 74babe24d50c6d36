"""Whatever is leased, streamed, read ahead, slow, failing or given up: the invariants hold."""

from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.fakes import Experts
from tests.tiers.rig import make_rig

from tierrun.io.errors import CorruptError, ReadError
from tierrun.io.extent import PAGE
from tierrun.tiers.residency import Held

LAYERS = (Experts(6, 2, pages=2), Experts(5, 2, pages=3), Experts(6, 2, pages=2))
"""Two record classes, one slot per extent for both; two and three parts per record."""

TOP_K = 2

SHAPES = {
    "warm at its minimum": ((0, 0), (3, 3)),
    "hot alone at its minimum": ((3, 3), (0, 0)),
    "hot above the smallest warm": ((1, 2), (3, 3)),
    "room for most": ((4, 3), (6, 4)),
    "room for all": ((0, 0), (12, 5)),
}
"""Slots per record class, hot and warm."""

layers = st.integers(0, len(LAYERS) - 1)
some_experts = st.lists(st.integers(0, 5), unique=True, max_size=TOP_K)
many_experts = st.lists(st.integers(0, 5), unique=True, max_size=6)


def of_layer(layer: int, experts: list[int]) -> list[int]:
    return [expert for expert in experts if expert < LAYERS[layer].num]


class ResidencyMachine(RuleBasedStateMachine):
    """One model's thread, as random as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.flips: dict[tuple[int, int], int] = {}
        self.lookups = 0
        self.resources = ExitStack()

    @initialize(
        shape=st.sampled_from(list(SHAPES.values())),
        policy=st.sampled_from(["lru", "lfru", "rates"]),
        depth=st.integers(1, 3),
        flips=st.dictionaries(st.tuples(layers, st.integers(0, 4)), st.integers(1, 2), max_size=2),
    )
    def set_up(
        self,
        shape: tuple[tuple[int, int], tuple[int, int]],
        policy: str,
        depth: int,
        flips: dict[tuple[int, int], int],
    ) -> None:
        hot, warm = shape
        self.rig = self.resources.enter_context(
            make_rig(hot=hot, warm=warm, layers=LAYERS, policy=policy, depth=depth)
        )
        self.flips = flips
        for key, count in flips.items():
            self.rig.reader.flips[self.rig.place(*key)] = count

    @rule(layer=layers, experts=some_experts, ahead=many_experts, patience=st.integers(0, 3))
    def decode(self, layer: int, experts: list[int], ahead: list[int], patience: int) -> None:
        """A lease, perhaps abandoned after `patience` arrivals, with a look at the next layer."""
        experts = of_layer(layer, experts)
        self.lookups += len(experts)
        try:
            with self.rig.residency.lease(layer, experts) as lease:
                if layer + 1 < len(LAYERS):
                    self.rig.residency.look_ahead(layer + 1, of_layer(layer + 1, ahead))
                arrivals = lease.arrivals()
                for _ in range(patience):
                    self.check_all(layer, lease.ready)
                    if next(arrivals, None) is None:
                        assert {held.expert for held in lease.ready} == set(experts)
                        break
                self.check_all(layer, lease.ready)
        except (ReadError, CorruptError) as error:
            self.check_error(layer, experts, error)

    @rule(layer=layers, experts=many_experts, window=st.integers(1, 3), patience=st.integers(0, 7))
    def prefill(self, layer: int, experts: list[int], window: int, patience: int) -> None:
        """A stream, perhaps abandoned after `patience` experts."""
        experts = of_layer(layer, experts)
        landing = self.rig.placement.landing
        before, seen = self.rig.counters.lookups, []
        slots = landing.num_slots_of(self.rig.placement.class_of_layer[layer])
        stream = self.rig.residency.stream(layer, experts, min(window, slots // 2))
        try:
            for _ in range(patience):
                held = next(stream, None)
                if held is None:
                    assert sorted(seen) == sorted(experts), "each exactly once"
                    assert self.rig.counters.lookups - before == len(experts)
                    break
                self.rig.check_held(layer, held)
                seen.append(held.expert)
        except (ReadError, CorruptError) as error:
            self.check_error(layer, experts, error)
        stream.close()
        assert len(seen) <= self.rig.counters.lookups - before <= len(experts)
        self.lookups = self.rig.counters.lookups

    @rule(used=st.lists(st.tuples(layers, some_experts), max_size=3))
    def next_token(self, used: list[tuple[int, list[int]]]) -> None:
        self.rig.residency.next_step()
        for layer, experts in used:
            self.rig.residency.used(layer, of_layer(layer, experts))

    @rule()
    def cancel_what_nobody_waits_for(self) -> None:
        self.rig.queue.drop(list(self.rig.placement.landing.tickets.values()))

    @rule()
    def wait_for_every_read(self) -> None:
        self.rig.drain()

    @rule(milliseconds=st.sampled_from([0, 0, 0.2, 2]), shift=st.integers(0, 3))
    def slow_down(self, milliseconds: float, shift: int) -> None:
        """Some places are slower than others, so that reads end out of order."""
        self.rig.reader.delay = lambda shard, offset: (
            milliseconds / 1000 * ((offset // PAGE + shift) % 3)
        )

    @rule(layer=layers, expert=st.integers(0, 4), count=st.integers(1, 3), part=st.integers(0, 1))
    def fail(self, layer: int, expert: int, count: int, part: int) -> None:
        shard, offset = self.rig.place(layer, expert)
        self.rig.reader.failures[shard, offset + part * PAGE] += count
        self.failures[layer, expert] += count

    @rule()
    def heal(self) -> None:
        self.rig.reader.failures.clear()

    def check_all(self, layer: int, ready: list[Held]) -> None:
        for held in ready:
            self.rig.check_held(layer, held)

    def check_error(self, layer: int, experts: list[int], error: Exception) -> None:
        """A named cause, and one that was put there: a single failure is never seen."""
        if isinstance(error, ReadError):
            assert error.layer == layer and error.expert in experts
            assert self.failures[layer, error.expert] > 1
            assert error.errno == self.rig.reader.errno
        else:
            named = [e for e in experts if f"layer {layer}, expert {e} " in str(error)]
            assert [self.flips.get((layer, expert)) for expert in named] == [2]

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check_idle()

    @invariant()
    def the_ledger_adds_up(self) -> None:
        if not hasattr(self, "rig"):
            return
        counters, placement = self.rig.counters, self.rig.placement
        assert counters.lookups == self.lookups
        ended = counters.ahead_useful + counters.ahead_late
        ended += counters.ahead_wasted + counters.ahead_dropped
        outstanding = sum(map(len, self.rig.residency._ahead))
        assert counters.ahead_issued == ended + outstanding
        if placement.landing is placement.warm:
            inside = sum(
                placement.hot.memory(slot).numel()
                for slot, owner in enumerate(placement.hot.owner)
                if owner >= 0
            )
            assert counters.promoted_bytes - counters.demoted_bytes == inside

    def teardown(self) -> None:
        with self.resources:
            if hasattr(self, "rig"):
                self.rig.drain()
                self.rig.check_idle()
                figures = self.rig.queue.figures()
                assert self.rig.counters.read_bytes == figures.nbytes, "moved, not accounted"


@pytest.mark.timeout(240)
class TestResidency(ResidencyMachine.TestCase):
    settings = settings(max_examples=200, stateful_step_count=40)
