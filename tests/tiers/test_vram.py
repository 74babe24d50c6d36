"""The hot tier in VRAM: what is copied when, what stays, and who sees it."""

import ctypes
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import FOREVER, Experts
from tests.tiers.rig import hold_all, let_go
from tests.tiers.streams import FakeStreams
from tests.tiers.vramrig import KINDS, VramRig, make_vram

from tierrun.io.errors import BudgetError, ReadError
from tierrun.io.extent import PAGE
from tierrun.io.store import ExpertKey
from tierrun.tiers.copies import Copy, HostCopies, Pairs
from tierrun.tiers.memory import OrdinaryMemory
from tierrun.tiers.residency import Held
from tierrun.tiers.slottable import IN_PLACE, KIND, InRam
from tierrun.tiers.tier import SlotState
from tierrun.tiers.transfers import worth_demoting

pytestmark = [pytest.mark.timeout(60)]

kinds = pytest.mark.parametrize("kind", KINDS)

WIDE = [Experts(12, 2), Experts(12, 2), Experts(12, 2)]


def step(it: VramRig, layer: int, *experts: int) -> list[int]:
    """One token that uses one layer only."""
    it.vram.next_step()
    brought = it.decode(layer, experts)
    it.account()
    return brought


def learn(it: VramRig, layer: int, *experts: int) -> None:
    """Use `experts` again and again, two at a time, until they are proven and well worth it."""
    for _ in range(3):
        for first in range(0, len(experts), 2):
            step(it, layer, *experts[first : first + 2])


# -- decode --------------------------------------------------------------------------------------


@kinds
def test_what_is_missing_is_brought_and_found_the_next_time(kind: str) -> None:
    with make_vram(kind) as it:
        assert sorted(step(it, 0, 3, 1)) == [1, 3]
        assert step(it, 0, 1, 3) == []
        assert step(it, 0, 1, 2) == [2]
        counters = it.rig.counters
        assert (counters.hot, counters.warm, counters.cold) == (3, 0, 3)
        assert counters.promoted_bytes == 3 * PAGE


@kinds
def test_what_warm_has_comes_first_and_together(kind: str) -> None:
    with make_vram(kind, layers=[Experts(8, 4)], vram=(6,), warm=(8,)) as it:
        it.rig.prefill(0, [5, 2])
        fetched = it.vram.fetch(0, [1, 5, 0, 2])
        lists = [[e for e, _ in brought.arrived] for brought in fetched]
        assert lists[0] == [5, 2] and sorted(sum(lists[1:], [])) == [0, 1]
        assert (it.rig.counters.warm, it.rig.counters.cold) == (2, 2 + 2)


def test_the_table_says_where_the_bytes_are() -> None:
    with make_vram() as it:
        step(it, 1, 4, 0)
        for expert in (4, 0):
            address = it.vram.base.data_ptr() + int(it.vram.table_of(1)[expert])
            assert ctypes.string_at(address, PAGE) == it.rig.tiny.record(ExpertKey(1, expert))
        assert (it.vram.table_of(0) == -1).all() and (it.vram.table >= 0).sum() == 2


def published_wrongly(it: VramRig) -> list[int]:
    """Experts whose table entry on the device points at other bytes."""
    wrong = []
    size = int(it.rig.placement.first[1])
    for index, offset in enumerate(it.vram.table.tolist()):
        if offset >= 0:
            truth = it.rig.tiny.record(ExpertKey(*divmod(index, size)))
            if ctypes.string_at(it.vram.base.data_ptr() + offset, PAGE) != truth:
                wrong.append(index)
    return wrong


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_no_lookup_finds_an_entry_that_points_at_other_bytes(seed: int | None) -> None:
    """The whole table, as a kernel sees it that is launched after a call and runs at any time."""
    streams = FakeStreams(None if seed is None else random.Random(seed))
    with make_vram(streams, vram=(3,), warm=(3,)) as it:
        wrong: list[list[int]] = []
        for token in range(12):
            it.vram.next_step()
            for layer in range(3):
                first = (5 * token + layer) % 6
                it.decode(layer, [first, (first + 1 + token % 5) % 6])
                streams.compute.enqueue(lambda: wrong.append(published_wrongly(it)))
            it.account()
        streams.synchronize()
        assert wrong == [[]] * 36 and it.rig.counters.promoted_bytes > 36 * PAGE


