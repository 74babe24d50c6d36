"""Replayed routing, against hits counted by hand and against every policy."""

import json
from pathlib import Path

import numpy as np
import pytest

from tierrun.bench.policies import BELADY, Oracle, compare, replay
from tierrun.bench.policies import main as measure
from tierrun.tiers.policy import POLICIES, Lru, make_policy

STEPS = [[0, 1], [0, 2], [0, 1], [0, 3], [0, 1], [0, 2], [0, 1], [0, 3], [0, 1], [0, 2]]


def test_hits_are_those_of_the_policy() -> None:
    # A tenth of the tokens is not counted: of 18 lookups, 0 hits nine times, and of the others
    # each is evicted before it is wanted again.
    lru = Lru(4)
    assert replay(STEPS, 2, lru.worth, lru.used) == 9 / 18
    everything = make_policy("rates", 4)
    assert replay(STEPS, 4, everything.worth, everything.used) == 16 / 18


def test_the_oracle_evicts_what_is_wanted_last() -> None:
    lookups = [[expert] for step in STEPS for expert in step]
    oracle = Oracle(lookups, 4)
    oracle.used(np.array([0]), 0)
    assert oracle.worth(np.array([0, 1, 2, 3]), 0).argsort().tolist() == [3, 2, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_better_than_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    odds = random.dirichlet(np.full(32, 0.3))
    steps = [random.choice(32, 4, replace=False, p=odds / odds.sum()).tolist() for _ in range(60)]
    for row in compare(steps, 32, [0.2, 0.5]):
        assert set(row.hits) == {*POLICIES, BELADY} - {"layers"}
        assert max(row.hits.values()) == row.hits[BELADY]


def test_a_store_is_recorded_and_replayed(synthetic: Path, tmp_path: Path) -> None:
    out = tmp_path / "policies.json"
    measure(synthetic / "store", tokens=30, shares="0.25,1", out=out)
    found = json.loads(out.read_text())
    assert (found["benchmark"], found["tokens"], found["experts"]) == ("policies", 30, 32)
    small, whole = found["rows"]
    assert all(0 < hits < 1 for hits in small["hits"].values())
    assert all(small["hits"][name] <= hits for name, hits in whole["hits"].items())
