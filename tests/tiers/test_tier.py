"""The slots of a tier: taken, given, evictable, and always accounted for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.io.extent import PAGE
from tierrun.io.store import ExpertKey
from tierrun.io.tickets import Priority, Ticket
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import SlotState, Tier

SIZES = (PAGE, 2 * PAGE)


def make_tier(*extents: int) -> Tier:
    """A tier whose extents (of two pages) have the given record classes."""
    tier = Tier("warm", Slab(len(extents), 2 * PAGE), SIZES)
    for extent, record_class in enumerate(extents):
        tier.assign(extent, record_class)
    return tier


def fill(tier: Tier, owner: int, record_class: int = 0, *, proven: bool = True) -> int:
    slot = tier.take(record_class, owner, proven=proven)
    assert slot is not None
    tier.state[slot] = SlotState.READY
    return slot


def test_an_extent_holds_as_many_records_as_fit() -> None:
    tier = make_tier(0, 1, 0)
    assert (tier.num_slots, tier.num_slots_of(0), tier.num_slots_of(1)) == (5, 4, 1)
    assert [tier.memory(slot).numel() for slot in range(5)] == [
        SIZES[record_class] for record_class in tier.record_class
    ]


def test_no_two_slots_share_memory() -> None:
    tier = make_tier(0, 1, 0)
    for slot in range(tier.num_slots):
        tier.memory(slot).fill_(slot)
    assert [int(tier.memory(slot).unique()) for slot in range(5)] == [0, 1, 2, 3, 4]


def test_slots_are_taken_by_class_until_there_is_none() -> None:
    tier = make_tier(0, 1)
    taken = [tier.take(0, owner, proven=True) for owner in range(3)]
    assert None not in taken[:2] and taken[2] is None
    assert tier.num_free(0) == 0 and tier.num_free(1) == 1


def test_only_ready_unleased_slots_are_evictable() -> None:
    tier = make_tier(0, 0)
    ready, leased, unproven = fill(tier, 0), fill(tier, 1), fill(tier, 2, proven=False)
    filling = tier.take(0, 3, proven=True)
    tier.leases[leased] += 1
    assert set(tier.evictable(0)) == {ready, unproven}
    assert set(tier.evictable(0, unproven_only=True)) == {unproven}
    assert filling not in tier.evictable(0)
    assert len(tier.evictable(1)) == 0


def test_a_leased_slot_is_never_given() -> None:
    tier = make_tier(0)
    slot = fill(tier, 0)
    tier.leases[slot] += 1
    with pytest.raises(AssertionError, match="leased"):
        tier.give(slot)


def test_a_slot_is_given_once() -> None:
    tier = make_tier(0)
    slot = fill(tier, 0)
    tier.give(slot)
    with pytest.raises(AssertionError, match="free already"):
        tier.give(slot)


def test_an_extent_is_assigned_once() -> None:
    tier = make_tier(0)
    with pytest.raises(AssertionError, match="assigned already"):
        tier.assign(0, 1)


@given(st.lists(st.tuples(st.sampled_from(["take", "give"]), st.integers(0, 1)), max_size=40))
def test_free_and_held_slots_are_always_all_slots(operations: list[tuple[str, int]]) -> None:
    tier, held = make_tier(0, 1, 0, 1), list[int]()
    for owner, (operation, record_class) in enumerate(operations):
        if operation == "take" and tier.num_free(record_class):
            held.append(fill(tier, owner, record_class))
        elif operation == "give" and held:
            tier.give(held.pop(record_class - 1))
        assert tier.num_free(0) + tier.num_free(1) + len(held) == tier.num_slots
        tier.check_integrity()


def broken_filling_without_read(tier: Tier) -> None:
    tier.take(0, 5, proven=True)


def broken_two_slots_of_one_owner(tier: Tier) -> None:
    fill(tier, 7), fill(tier, 7)


def broken_lease_of_a_free_slot(tier: Tier) -> None:
    tier.leases[0] = 1


def broken_negative_lease(tier: Tier) -> None:
    tier.leases[fill(tier, 1)] = -1


def broken_lost_slot(tier: Tier) -> None:
    tier.state[0] = SlotState.READY


def broken_read_of_a_ready_slot(tier: Tier) -> None:
    slot = fill(tier, 1)
    tier.tickets[slot] = Ticket(ExpertKey(0, 1), memoryview(b""), Priority.DEMAND)


@pytest.mark.parametrize(
    "damage",
    [
        broken_filling_without_read,
        broken_two_slots_of_one_owner,
        broken_lease_of_a_free_slot,
        broken_negative_lease,
        broken_lost_slot,
        broken_read_of_a_ready_slot,
    ],
    ids=lambda function: function.__name__,
)
def test_check_integrity_finds_what_is_broken(damage: object) -> None:
    tier = make_tier(0, 0)
    tier.check_integrity()
    assert callable(damage)
    damage(tier)
    with pytest.raises(AssertionError):
        tier.check_integrity()