def test_a_fetch_waits_for_no_copy() -> None:
    streams = FakeStreams()
    with make_vram(streams) as it:
        step(it, 0, 3, 1)
        assert streams.up.done == 0
        assert it.mirror(0, [3, 1]) == it.letter(0, [3, 1])


@kinds
def test_several_tokens_may_want_more_than_top_k_and_more_than_there_are_slots(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(3,), warm=(3,)) as it:
        step(it, 0, 0, 1)
        assert sorted(it.decode(0, list(range(12)))) == list(range(2, 12))
        assert it.rig.counters.lookups == 2 + 12


@kinds
def test_everything_may_be_leased_and_more_still_comes(kind: str) -> None:
    """Slots of this layer's own hits are reused, once their kernels have run."""
    with make_vram(kind, layers=WIDE, vram=(3,), warm=(6,)) as it:
        step(it, 0, 0, 1)
        step(it, 0, 2)
        assert it.here(0) == {0, 1, 2}
        assert sorted(it.decode(0, [0, 1, 2, 3, 4, 5])) == [3, 4, 5]


# -- who stays -----------------------------------------------------------------------------------


def test_free_slots_are_filled_before_anything_is_displaced() -> None:
    with make_vram(layers=WIDE, vram=(6,), warm=(12,)) as it:
        learn(it, 0, 0, 1, 2, 3, 4, 5)
        assert it.here(0) == {0, 1, 2, 3, 4, 5}
        assert len(it.proven(0)) == 6 - 2, "a reserve of top-k is not"


def test_a_newcomer_that_is_worth_more_takes_the_place_without_a_copy() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(12,)) as it:
        learn(it, 0, 0, 1)
        for _ in range(300):
            it.vram.next_step()
        step(it, 0, 2, 3)
        before = it.rig.counters.promoted_bytes
        assert it.proven(0) == {2, 3} and it.here(0) == {0, 1, 2, 3}
        assert step(it, 0, 0, 1) == [], "what was displaced is still hit"
        assert it.rig.counters.promoted_bytes == before


def test_a_newcomer_that_is_worth_less_passes_through() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(12,)) as it:
        for _ in range(10):
            learn(it, 0, 0, 1)
        for newcomer in range(2, 8):
            step(it, 0, newcomer)
        assert it.proven(0) == {0, 1} and it.here(0) == {0, 1, 6, 7}


def test_a_hit_on_an_unproven_slot_may_prove_it() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(12,)) as it:
        for _ in range(2):
            learn(it, 0, 0, 1)
        step(it, 0, 2)
        assert it.proven(0) == {0, 1}
        for _ in range(20):
            step(it, 0, 2)
        assert 2 in it.proven(0) and it.here(0) >= {0, 1, 2}


@pytest.mark.parametrize(("slots", "reserve"), [(9, 8), (128, 8), (320, 20), (1600, 96)])
def test_the_reserve_is_top_k_or_more_where_that_costs_little(slots: int, reserve: int) -> None:
    with make_vram(layers=[Experts(128, 8)] * 5, vram=(slots,), warm=(16,)) as it:
        assert it.vram.slots.reserve == [reserve]


# -- what is computed in RAM ---------------------------------------------------------------------


def none_copied(held: list[Held]) -> int:
    return 0


def end_token(it: VramRig) -> None:
    """No layer waits now: what was computed in RAM begins to come up."""
    it.vram.served(np.array([], np.int64))


@kinds
def test_what_is_computed_in_ram_is_not_waited_for_and_comes_up_later(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(6,), warm=(12,)) as it:
        it.choose = none_copied
        assert sorted(step(it, 0, 3, 1)) == [1, 3]
        assert {key.expert for key in it.computed} == {1, 3}, "in RAM"
        assert not it.vram.slots.deferred and it.rig.counters.promoted_bytes == 0, "not meanwhile"
        end_token(it)
        it.vram.check_integrity()
        assert it.here(0) == {1, 3}
        assert step(it, 0, 1, 3) == [], "from VRAM"
        assert it.rig.counters.promoted_bytes == 2 * PAGE


