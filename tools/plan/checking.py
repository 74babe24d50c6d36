"""Prediction beside fact: a plan with the last run's budgets, against what that run measured."""

from dataclasses import replace

from tierrun.io.errors import UsageError
from tierrun.tools.lastrun import LastRun, recall
from tierrun.tools.plan.decode import decode_times
from tierrun.tools.plan.document import Check, Compared, Plan
from tierrun.tools.plan.hits import Hits, Tiers
from tierrun.tools.plan.making import make_plan
from tierrun.tools.plan.request import Request
from tierrun.tools.plan.subject import find


def check_last_run(request: Request) -> Check:
    """Predict the last run of the store in `request`, and compare.

    Raises:
        UsageError: not a store, no record of a run, or a run on a device that is not here.
    """
    store = find(request.source, request.directories).store
    if store is None:
        raise UsageError(f"--check: {request.source} is not a store; it compares with a run of one")
    run = recall(store)
    wanted = replace(request, context=run.context, device=run.device, codec=None)
    plan, scene = make_plan(wanted, tiers=Tiers(run.hot_bytes, run.warm_bytes))
    lookups = max(1, run.hot + run.warm + run.cold)
    told = Hits(run.hot / lookups, run.warm / lookups, run.cold / lookups)
    times = decode_times(scene.shape, told, scene.rates, run.context)
    rows = compare(plan, run, 1 / times.total)
    return Check(when=run.when, tokens=run.tokens, rows=tuple(rows), plan=plan)


def compare(plan: Plan, run: LastRun, told: float) -> list[Compared]:
    """The figures that both have; `told`: tok/s as predicted from the run's own hit rates, which
    tells an error of the speed from one of the hit rates."""
    lookups = max(1, run.hot + run.warm + run.cold)
    hot, warm, cold = (tier.hit_rate for tier in plan.tiers)
    read = cold * plan.model.token_bytes
    return [
        _compared("decode, tok/s", plan.decode.tokens_per_second, run.tokens / run.seconds),
        _compared("with its hit rates, tok/s", told, run.tokens / run.seconds),
        _compared("hot, % of lookups", 100 * hot, 100 * run.hot / lookups),
        _compared("warm, % of lookups", 100 * warm, 100 * run.warm / lookups),
        _compared("drive, % of lookups", 100 * cold, 100 * run.cold / lookups),
        _compared("read a token, MB", read / 1e6, run.read_bytes / run.tokens / 1e6),
    ]


def _compared(name: str, predicted: float, measured: float) -> Compared:
    error = predicted / measured - 1 if measured else None
    return Compared(name=name, predicted=predicted, measured=measured, error=error)
