"""What the tiers do with experts, one fact at a time."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.fakes import FOREVER, Experts
from tests.tiers.rig import Rig, make_rig

from tierrun.io.errors import CorruptError, ReadError

pytestmark = pytest.mark.timeout(60)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def hold_all(rig: Rig) -> None:
    rig.reader.held = lambda shard, offset: True


def let_go(rig: Rig) -> None:
    rig.reader.held = lambda shard, offset: False


def learn(rig: Rig, layer: int, experts: Sequence[int], times: int = 3) -> None:
    """Decode that uses `experts` again and again, two at a time."""
    for _ in range(times):
        rig.residency.next_step()
        for first in range(0, len(experts), 2):
            rig.decode(layer, experts[first : first + 2])


# -- leases -----------------------------------------------------------------------------------


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


# -- errors -----------------------------------------------------------------------------------


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


# -- promotion and demotion ---------------------------------------------------------------------


def test_used_experts_rise_and_leave_their_warm_slot() -> None:
    with make_rig(hot=(4,), warm=(3,)) as rig:
        rig.decode(0, [1, 2])
        assert rig.experts_in(rig.placement.hot, 0) == {1, 2}
        assert rig.experts_in(rig.placement.warm, 0) == set()
        rig.check_idle()
        rig.decode(0, [1, 2])
        assert rig.counters.hot == 2
        assert rig.counters.promoted_bytes == 2 * 4096


def test_what_a_promotion_displaces_is_found_in_the_warm_tier() -> None:
    with make_rig(hot=(1,), warm=(3,), policy="lru") as rig:
        rig.decode(0, [1])
        rig.residency.next_step()
        rig.decode(0, [2])
        assert rig.experts_in(rig.placement.hot, 0) == {2}
        assert rig.experts_in(rig.placement.warm, 0) == {1}
        rig.check_idle()
        rig.decode(0, [1])
        assert len(rig.reader.calls) == 2, "nothing is read again"
        assert rig.counters.demoted_bytes >= 4096


def test_only_what_is_worth_more_is_promoted_over_another() -> None:
    with make_rig(hot=(2,), warm=(3,)) as rig:
        learn(rig, 0, [0, 1], times=10)
        assert rig.experts_in(rig.placement.hot, 0) == {0, 1}
        rig.residency.next_step()
        rig.residency.used(0, [0, 1])
        rig.decode(0, [4, 5])
        assert rig.experts_in(rig.placement.hot, 0) == {0, 1}
        assert rig.counters.demoted_bytes == 0


def test_few_experts_are_copied_after_one_layer() -> None:
    with make_rig(hot=(6,), warm=(6,), layers=[Experts(6, 5), Experts(6, 5)]) as rig:
        rig.decode(0, [0, 1, 2, 3, 4])
        assert rig.counters.promoted_bytes == 2 * 4096


def test_classes_do_not_mix_slots() -> None:
    layers = [Experts(4, 2, pages=2), Experts(4, 2, pages=3)]
    with make_rig(hot=(1, 1), warm=(3, 3), layers=layers) as rig:
        for _ in range(3):
            rig.residency.next_step()
            for layer in (0, 1):
                rig.decode(layer, [0, 1])
                rig.decode(layer, [2, 3])
        rig.check_idle()
        for layer in (0, 1):
            assert len(rig.experts_in(rig.placement.hot, layer)) == 1


# -- look-ahead -------------------------------------------------------------------------------


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


# -- prefill ----------------------------------------------------------------------------------

WIDE = [Experts(12, 2), Experts(12, 2), Experts(12, 2)]


def test_prefill_gives_each_expert_once_those_that_are_there_first() -> None:
    with make_rig(warm=(6,)) as rig:
        rig.decode(0, [3, 1])
        assert rig.prefill(0, [5, 1, 0, 3, 2]) == [1, 3, 5, 0, 2]
        assert (rig.counters.warm, rig.counters.cold) == (2, 2 + 3)


def test_prefill_of_more_experts_than_slots_passes_through() -> None:
    with make_rig(warm=(3,), layers=WIDE) as rig:
        for layer in range(3):
            assert rig.prefill(layer, list(range(12))) == list(range(12))
        assert rig.counters.read_bytes == 36 * 4096
        rig.check_idle()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_prefill_reads_a_window_ahead_of_its_consumer_and_no_further(window: int) -> None:
    with make_rig(warm=(12,), layers=WIDE, depth=12) as rig:
        for number, held in enumerate(rig.residency.stream(0, range(12), window)):
            rig.check_held(0, held)
            assert len(rig.reader.calls) <= number + 1 + window
        assert len(rig.reader.calls) == 12


def test_prefill_reads_on_while_its_hits_are_computed() -> None:
    with make_rig(warm=(6,)) as rig:
        rig.decode(0, [0])
        stream = rig.residency.stream(0, [0, 1, 2], 2)
        assert next(stream).expert == 0
        wait_until(lambda: len(rig.reader.calls) == 3)
        assert [held.expert for held in stream] == [1, 2]


def learnt(rig: Rig) -> set[tuple[int, int]]:
    return {
        (layer, expert)
        for layer in range(3)
        for expert in rig.experts_in(rig.placement.warm, layer)
    }


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("layers", [(0, 1, 2), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize("policy", ["lru", "lfru"])
def test_prefill_takes_at_most_its_window_from_what_decode_has_learnt(
    window: int, layers: tuple[int, ...], policy: str
) -> None:
    """However the learnt experts lie, and however many prompts follow."""
    with make_rig(warm=(12,), layers=WIDE, depth=4, policy=policy) as rig:
        each = 12 // len(layers)
        for layer in layers:
            learn(rig, layer, list(range(each)))
        before = learnt(rig)
        assert len(before) == 12
        for _ in range(3):
            rig.residency.next_step()
            for layer in range(3):
                rig.prefill(layer, list(range(12)), window)
                rig.residency.used(layer, [10, 11])
        assert len(before - learnt(rig)) <= window


def test_prefill_leaves_every_layer_its_share_of_an_empty_cache() -> None:
    with make_rig(warm=(12,), layers=WIDE) as rig:
        for layer in range(3):
            rig.prefill(layer, list(range(12)), window=2)
        proven = rig.placement.warm.owner[rig.placement.warm.proven]
        counts = np.bincount(proven // 12, minlength=3)
        assert counts.min() >= 4 - 2, "of twelve slots, a third each, less a window to pass through"
        assert rig.placement.warm.num_free(0) == 0


# -- the cache works ---------------------------------------------------------------------------


def skewed_stream(tokens: int) -> list[tuple[int, list[int]]]:
    """Layers and pairs of experts, a few of them wanted most of the time."""
    generator = np.random.default_rng(7)
    share = 1 / np.arange(1, 13) ** 1.2
    return [
        (layer, generator.choice(12, 2, replace=False, p=share / share.sum()).tolist())
        for _ in range(tokens)
        for layer in range(3)
    ]


def hit_rate(rig: Rig) -> float:
    for layer, experts in skewed_stream(60):
        if layer == 0:
            rig.residency.next_step()
        rig.decode(layer, experts)
    return (rig.counters.hot + rig.counters.warm) / rig.counters.lookups


@pytest.mark.parametrize("policy", ["lru", "lfru"])
@pytest.mark.parametrize("tiers", ["warm", "hot", "both"])
def test_the_cache_is_never_inert_and_grows_with_its_budget(policy: str, tiers: str) -> None:
    rates = []
    for slots in (3, 8, 16, 36):
        hot = {"warm": 0, "hot": slots, "both": slots // 2}[tiers]
        warm = {"warm": slots, "hot": 0, "both": max(3, slots - slots // 2)}[tiers]
        with make_rig(hot=(hot,), warm=(warm,), layers=WIDE, policy=policy) as rig:
            rates.append(hit_rate(rig))
    assert rates[0] > 0
    assert rates == sorted(set(rates)), "more slots, more hits"
    assert rates[-1] > 0.85, "with room for all, an expert is read once"


def test_frequency_beats_recency_where_a_few_are_wanted_often() -> None:
    rates = {}
    for policy in ("lru", "lfru"):
        with make_rig(warm=(9,), layers=WIDE, policy=policy) as rig:
            rates[policy] = hit_rate(rig)
    assert rates["lfru"] > rates["lru"]