def test_a_deferred_copy_is_found_only_when_it_has_come() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=WIDE, vram=(6,), warm=(12,)) as it:
        it.choose = none_copied
        step(it, 0, 3)
        end_token(it)
        assert it.here(0) == set() and it.vram.slots.deferred
        step(it, 1, 4)
        assert it.here(0) == set(), "the copy has not run"
        streams.beside.advance(streams.beside.enqueued)
        step(it, 2, 5)
        assert it.here(0) == {3}, "seen at the next call"


@kinds
def test_what_is_coming_up_already_is_waited_for_where_it_is_wanted(kind: str) -> None:
    with make_vram(FakeStreams() if kind == "fake" else kind, layers=WIDE, warm=(12,)) as it:
        it.choose = none_copied
        step(it, 0, 3)
        end_token(it)
        copied = it.rig.counters.promoted_bytes
        it.choose = None
        step(it, 0, 3)
        assert it.rig.counters.promoted_bytes == copied, "copied once"
        assert it.here(0) == {3}
        it.choose = none_copied
        step(it, 0, 5)
        end_token(it)
        assert sorted(sum(it.prefill(0, [3, 5]), [])) == [3, 5]


def test_what_vram_would_not_keep_stays_in_ram() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(12,)) as it:
        for _ in range(10):
            learn(it, 0, 0, 1)
        it.choose = none_copied
        before = it.rig.counters.promoted_bytes
        for _ in range(3):
            step(it, 0, 5)
            end_token(it)
        assert it.rig.counters.promoted_bytes == before
        for _ in range(20):
            step(it, 0, 5)
            end_token(it)
        assert it.here(0) >= {0, 1, 5}, "until it is worth it"


def test_deferred_copies_leave_a_layer_its_slots() -> None:
    with make_vram(FakeStreams(), layers=WIDE, vram=(3,), warm=(3,)) as it:
        it.choose = none_copied
        for expert in range(12):
            assert step(it, expert % 3, expert, (expert + 1) % 12)
            end_token(it)
        it.choose = None
        assert len(step(it, 0, 7, 11)) >= 1


def test_the_first_to_be_copied_are_worth_most() -> None:
    with make_vram(layers=[Experts(12, 4)], vram=(9,), warm=(12,)) as it:
        it.rig.prefill(0, list(range(12)))
        it.vram.residency.used(0, [7])
        it.choose = lambda held: 1
        step(it, 0, 2, 5, 7)
        assert [key.expert for key in it.computed] == [2, 5]


@kinds
def test_the_books_of_copies_do_not_grow(kind: str) -> None:
    """Also where what is copied up gives its slot to what goes down in the same call."""
    with make_vram(kind, layers=[Experts(16, 2)], vram=(8,), warm=(8,)) as it:
        for _ in range(20):
            learn(it, 0, *range(14))
        assert it.rig.counters.demoted_bytes > 20 * PAGE
        assert it.vram.num_copies <= 8


# -- copied ahead --------------------------------------------------------------------------------


@kinds
def test_what_was_copied_ahead_is_there_and_counts_as_of_ram(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(6,), warm=(24,)) as it:
        it.rig.prefill(1, list(range(12)))
        it.prefill(0, [0, 1, 2, 3, 4, 5])
        proven = it.proven(0)
        it.vram.copy_ahead(1, list(range(12)))
        before = it.rig.counters.warm, it.rig.counters.hot
        copied = len(it.here(1))
        assert copied == 6 - len(proven), "whatever nothing proven holds"
        promoted = it.rig.counters.promoted_bytes
        groups = it.prefill(1, list(range(12)))
        assert set(groups[0]) == set(range(copied)) and it.proven(0) == proven
        assert (it.rig.counters.warm, it.rig.counters.hot) == (before[0] + 12, before[1])
        assert it.rig.counters.promoted_bytes == promoted + (12 - copied) * PAGE


@kinds
def test_nothing_is_copied_ahead_over_what_kernels_still_read(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(36,)) as it:
        for layer in (0, 1, 2, 0, 1):
            it.prefill(layer, list(range(12)))
            it.vram.copy_ahead((layer + 1) % 3, list(range(12)))
        it.vram.next_step()
        it.check_seen()
        it.vram.check_integrity()


