"""`tierrun bench peers`: side by side with llama.cpp and accelerate, on the same synthetic weights.

The directory has the model in every form (`tierrun bench store --peers`). Every arm is a fresh
process, with `memory` in a memory cgroup of its own (page cache included), from a cold page cache;
arms take turns. accelerate runs with `device_map="auto"` and the budget as `max_memory`, and, as a
second arm, with a device map made by hand that leaves only the experts on disk; both with
`batched_mm` experts, the fastest of transformers' implementations here. Loading is not counted.

llama-bench feeds independent tokens, and nothing else can be fed to it: with it, every arm gets
such tokens. Without it all get the store's own stream.

(`python -m tierrun.bench.peers` is the same.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tierrun.bench.cells import Results
from tierrun.bench.devices import say
from tierrun.bench.peers_arms import Arm, arms_of
from tierrun.bench.peers_drive import bandwidth_of
from tierrun.bench.peers_found import Found, results_of
from tierrun.bench.peers_process import Killed
from tierrun.bench.peers_setting import Setting
from tierrun.bench.report import run_script
from tierrun.bench.rounds import ROWS, Round, spreads
from tierrun.bench.sheets import Sheet, sheet_of
from tierrun.io.errors import UsageError


class Outcome(NamedTuple):
    """The results, how to show them, and what ended the run early, if anything did."""

    results: Results
    sheets: list[Sheet]
    ended: BaseException | None


def run_peers(setting: Setting, rounds: int) -> Outcome:
    """`rounds` rounds of all arms, alternating. Who is told to end (Ctrl-C, SIGTERM) still gives
    what has been measured until then.

    Raises:
        TierrunError: an arm cannot be run, or fails otherwise than for want of memory.
    """
    arms, found = arms_of(setting), Found()
    try:
        _run_all(arms, setting, rounds, found)
    except (KeyboardInterrupt, SystemExit) as ended:
        if not found.samples:
            raise
        found.ended = ended
    if not found.samples:
        raise UsageError("; ".join(f"{name}: {why}" for name, why in found.killed.items()))
    results = results_of(found, setting, arms, rounds)
    return Outcome(results, [sheet_of(results), *_looks_into(found)], found.ended)


def _run_all(arms: Sequence[Arm], setting: Setting, rounds: int, found: Found) -> None:
    for number in range(rounds):
        for arm in arms:
            if arm.name not in found.killed:
                say(f"round {number + 1} of {rounds}: {arm.name}")
                _run(arm, setting, found)


def _run(arm: Arm, setting: Setting, found: Found) -> None:
    before = _drive(arm, setting)
    try:
        ran, output = arm.run(setting)
    except Killed as error:
        say(f"{arm.name}: {error}")
        found.killed[arm.name] = str(error)
        return
    for test, measured in ran.tests.items():
        say(f"{arm.name}, {test}: {measured.tokens_per_second:.2f} tok/s")
        found.samples.setdefault((arm.name, test), []).append(measured)
    found.others.setdefault(arm.name, []).append(output.others_cores)
    if ran.about:
        found.about[arm.name] = ran.about
    if ran.decode is not None and ran.decode.timings and setting.device == "cpu":
        bandwidths = before, _drive(arm, setting)
        done = Round(ran.decode, ran.peak_bytes if setting.memory else 0, bandwidths)
        found.ours.setdefault(arm.name, []).append(done)


def _drive(arm: Arm, setting: Setting) -> float:
    """What the drive gives; nobody asks beside an arm of others."""
    return bandwidth_of(setting.files.store) if arm.is_ours else 0.0


def _looks_into(found: Found) -> Iterator[Sheet]:
    """A column for each arm of ours: where its time goes, and the ledger's bounds."""
    if not found.ours:
        return
    arms = {name: spreads(done) for name, done in found.ours.items()}
    rows = tuple(
        (label, *(arm[figure].text(digits, scale) for arm in arms.values()))
        for label, figure, scale, digits in ROWS
        if any(arm[figure].largest for arm in arms.values())
    )
    yield Sheet("a token of tierrun: median (least–largest)", ("figure", *arms), rows)


def _main() -> None:
    """As a script it is the command."""
    from tierrun.tools.bench_models import bench_peers

    run_script(bench_peers)


if __name__ == "__main__":
    _main()
