"""Prefill: each expert once, a few read ahead, and little of the cache spent."""

import numpy as np
import pytest
from tests.fakes import Experts, wait_until
from tests.tiers.rig import Rig, learn, make_rig

pytestmark = pytest.mark.timeout(60)


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
@pytest.mark.parametrize("policy", ["lru", "lfru", "rates"])
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