# -- found in RAM --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_ram", [InRam.IN_PLACE, InRam.FOR_HOST])
@kinds
def test_what_ram_has_is_found_there_and_comes_up_if_it_is_worth_it(
    kind: str, in_ram: InRam
) -> None:
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(12,), in_ram=in_ram) as it:
        it.rig.prefill(0, [0, 1, 2, 3, 4, 5])
        assert step(it, 0, 3, 1) == [], "nothing to fetch"
        assert [key.expert for key in it.computed] == [3, 1]
        assert it.rig.counters.warm == 2
        it.vram.check_integrity()
        assert it.here(0) == {1, 3} and step(it, 0, 1, 3) == []
        assert it.computed == [] and it.rig.counters.hot == 2
        for _ in range(10):
            learn(it, 0, 1, 3)
        before = it.rig.counters.promoted_bytes
        assert step(it, 0, 5, 4) == [] and len(it.computed) == 2
        assert it.rig.counters.promoted_bytes == before, "not worth it"


@kinds
def test_what_leaves_ram_is_found_there_no_more(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(3,), in_ram=InRam.IN_PLACE) as it:
        for first in range(0, 12, 2):
            step(it, 0, first, first + 1)
            in_place = {e for e in range(12) if it.letter(0, [e])[0] & KIND == IN_PLACE}
            assert in_place == it.warm(0) - it.here(0)


@kinds
def test_what_arrives_late_is_found_when_it_is_published(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(12,), in_ram=InRam.IN_PLACE) as it:
        assert it.letter(0, [3, 1]) == [-1, -1]
        for brought in it.vram.fetch(0, [3, 1], none_copied):
            it.vram.publish()
            for held in brought.held:
                entry = it.letter(0, [held.expert])[0]
                address = it.vram.base.data_ptr() + entry - IN_PLACE
                assert address == held.tier.memory(held.slot).data_ptr()


def test_what_has_come_up_meanwhile_does_not_come_up_again() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=WIDE, vram=(6,), warm=(12,), in_ram=InRam.IN_PLACE) as it:
        it.rig.prefill(0, [3])
        step(it, 0, 3)
        streams.beside.advance(streams.beside.enqueued)
        assert step(it, 0, 3) == [] and it.computed, "found in RAM for the last time"
        it.vram.check_integrity()
        assert it.rig.counters.promoted_bytes == PAGE


def test_many_promotions_at_once_take_each_others_place_nowhere() -> None:
    """What sinks for one of them must not land on another that is about to rise."""
    with make_vram(
        "host", layers=[Experts(24, 8)], vram=(16,), warm=(9,), in_ram=InRam.IN_PLACE
    ) as it:
        for turn in range(40):
            step(it, 0, *{(3 * turn + 5 * k) % 24 for k in range(8)})
            it.vram.check_integrity()
            it.check_seen()


# -- straight from the drive ---------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("group", [None, 1, 2])
def test_what_the_warm_tier_would_not_keep_goes_past_it(kind: str, group: int | None) -> None:
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(6,), straight=True) as it:
        groups = it.prefill(0, list(range(12)), group)
        assert sorted(sum(groups, [])) == list(range(12))
        assert it.warm(0) == {0, 1}, "its share, the most used"
        assert it.drive.nbytes == 10 * PAGE
        counters = it.rig.counters
        assert (counters.cold, counters.read_bytes) == (12, 12 * PAGE)
        assert counters.promoted_bytes == 2 * PAGE


@kinds
def test_slots_are_read_into_only_when_their_kernels_have_run(kind: str) -> None:
    """Whatever is late: every kernel sees its expert (see `VramRig.check_seen`)."""
    with make_vram(kind, layers=WIDE, vram=(4,), warm=(3,), straight=True) as it:
        it.drive.delay = 0.001
        for layer in (0, 1, 2, 0):
            assert sorted(sum(it.prefill(layer, list(range(12))), [])) == list(range(12))
        it.vram.check_integrity()


def test_a_failed_straight_read_is_named_and_leaves_nothing() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(3,), straight=True) as it:
        it.drive.failures[it.rig.place(0, 7)] = 2
        with pytest.raises(ReadError, match="layer 0, expert 7"):
            it.prefill(0, list(range(12)))
        it.vram.check_integrity()
        assert sorted(sum(it.prefill(0, list(range(12))), [])) == list(range(12))


