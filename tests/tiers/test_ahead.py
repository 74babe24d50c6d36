"""Look-ahead reads: behind every demand, in nobody's way, and accounted for."""

import pytest
from tests.fakes import wait_until
from tests.tiers.rig import Rig, hold_all, let_go, make_rig

pytestmark = pytest.mark.timeout(60)


def ahead_counts(rig: Rig) -> dict[str, int]:
    names = ("issued", "useful", "late", "wasted", "dropped")
    return {name: getattr(rig.counters, f"ahead_{name}") for name in names}


def test_lookahead_that_was_there_in_time_is_useful() -> None:
    with make_rig(warm=(6,)) as rig:
        rig.decode(0, [0], ahead=[2, 3])
        rig.drain()
        rig.decode(1, [2, 3])
        wanted = {"issued": 2, "useful": 2, "late": 0, "wasted": 0, "dropped": 0}
        assert ahead_counts(rig) == wanted
        assert rig.counters.cold == 3, "its bytes came from the store for this use"
        rig.decode(1, [2, 3])
        assert (rig.counters.warm, ahead_counts(rig)) == (2, wanted), "counted once"


def test_lookahead_that_is_still_read_when_wanted_is_late() -> None:
    with make_rig(warm=(6,)) as rig:
        hold_all(rig)
        rig.residency.look_ahead(1, [2])
        with rig.residency.lease(1, [2]) as lease:
            let_go(rig)
            assert [held.expert for held in lease.arrivals()] == [2]
        assert ahead_counts(rig) == {
            "issued": 1, "useful": 0, "late": 1, "wasted": 0, "dropped": 0
        }  # fmt: skip
        assert len(rig.reader.calls) == 1, "the read is joined, not repeated"


def test_lookahead_that_was_read_and_not_wanted_is_wasted() -> None:
    with make_rig(warm=(6,)) as rig:
        rig.residency.look_ahead(1, [2, 3])
        rig.drain()
        rig.decode(1, [2])
        assert ahead_counts(rig) == {
            "issued": 2, "useful": 1, "late": 0, "wasted": 1, "dropped": 0
        }  # fmt: skip


def test_queued_lookahead_of_a_layer_that_has_passed_is_dropped() -> None:
    with make_rig(warm=(6,), depth=1) as rig:
        hold_all(rig)
        with rig.residency.lease(0, [0]):
            wait_until(lambda: len(rig.reader.calls) == 1)
            rig.residency.look_ahead(1, [2, 3])
            with rig.residency.lease(1, []):
                pass
        let_go(rig)
        rig.drain()
        assert ahead_counts(rig) == {
            "issued": 2, "useful": 0, "late": 0, "wasted": 0, "dropped": 2
        }  # fmt: skip
        assert len(rig.reader.calls) == 1, "they were never read"
        assert rig.placement.warm.num_free(0) == 5


def test_prefill_accounts_for_lookahead_too() -> None:
    with make_rig(warm=(6,)) as rig:
        rig.residency.look_ahead(1, [2, 3])
        rig.drain()
        rig.prefill(1, [0, 1, 2])
        assert ahead_counts(rig) == {
            "issued": 2, "useful": 1, "late": 0, "wasted": 1, "dropped": 0
        }  # fmt: skip
        before = rig.counters.cold
        rig.decode(1, [2])
        assert rig.counters.cold == before, "warm by now, however it once came"


def test_lookahead_reads_wait_behind_every_demand() -> None:
    with make_rig(warm=(6,), depth=1) as rig:
        hold_all(rig)
        with rig.residency.lease(0, [0, 1]) as lease:
            rig.residency.look_ahead(1, [4])
            with rig.residency.lease(2, [5]) as other:
                let_go(rig)
                list(other.arrivals())
            list(lease.arrivals())
        rig.drain()
    order = [(shard, offset) for shard, offset, _ in rig.reader.calls]
    assert order == [rig.place(*key) for key in ((0, 0), (0, 1), (2, 5), (1, 4))]


def test_lookahead_evicts_none_of_the_experts_it_expects() -> None:
    with make_rig(warm=(3,), policy="lru") as rig:
        rig.decode(1, [0, 1])
        rig.residency.next_step()
        rig.decode(0, [5])
        rig.residency.look_ahead(1, [0, 2, 1])
        rig.drain()
        assert rig.experts_in(rig.placement.warm, 1) == {0, 1, 2}


def test_lookahead_that_nobody_wanted_is_replaced_first() -> None:
    with make_rig(warm=(3,), policy="lru") as rig:
        rig.decode(0, [0, 1])
        rig.residency.next_step()
        rig.residency.look_ahead(1, [4])
        rig.drain()
        rig.residency.used(1, [4])  # recently used, by the policy, yet never looked up
        rig.decode(0, [2])
        assert rig.experts_in(rig.placement.warm, 0) == {0, 1, 2}
