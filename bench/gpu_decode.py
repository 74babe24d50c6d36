"""How fast a store decodes and prefills on the GPU, from which tiers, and how near the bound.

    python -m tierrun.bench.gpu_decode STORE --vram 20%experts --json FILE

One fixed stream of tokens: the first 200 after a prompt are what the cache learns from; then come
rounds that each continue the stream, with a prompt of what precedes them. The bound is the time in
which the device's memory, at its measured bandwidth, gives the weights that one token reads. Then
prompts: each in a session of its own, once to warm up and once measured.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Bandwidths, Setting, bytes_per_token, say, synchronise, total
from tierrun.bench.report import document, emit, open_console, run_script, spread
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.engine.sampling import Sampling
from tierrun.engine.tokens import TokenRecord
from tierrun.io.errors import TierrunError, UsageError
from tierrun.tiers.ledger import Counters

WINDOW = 50
"""Tokens over which hit shares are told while the cache learns."""

GREEDY_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How many tokens: learnt from, then per round unmeasured and measured, and of prompts."""

    prompt: int = 1024
    learn: int = 200
    rounds: int = 3
    warmup: int = 16
    tokens: int = 128
    prefill: int = 2048

    @property
    def stream(self) -> int:
        """Tokens of the stream that all this takes."""
        decoded = self.learn + self.rounds * (self.warmup + self.tokens) + 2
        return max(self.prompt + decoded, self.prefill)

    @property
    def context(self) -> int:
        """The longest context."""
        decoded = max(self.learn, self.warmup + self.tokens)
        return max(self.prompt + decoded + 2, self.prefill, GREEDY_PROMPT + self.tokens)


@dataclass(frozen=True, slots=True)
class Round:
    """Some decoded tokens: seconds of them all, and what each cost.

    `resident` are the seconds that the ledger counts as anything but serving misses.
    """

    seconds: float
    steps: list[float]
    counters: Counters
    resident: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.steps) / self.seconds

    def per_token(self, name: str) -> float:
        """A counter's share of one token."""
        return float(getattr(self.counters, name)) / len(self.steps)

    def share(self, tier: str) -> float:
        """Of the lookups, those that `tier` served."""
        return float(getattr(self.counters, tier)) / max(1, self.counters.lookups)


class Runner:
    """Runs one engine over the stream, as `plan` says."""

    def __init__(self, engine: Engine, device: str, plan: Plan) -> None:
        self._engine, self._device, self._plan = engine, device, plan
        vocabulary = engine.model.config.get_text_config().vocab_size
        self._stream = token_stream(plan.stream, vocabulary)
        self._position = plan.prompt

    def learn(self) -> list[float]:
        """Decode the first tokens; the share of lookups that VRAM served, per 50 of them."""
        records = self._continue(self._plan.learn)
        counters = [record.figures.counters for record in records][1:]
        windows = [counters[i : i + WINDOW] for i in range(0, len(counters), WINDOW)]
        shares = [_hot_share(window) for window in windows]
        say("lookups served by VRAM, per 50 tokens: " + ", ".join(f"{s:.1%}" for s in shares))
        return shares

    def round(self) -> Round:
        """Decode the next tokens of the stream, the first few unmeasured."""
        records = self._continue(self._plan.warmup + self._plan.tokens)
        for _ in range(1 + self._plan.warmup):  # the first record is the prompt's
            next(records)
        synchronise(self._device)
        started, ledger = time.perf_counter(), self._engine.ledger
        step = self._engine.residency.placement.step
        measured = list(records)
        synchronise(self._device)
        seconds = time.perf_counter() - started
        steps = [record.figures.seconds for record in measured]
        counters = total(record.figures.counters for record in measured)
        resident = sum(timing.resident for timing in ledger.timings if timing.step > step)
        done = Round(seconds, steps, counters, resident)
        say(f"decode: {done.tokens_per_second:.2f} tok/s, {done.share('hot'):.1%} from VRAM")
        return done

    def prefill(self) -> float:
        """Tokens per second of the second prompt of a fresh session."""
        session, prompt = self._engine.session(), self._stream[: self._plan.prefill]
        session.prefill(prompt)
        session.reset()
        synchronise(self._device)
        started = time.perf_counter()
        session.prefill(prompt)
        synchronise(self._device)
        speed = len(prompt) / (time.perf_counter() - started)
        say(f"prefill of {len(prompt)} tokens: {speed:.0f} tok/s")
        return speed

    def greedy(self) -> list[int]:
        """What the model itself says after the beginning of the stream."""
        records = self._engine.generate(
            self._stream[:GREEDY_PROMPT],
            self._plan.tokens,
            sampling=Sampling(temperature=0.0),
            ignore_eos=True,
        )
        return [record.id for record in records]

    def _continue(self, count: int) -> Iterator[TokenRecord]:
        """A record for the prompt and one for each of the `count` next tokens of the stream."""
        here = self._position
        self._position += count
        prompt = self._stream[here - self._plan.prompt : here]
        fixed = self._stream[here : here + count + 1]
        return self._engine.generate(prompt, len(fixed), fixed=fixed, ignore_eos=True)