def test_a_stream_given_up_waits_for_its_straight_reads() -> None:
    with make_vram(layers=WIDE, vram=(4,), warm=(3,), straight=True) as it:
        it.drive.delay = 0.01
        it.prefill(0, list(range(12)), patience=2)
        it.vram.check_integrity()
        assert sorted(sum(it.prefill(1, list(range(12))), [])) == list(range(12))


# -- together with the warm tier -----------------------------------------------------------------


@kinds
def test_the_two_tiers_hold_nearly_the_sum_of_both(kind: str) -> None:
    with make_vram(kind, layers=[Experts(16, 2)], vram=(8,), warm=(8,)) as it:
        for _ in range(6):
            learn(it, 0, *range(14))
        it.vram.check_integrity()
        assert len(it.here(0) | it.warm(0)) >= 14
        before = it.rig.counters.cold
        learn(it, 0, *range(14))
        assert it.rig.counters.cold == before, "none of fourteen is read again"
        assert it.rig.counters.demoted_bytes > 0


def test_what_is_displaced_goes_down_and_is_found_only_when_it_is_there() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=WIDE, vram=(3,), warm=(4,)) as it:
        learn(it, 0, 0)
        assert it.proven(0) == {0}
        it.vram.check_integrity()
        for expert in (1, 2, 3, 4, 5):  # 0 is backed: its warm slot goes first
            it.rig.prefill(0, [expert])
        assert 0 not in it.warm(0)
        for _ in range(40):
            it.vram.next_step()
        for _ in range(3):
            step(it, 0, 5)
        assert it.proven(0) == {5}
        assert it.rig.counters.demoted_bytes == PAGE
        assert 0 not in it.warm(0) and it.rig.placement.home(0, 0) is None
        filling = np.flatnonzero(it.rig.placement.warm.state == SlotState.FILLING)
        assert len(filling) == 1 and streams.down.done == 0
        step(it, 0, 4)
        assert 0 in it.warm(0)


@pytest.mark.parametrize(
    ("worth", "victim", "backed", "goes"),
    [(1.0, 2.0, False, False), (2.0, 1.0, False, True), (1.0, 1.0, False, False)]
    + [(0.0, 9.0, True, True)],
)
def test_a_demotion_must_be_worth_it(worth: float, victim: float, backed: bool, goes: bool) -> None:
    assert worth_demoting(worth, victim, backed=backed) is goes


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_worth_less_than_what_warm_holds_is_dropped(wanted: bool) -> None:
    """By a hit on an unproven slot, so that no warm slot has just become superfluous."""
    with make_vram(layers=WIDE, vram=(3,), warm=(3,)) as it:
        for _ in range(4):
            step(it, 0, 0)
        step(it, 0, 1)
        assert (it.proven(0), it.here(0)) == ({0}, {0, 1})
        it.vram.check_integrity()
        for _ in range(1 if wanted else 20):
            it.vram.next_step()
            it.rig.decode(0, [2, 3])
            it.rig.decode(0, [4])
        assert it.warm(0) == {2, 3, 4}
        for _ in range(4):
            step(it, 0, 1)
        assert it.proven(0) == {1}
        it.vram.check_integrity()
        assert (0 in it.warm(0)) is wanted
        assert it.rig.counters.demoted_bytes == wanted * PAGE
        assert it.here(0) == {0, 1}, "until its slot is reused"


# -- errors --------------------------------------------------------------------------------------


@kinds
def test_a_read_that_fails_leaves_what_had_come(kind: str) -> None:
    with make_vram(kind, layers=[Experts(8, 4)], vram=(6,), warm=(6,)) as it:
        it.rig.prefill(0, [2])
        it.rig.reader.failures[it.rig.place(0, 7)] = FOREVER
        with pytest.raises(ReadError, match="expert 7"):
            it.decode(0, [7, 2])
        it.vram.check_integrity()
        assert it.here(0) == {2}
        it.rig.reader.failures.clear()
        assert it.decode(0, [7, 2]) == [7]


@kinds
def test_a_call_that_nobody_finishes_ends_with_the_next_step(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(3,), warm=(3,)) as it:
        it.rig.prefill(0, [2])
        stale = it.vram.fetch(0, [2, 3])
        assert [expert for expert, _ in next(stale).arrived] == [2]
        it.vram.next_step()
        assert it.letter(0, [2]) == it.mirror(0, [2]) != [-1]
        assert sorted(it.decode(1, [0, 1])) == [0, 1]
        stale.close()
        stream = it.vram.stream(0, list(range(12)))
        next(stream)
        it.vram.abandon()
        assert sorted(sum(it.prefill(2, list(range(12))), [])) == list(range(12))
        stream.close()


