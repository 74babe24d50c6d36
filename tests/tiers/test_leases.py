"""Decode: experts leased, read where they are missing, and given back."""

import numpy as np
import pytest
from tests.fakes import FOREVER, wait_until
from tests.tiers.rig import hold_all, let_go, make_rig

from tierrun.io.errors import CorruptError, ReadError

pytestmark = pytest.mark.timeout(60)


def test_an_expert_is_cold_once_and_warm_from_then_on() -> None:
    with make_rig(warm=(4,)) as rig:
        rig.decode(0, [1, 2])
        rig.decode(0, [2, 3])
        counters = rig.counters
        assert (counters.cold, counters.warm, counters.hot) == (3, 1, 0)
        assert counters.read_bytes == 3 * 4096
        assert len(rig.reader.calls) == 3


def test_a_hot_tier_alone_serves_hot() -> None:
    with make_rig(hot=(4,)) as rig:
        rig.decode(0, [1, 2])
        rig.decode(0, [1, 2])
        assert (rig.counters.cold, rig.counters.warm, rig.counters.hot) == (2, 0, 2)


def test_all_misses_of_a_layer_are_demanded_at_once() -> None:
    with make_rig(warm=(4,)) as rig:
        hold_all(rig)
        with rig.residency.lease(0, [1, 2]) as lease:
            assert lease.ready == []
            wait_until(lambda: len(rig.reader.calls) == 2)
            let_go(rig)
            assert {held.expert for held in lease.arrivals()} == {1, 2}


def test_experts_that_are_there_do_not_wait_for_those_that_come() -> None:
    with make_rig(warm=(4,)) as rig:
        rig.decode(0, [1])
        hold_all(rig)
        with rig.residency.lease(0, [1, 2]) as lease:
            assert [held.expert for held in lease.ready] == [1]
            rig.check_held(0, lease.ready[0])
            let_go(rig)
            assert [held.expert for held in lease.arrivals()] == [2]


def test_arrivals_come_in_the_order_in_which_their_reads_end() -> None:
    with make_rig(warm=(4,)) as rig:
        slow = rig.place(0, 1)
        rig.reader.held = lambda shard, offset: (shard, offset) == slow
        with rig.residency.lease(0, [1, 2]) as lease:
            arrivals = lease.arrivals()
            assert next(arrivals).expert == 2
            let_go(rig)
            assert next(arrivals).expert == 1


def test_a_lease_of_a_full_tier_evicts_what_is_worth_least() -> None:
    with make_rig(warm=(3,), policy="lru") as rig:
        for experts in ([0], [1], [2], [0], [3]):
            rig.residency.next_step()
            rig.decode(0, experts)
        assert rig.experts_in(rig.placement.warm, 0) == {0, 2, 3}


def test_a_leased_slot_is_not_taken_by_whatever_is_read_meanwhile() -> None:
    with make_rig(warm=(3,)) as rig, rig.residency.lease(0, [0, 1]) as lease:
        list(lease.arrivals())
        for experts in ([0, 1], [2, 3], [4, 5]):
            rig.residency.look_ahead(1, experts)
            rig.drain()
        assert len(rig.experts_in(rig.placement.warm, 1)) == 1, "one slot was free"
        for held in lease.ready:
            rig.check_held(0, held)


def test_an_abandoned_lease_keeps_what_it_read() -> None:
    with make_rig(warm=(4,)) as rig:
        hold_all(rig)
        with rig.residency.lease(0, [1, 2]):
            pass
        rig.residency.check_integrity()
        let_go(rig)
        rig.drain()
        rig.check_idle()
        rig.decode(0, [1, 2])
        assert len(rig.reader.calls) == 2


def test_reads_of_an_abandoned_lease_give_way_to_a_demand() -> None:
    """All slots are still being filled for nobody; the next layer gets its experts."""
    with make_rig(warm=(3,), depth=1) as rig:
        rig.reader.delay = lambda shard, offset: 0.005
        with rig.residency.lease(0, [0, 1]):
            pass
        with rig.residency.lease(1, [0]):
            pass
        rig.decode(2, [4, 5])
        rig.drain()
        rig.check_idle()