def _hot_share(counters: Sequence[Counters]) -> float:
    summed = total(counters)
    return summed.hot / max(1, summed.lookups)


@dataclass(frozen=True, slots=True)
class Bound:
    """What one token cannot do without: bytes of weights, and the bandwidths that give them."""

    weight_bytes: int
    bandwidths: Bandwidths

    @property
    def seconds(self) -> float:
        return self.weight_bytes / self.bandwidths.memory

    def share(self, done: Round) -> float:
        """Of the time of a token, what reading its weights would take."""
        return self.seconds * done.tokens_per_second

    def upload_share(self, done: Round) -> float:
        """Of the time of a token, what moving its experts to the device would take."""
        moved = done.per_token("promoted_bytes") + done.per_token("zero_copy_bytes")
        return moved / self.bandwidths.upload * done.tokens_per_second


_COUNTS = (
    ("lookups per token: VRAM", "hot", 1.0, 1),
    ("lookups per token: RAM", "warm", 1.0, 1),
    ("lookups per token: store", "cold", 1.0, 1),
    ("to the device per token, MB", "promoted_bytes", 1e-6, 2),
    ("read in RAM by the GPU per token, MB", "zero_copy_bytes", 1e-6, 2),
    ("computed in RAM by the CPU per token, MB", "computed_bytes", 1e-6, 2),
    ("from the device per token, MB", "demoted_bytes", 1e-6, 2),
    ("read from the store per token, MB", "read_bytes", 1e-6, 2),
    ("waiting per token, ms", "wait_seconds", 1e3, 3),
)
"""Label, counter, scale and digits."""