def test_a_fetch_given_up_while_it_waits_for_a_read_holds_nothing() -> None:
    with make_vram(layers=WIDE, vram=(3,), warm=(3,)) as it:
        it.rig.prefill(0, [2])
        hold_all(it.rig)
        assert it.decode(0, [2, 3], patience=1) == [2]
        it.vram.check_integrity()
        let_go(it.rig)
        it.rig.drain()
        assert it.decode(0, [2, 3]) == [3]
        assert len(it.rig.reader.calls) == 2, "the read went on and was kept"


@dataclass
class Failing(HostCopies):
    """A device that fails when it is told to."""

    fails: bool = False

    def to_device(self, pairs: Pairs) -> Copy:
        if self.fails:
            raise RuntimeError("the device failed")
        return super().to_device(pairs)

    def to_host(self, pairs: Pairs) -> Copy:
        return self.to_device(pairs)


def test_a_copy_that_cannot_be_enqueued_takes_no_slot() -> None:
    copies = Failing()
    with make_vram(copies, layers=WIDE, vram=(3,), warm=(3,)) as it:
        step(it, 0, 0, 1)
        copies.fails = True
        for call in (it.decode, it.prefill):
            with pytest.raises(RuntimeError, match="the device failed"):
                call(0, [2, 3])
        copies.fails = False
        it.check_idle()
        assert sorted(it.decode(0, [2, 3])) == [2, 3]


def test_a_demotion_that_cannot_be_enqueued_takes_no_slot() -> None:
    copies = Failing()
    with make_vram(copies, layers=WIDE, vram=(3,), warm=(6,)) as it:
        learn(it, 0, 0)
        step(it, 0, 1)
        it.rig.prefill(0, [2, 3, 4, 5, 6, 7])
        it.vram.check_integrity()
        it.rig.prefill(1, [0, 1, 2, 3, 4, 5])
        assert 0 not in it.warm(0)
        copies.fails = True
        with pytest.raises(RuntimeError, match="the device failed"):
            for _ in range(40):
                step(it, 0, 1)
        copies.fails = False
        it.unaccounted.clear()
        it.check_idle()
        assert it.here(0) == {0, 1}


# -- prefill -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("vram", "warm"), [(3, 3), (5, 8), (12, 4), (36, 36)])
def test_prefill_gives_each_expert_once(kind: str, vram: int, warm: int) -> None:
    with make_vram(kind, layers=WIDE, vram=(vram,), warm=(warm,)) as it:
        for _ in range(2):
            it.vram.next_step()
            for layer in range(3):
                groups = it.prefill(layer, list(range(12)))
                assert sorted(sum(groups, [])) == list(range(12))
        assert it.rig.counters.lookups == 2 * 36


def test_prefill_gives_what_is_here_first_and_then_groups() -> None:
    with make_vram(layers=[Experts(12, 6)], vram=(8,), warm=(12,), window=6) as it:
        step(it, 0, 4, 7)
        groups = it.prefill(0, list(range(12)), group=3)
        assert groups[0] == [4, 7] and [len(group) for group in groups[1:]] == [3, 3, 3, 1]


@kinds
def test_a_model_that_fits_is_all_there_after_the_first_prompt(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(36,), warm=(6,)) as it:
        for layer in range(3):
            it.prefill(layer, list(range(12)))
        assert [len(it.here(layer)) for layer in range(3)] == [12, 12, 12]
        assert it.rig.counters.promoted_bytes == 36 * PAGE
        for layer in range(3):
            assert it.prefill(layer, list(range(12))) == [list(range(12))]
            assert step(it, layer, 3, 4) == []


def test_every_layer_gets_its_share_of_an_empty_tier() -> None:
    with make_vram(layers=WIDE, vram=(18,), warm=(18,)) as it:
        for layer in range(3):
            it.prefill(layer, list(range(12)))
        assert [it.proven(layer) >= set(range(4)) for layer in range(3)] == [True] * 3
        assert sum(len(it.proven(layer)) for layer in range(3)) == 18 - 2