def test_reads_of_an_abandoned_lease_give_way_to_prefill() -> None:
    with make_rig(warm=(3,), depth=1) as rig:
        rig.reader.delay = lambda shard, offset: 0.005
        with rig.residency.lease(0, [0, 1]):
            rig.residency.look_ahead(1, [5])
        assert rig.prefill(2, [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_making_way_leaves_alone_what_the_lease_itself_waits_for() -> None:
    """A read joined from look-ahead ends while its lease waits for a slot for another expert."""
    with make_rig(warm=(3,), depth=3) as rig:
        early = rig.place(1, 0)
        rig.reader.delay = lambda shard, offset: 0.01 if (shard, offset) == early else 0.04
        rig.residency.look_ahead(1, [0, 1, 2])
        wait_until(lambda: len(rig.reader.calls) == 3)
        rig.decode(1, [0, 5])
        rig.drain()
        rig.check_idle()


def test_prefill_makes_way_without_losing_what_it_wants_itself() -> None:
    with make_rig(warm=(3,), depth=3) as rig:
        rig.reader.delay = lambda shard, offset: 0.01
        rig.residency.look_ahead(1, [3, 4, 5])
        wait_until(lambda: len(rig.reader.calls) == 3)
        assert sorted(rig.prefill(1, [0, 4])) == [0, 4]


@pytest.mark.parametrize("wanted", [[4, 5], [5]], ids=["after a slot was taken", "before"])
def test_an_interrupt_while_waiting_for_a_slot_leaks_none(
    wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(tickets: object) -> None:
        raise KeyboardInterrupt

    with make_rig(warm=(3,), depth=3) as rig:
        hold_all(rig)
        rig.residency.look_ahead(1, [0, 1, 2][: 4 - len(wanted)])
        wait_until(lambda: len(rig.reader.calls) == 4 - len(wanted))
        with monkeypatch.context() as patch:
            patch.setattr(rig.placement, "wait_for_any", ctrl_c)
            with pytest.raises(KeyboardInterrupt):
                rig.residency.lease(2, wanted)
        rig.check_idle()
        let_go(rig)
        rig.drain()
        rig.decode(2, [4, 5])
        rig.check_idle()


def test_a_read_error_reaches_the_model_with_its_name_and_leaves_all_usable() -> None:
    with make_rig(warm=(3,)) as rig:
        rig.reader.failures[rig.place(1, 2)] = 2
        with pytest.raises(ReadError, match="layer 1, expert 2, errno 5"):
            rig.decode(1, [2, 3])
        rig.drain()
        rig.check_idle()
        rig.decode(1, [2, 3])


def test_a_corrupt_record_reaches_the_model_with_its_name() -> None:
    with make_rig(warm=(3,)) as rig:
        rig.reader.flips[rig.place(1, 2)] = FOREVER
        with pytest.raises(CorruptError, match="layer 1, expert 2"):
            rig.decode(1, [2, 3])
        with pytest.raises(CorruptError, match="layer 1, expert 2"):
            rig.prefill(1, [1, 2, 3])
        rig.drain()
        rig.check_idle()
        assert 2 not in rig.experts_in(rig.placement.warm, 1)


def test_a_failed_lookahead_is_read_again_on_demand() -> None:
    with make_rig(warm=(3,)) as rig:
        rig.reader.failures[rig.place(1, 2)] = 2
        rig.residency.look_ahead(1, [2])
        wait_until(lambda: all(t.ended for t in rig.placement.landing.tickets.values()))
        rig.decode(1, [2])


def test_what_was_used_without_a_lease_may_have_made_way_since() -> None:
    with make_rig(warm=(3,)) as rig:
        rig.residency.next_step()
        rig.decode(0, [0, 1])
        before = rig.counters.warm
        rig.decode(1, [0, 1])  # takes a slot of the others
        assert None in [rig.residency.placement.home(0, expert) for expert in (0, 1)]
        rig.residency.served(np.array([0, 1]))
        assert rig.counters.warm == before + 2
        rig.residency.check_integrity()
