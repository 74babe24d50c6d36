"""A plan as people read it."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tierrun.io.extent import format_bytes
from tierrun.tools.plan.document import Advice, Check, Plan, Rate, Speed
from tierrun.tools.plan.rates import KINDS
from tierrun.tools.plan.times import LABELS


def render(plan: Plan) -> RenderableType:
    """The model, sizes by codec, tiers, speed, the machine, and what would help."""
    return Group(
        _model(plan),
        _codecs(plan),
        _tiers(plan),
        _speeds(plan),
        Text("\n".join(plan.notes)),
        _machine(plan),
        _advice(plan),
    )


def render_check(check: Check) -> RenderableType:
    """Prediction beside fact."""
    table = _table(
        f"last run ({check.when}, {check.tokens} tokens)", "predicted", "measured", "error"
    )
    for row in check.rows:
        error = "" if row.error is None else f"{row.error:+.0%}".replace("%", " %")
        table.add_row(row.name, f"{row.predicted:.3g}", f"{row.measured:.3g}", error)
    return Group(_model(check.plan), table)


def _model(plan: Plan) -> RenderableType:
    model = plan.model
    return Text(
        f"{model.name} ({model.kind}, {model.architecture}): {model.layers} layers × "
        f"{model.experts} experts of {model.codec}, top-{model.top_k}\n"
        f"resident {format_bytes(model.resident_bytes)} · KV {format_bytes(model.kv_bytes_per_1k)} "
        f"per 1k ({model.kv_source})\na token uses {format_bytes(model.token_bytes)} of experts · "
        f"the least --ram is {format_bytes(model.smallest_budget)}"
    )


def _codecs(plan: Plan) -> Table:
    table = _table("experts in", "experts", "store", "decode")
    for row in plan.codecs:
        mark = " ◂" if row.codec == plan.model.codec else ""
        sizes = format_bytes(row.expert_bytes), format_bytes(row.store_bytes)
        table.add_row(f"{row.codec}{mark}", *sizes, f"{row.tokens_per_second:.1f} tok/s")
    return table


def _tiers(plan: Plan) -> Table:
    table = _table("tier", "experts", "of all", "lookups")
    table.add_column(f"why (routing {plan.routing}: {plan.routing_source})")
    for tier in plan.tiers:
        table.add_row(
            tier.name,
            format_bytes(tier.nbytes),
            _percent(tier.share_of_experts),
            _percent(tier.hit_rate),
            Text(tier.reason),
        )
    return table


def _speeds(plan: Plan) -> Table:
    table = _table("speed", "tok/s", "limit")
    table.add_column("where the time goes")
    for name, speed in (
        (f"decode at {plan.context}", plan.decode),
        (f"prefill, {plan.prefill.tokens} at once", plan.prefill),
    ):
        table.add_row(name, f"{speed.tokens_per_second:.1f}", speed.limit, _shares(speed))
    return table


def _shares(speed: Speed) -> str:
    total = sum(speed.seconds.values())
    parts = sorted(speed.seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{LABELS[name]} {1000 * s:.1f} ms ({_percent(s / total)})" for name, s in parts
    )


def _machine(plan: Plan) -> Table:
    table = _table("machine", "")
    table.add_column("whence")
    for rate in plan.rates:
        table.add_row(rate.name, _amount(rate), Text(rate.source))
    return table


def _advice(plan: Plan) -> RenderableType:
    if not plan.advice:
        return Text("Nothing that could be bought gains 5 % here.")
    first, *others = plan.advice
    lines = [f"What helps most for its price: {_change(first)}"]
    lines += [f"  else: {_change(other)}" for other in others]
    return Text("\n".join(lines))


def _change(advice: Advice) -> str:
    return f"{advice.change} → {advice.tokens_per_second:.1f} tok/s (× {advice.factor:.2f})"


def _table(first: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _amount(rate: Rate) -> str:
    units = sorted(KINDS[rate.name].units.items(), key=lambda item: item[1])
    unit, factor = next(((u, f) for u, f in reversed(units) if rate.value >= f), units[0])
    return f"{rate.value / factor:.3g} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