@kinds
def test_a_long_prompt_takes_nothing_that_decode_has_proven(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(8,), warm=(6,)) as it:
        learn(it, 0, 0, 1, 2, 3)
        learn(it, 1, 4, 5)
        before = [it.proven(layer) for layer in range(3)]
        assert sum(map(len, before)) == 8 - 2
        for _ in range(3):
            it.vram.next_step()
            for layer in range(3):
                it.prefill(layer, list(range(12)))
                it.vram.used(layer, [10, 11])
        assert [it.proven(layer) for layer in range(3)] == before


def test_a_group_is_copied_while_the_one_before_is_computed_and_no_earlier_slot_is_reused() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=[Experts(12, 4)], vram=(5,), warm=(12,), window=6) as it:
        it.rig.prefill(0, list(range(12)), 6)
        computed: list[list[int]] = []
        groups = it.vram.stream(0, list(range(12)))
        for number, arrived in enumerate(groups):
            while streams.up.try_one():
                pass
            assert len(arrived) == 2
            copied = it.rig.counters.promoted_bytes // PAGE
            assert copied == 2 * (number + 1), "one group ahead of the kernels"
            if number == 2:
                assert streams.compute.done == 0
                assert not streams.up.try_one(), "the third waits for the first one's kernels"
                break
            streams.ready()
            it.launch(0, arrived)
            computed.append([expert for expert, _ in arrived])
        groups.close()
        assert computed == [[0, 1], [2, 3]]


def test_what_was_here_is_not_overwritten_before_its_kernels_have_run() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=WIDE, vram=(3,), warm=(6,)) as it:
        step(it, 0, 0, 1)
        it.prefill(0, [0, 1, 2, 3, 4])
        while streams.up.try_one():
            pass
        it.check_seen()


# -- filling and shrinking -----------------------------------------------------------------------


@kinds
def test_warming_up_fills_vram_in_the_order_given(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(5,), warm=(4,)) as it:
        order = [ExpertKey(layer, expert) for expert in range(12) for layer in (2, 0)]
        it.vram.warm_up(order)
        assert it.here(2) == {0, 1, 2} and it.here(0) == {0, 1}
        assert it.rig.counters.lookups == 0
        it.vram.warm_up(order)
        assert it.rig.counters.promoted_bytes == 5 * PAGE


@kinds
def test_memory_is_given_back_in_chunks_and_decode_goes_on(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(8,), warm=(12,)) as it:
        learn(it, 0, *range(8))
        base = it.vram.base.data_ptr()
        assert it.vram.chunks.can_drop == 4 * PAGE
        assert it.vram.shrink(1) == 2 * PAGE
        assert it.vram.shrink(3 * PAGE) == 2 * PAGE, "two more would leave too few"
        assert it.vram.shrink(PAGE) == it.vram.chunks.can_drop == 0
        assert it.vram.nbytes == 4 * PAGE and it.vram.base.data_ptr() == base
        it.check_idle()
        assert len(it.here(0)) <= 4
        learn(it, 0, *range(8))
        assert it.vram.shrink(1 << 40) == 0


def test_nothing_is_given_back_that_the_device_may_be_reading() -> None:
    streams = FakeStreams()
    with make_vram(streams, layers=WIDE, vram=(8,), warm=(12,)) as it:
        learn(it, 0, *range(8))
        it.decode(0, [8, 9])
        before = {s: s.enqueued for s in (streams.up, streams.down, streams.compute)}
        assert it.vram.shrink(1) > 0
        assert all(stream.done >= place for stream, place in before.items())