def decode_table(rounds: Sequence[Round], bound: Bound, title: str) -> Table:
    """Medians over `rounds`, with the least and the largest."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("median (least–largest)", justify="right")

    def add(label: str, values: Sequence[float], digits: int, scale: float = 1.0) -> None:
        table.add_row(label, spread(values).text(digits, scale))

    add("decode, tokens per second", [r.tokens_per_second for r in rounds], 2)
    add("slowest token, ms", [max(r.steps) for r in rounds], 2, 1e3)
    for tier, where in (("hot", "VRAM"), ("warm", "RAM"), ("cold", "the store")):
        add(f"lookups from {where}, %", [r.share(tier) for r in rounds], 1, 100)
    for label, counter, scale, digits in _COUNTS:
        add(label, [r.per_token(counter) for r in rounds], digits, scale)
    add("bound, tokens per second", [1 / bound.seconds], 1)
    add("share of the bound, %", [bound.share(r) for r in rounds], 1, 100)
    add("time that moving experts would take, %", [bound.upload_share(r) for r in rounds], 1, 100)
    return table


def figures(rounds: Sequence[Round], bound: Bound) -> dict[str, Any]:
    """The same for the JSON document."""
    return {
        "tokens_per_second": spread([r.tokens_per_second for r in rounds])._asdict(),
        "rounds": [asdict(r) for r in rounds],
        "hot_share": spread([r.share("hot") for r in rounds])._asdict(),
        "weight_bytes_per_token": bound.weight_bytes,
        "memory_bandwidth": bound.bandwidths.memory,
        "upload_bandwidth": bound.bandwidths.upload,
        "bound_tokens_per_second": 1 / bound.seconds,
        "share_of_bound": spread([bound.share(r) for r in rounds])._asdict(),
    }


class Run(NamedTuple):
    """What the document says, and the greedy tokens where they were asked for."""

    figures: dict[str, Any]
    greedy: list[int]


def measure(
    store: Path,
    setting: Setting,
    plan: Plan,
    bandwidths: Bandwidths,
    *,
    fill: bool,
    greedy: bool,
    check: bool,
) -> Run:
    """Load, learn, decode, prefill; prints the table."""
    started = time.perf_counter()
    with setting.load(store) as engine:
        loading = {"load_seconds": time.perf_counter() - started}
        say(f"loaded in {loading['load_seconds']:.1f} s")
        if fill:
            loading["fill_seconds"] = devices.fill(engine, setting.device)
            say(f"filled in {loading['fill_seconds']:.1f} s")
        if check:
            devices.check_bytes(engine, setting.device)
        runner = Runner(engine, setting.device, plan)
        shares = runner.learn()
        rounds = [runner.round() for _ in range(plan.rounds)]
        if check:
            devices.check_bytes(engine, setting.device)
        prefills = [runner.prefill() for _ in range(plan.rounds)] if plan.prefill else []
        ids = runner.greedy() if greedy else []
        stats, memory = asdict(engine.stats()), devices.memory_figures(setting.device)
        bound = Bound(bytes_per_token(engine.store.manifest), bandwidths)
    table = decode_table(rounds, bound, f"{store.name}, {setting.device}")
    table.add_row(f"lookups from VRAM, last {WINDOW} learnt, %", f"{100 * shares[-1]:.1f}")
    if prefills:
        table.add_row(f"prefill of {plan.prefill}, tok/s", spread(prefills).text(0))
    open_console().print(table)
    found = {"setting": asdict(setting), "plan": asdict(plan), **loading, **figures(rounds, bound)}
    found |= {"learning_hot_shares": shares, "prefill_tokens_per_second": prefills}
    return Run(found | {"stats": stats, "memory": memory}, ids)


def compare_tokens(ids: Sequence[int], out: Path | None, expected: Path | None) -> None:
    """Write `ids` to `out`, and see that they are those of `expected`.

    Raises:
        TierrunError: they are not.
    """
    if out is not None:
        out.write_text(json.dumps(list(ids)) + "\n")
    if expected is None:
        return
    wanted = json.loads(expected.read_text())
    pairs = enumerate(zip(ids, wanted, strict=False))
    first = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if first is not None or len(ids) != len(wanted):
        where = min(len(ids), len(wanted)) if first is None else first
        raise TierrunError(f"greedy tokens differ from {expected} at number {where}")
    say(f"{len(ids)} greedy tokens are those of {expected}")


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "auto",
    ram: devices.RamBudget = "auto",
    compile_: devices.Compile = "auto",
    graphs: devices.Graphs = True,
    exact: devices.Exact = False,
    context: devices.ContextSize = 0,
    ubatch: devices.Ubatch = 0,
    io: devices.Io = "auto",
    threads: devices.Threads = 0,
    lanes: devices.LaneMode = "auto",
    policy: devices.Policy = "rates",
    tokens: Annotated[int, typer.Option(min=1, help="Measured per round.")] = 128,
    warmup: Annotated[int, typer.Option(help="Before them, unmeasured.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Of decoding, and of prefill.")] = 3,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in context when decoding.")] = 1024,
    learn: Annotated[int, typer.Option(min=1, help="Tokens decoded before the rounds.")] = 200,
    prefill: Annotated[int, typer.Option(help="Tokens of the measured prompt; 0: none.")] = 2048,
    fill: Annotated[bool, typer.Option(help="Load VRAM before the first token.")] = True,
    tokens_out: Annotated[Path | None, typer.Option(help="Gets greedy tokens.")] = None,
    tokens_expected: Annotated[Path | None, typer.Option(help="Has them to be the same.")] = None,
    check: Annotated[bool, typer.Option(help="Compare VRAM with the store, twice.")] = False,
    json_file: devices.JsonFile = None,
) -> None:
    """Measure decoding and prefill on the GPU, against the bound."""
    devices.check_device(device)
    compared = tokens_out is not None or tokens_expected is not None
    if compared and device != "cpu" and not exact:
        raise UsageError("tokens are the same for any budget with --exact only")
    plan = Plan(prompt, learn, rounds, warmup, tokens, prefill)
    setting = Setting(
        device,
        vram,
        ram,
        compile_,
        graphs,
        exact,
        context or plan.context,
        ubatch,
        io,
        threads,
        lanes,
        policy,
    )
    bandwidths = devices.measure_bandwidths(device)
    say(f"memory {bandwidths.memory / 1e9:.0f} GB/s, upload {bandwidths.upload / 1e9:.1f} GB/s")
    run = measure(store, setting, plan, bandwidths, fill=fill, greedy=compared, check=check)
    emit(document("gpu_decode", run.figures), json_file)
    compare_tokens(run.greedy, tokens_out, tokens_expected)


if __name__ == "__main__":
    run_script(main)
