"""Experts rise to the hot tier when they are worth it, and nothing is lost."""

import pytest
from tests.fakes import Experts
from tests.tiers.rig import learn, make_rig

pytestmark = pytest.mark.timeout(60)


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