def test_the_chunk_worth_least_goes() -> None:
    with make_vram(layers=WIDE, vram=(8,), warm=(12,)) as it:
        it.vram.warm_up([ExpertKey(0, expert) for expert in range(8)])
        slots = it.vram.slots.slot_of[:8].tolist()
        base = it.vram.base.data_ptr()
        in_base = [it.tier.memory(slot).data_ptr() - base in (0, PAGE) for slot in slots]
        others = [expert for expert in range(8) if not in_base[expert]]
        chunk_of = {expert: slots[expert] // 2 for expert in others}
        poor = [e for e in others if chunk_of[e] == chunk_of[others[-1]]]
        for _ in range(3):
            step(it, 0, *[e for e in range(8) if e not in poor][:2])
            step(it, 0, *[e for e in range(8) if e not in poor][2:4])
            step(it, 0, *[e for e in range(8) if e not in poor][4:6])
        it.vram.shrink(1)
        assert it.here(0) == set(range(8)) - set(poor)


@kinds
def test_memory_that_was_given_is_taken_again_and_used(kind: str) -> None:
    with make_vram(kind, layers=WIDE, vram=(8,), warm=(12,)) as it:
        learn(it, 0, *range(8))
        assert it.vram.shrink(1 << 40) == 4 * PAGE
        assert it.vram.grow(PAGE) == 0, "less than a chunk"
        assert it.vram.grow(3 * PAGE) == 2 * PAGE
        it.check_idle()
        assert it.vram.grow(1 << 40) == 2 * PAGE and it.vram.nbytes == 8 * PAGE
        it.check_idle()
        learn(it, 0, *range(8))
        assert it.here(0) >= set(range(7))
        assert it.vram.grow(1 << 40) == 0, "the budget is an upper bound"


class SinkingMemory(OrdinaryMemory):
    """Every allocation is below those before, until `refused`."""

    def __init__(self) -> None:
        self._whole = super().allocate(64 * PAGE)
        self._end, self.refused = len(self._whole), False

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self.refused:
            raise BudgetError("no more")
        self._end -= nbytes
        return self._whole[self._end : self._end + nbytes]


def test_memory_that_comes_below_the_base_changes_every_offset() -> None:
    with make_vram(layers=WIDE, vram=(8,), warm=(12,), memory=SinkingMemory()) as it:
        learn(it, 0, *range(8))
        it.vram.shrink(1)
        base = it.vram.base.data_ptr()
        before = dict(zip(range(8), it.mirror(0, range(8)), strict=True))
        assert it.vram.grow(2 * PAGE) == 2 * PAGE
        assert it.vram.base.data_ptr() == base - 2 * PAGE
        moved = [(before[e], now) for e, now in enumerate(it.mirror(0, range(8))) if now >= 0]
        assert moved and all(now == old + 2 * PAGE for old, now in moved)
        it.check_idle()
        learn(it, 0, *range(8))


def test_memory_that_is_refused_is_not_taken() -> None:
    memory = SinkingMemory()
    with make_vram(layers=WIDE, vram=(8,), warm=(12,), memory=memory) as it:
        learn(it, 0, *range(8))
        it.vram.shrink(1)
        memory.refused = True
        assert it.vram.grow(2 * PAGE) == 0
        it.check_idle()


def test_what_is_here_and_what_is_not_are_told_in_bytes_per_token() -> None:
    with make_vram(layers=WIDE, vram=(8,), warm=(12,)) as it:
        chunks = it.vram.chunks
        assert chunks.traffic == chunks.traffic_of_more(1 << 40) == 0.0
        for _ in range(400):
            step(it, 0, 0, 1)
        assert chunks.traffic == pytest.approx(2 * PAGE, rel=1e-2)
        assert chunks.traffic_of_more(1 << 40) == pytest.approx(0, abs=1)
        for expert in (0, 1):
            it.vram.slots.evict(it.vram.slots.slot_of[expert])
        it.vram.slots.table.flush()
        assert chunks.traffic_of_more(PAGE) == pytest.approx(PAGE, rel=1e-2)
        assert chunks.traffic_of_more(9 * PAGE) == pytest.approx(2 * PAGE, rel=1e-2)


# -- the policy ----------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=4))
def test_layers_that_found_everything_are_accounted_for_together(used: list[list[int]]) -> None:
    with make_vram(vram=(18,), warm=(4,)) as it:
        it.vram.warm_up([ExpertKey(layer, e) for layer in range(3) for e in range(6)])
        it.vram.next_step()
        first = it.rig.placement.first
        chosen = [np.array(experts) + first[n % 3] for n, experts in enumerate(used)]
        it.vram.served(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))
        wanted = {(n % 3, expert) for n, experts in enumerate(used) for expert in experts}
        assert it.rig.counters.hot == len(wanted)
        last = it.rig.placement.policy.worth(np.arange(18), it.rig.placement.step)
        assert {divmod(index, 6) for index in np.flatnonzero(last > 0).tolist()} == wanted
