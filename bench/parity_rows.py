"""One row of `tierrun.bench.gpu_parity`: a model in several engines, against fp32 on the CPU."""

import importlib
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tierrun
from tierrun.bench import devices
from tierrun.bench.checkpoint import Shape
from tierrun.bench.devices import Setting
from tierrun.bench.synthetic_store import build_store
from tierrun.engine.engine import Engine
from tierrun.engine.sampling import Sampling
from tierrun.io.errors import UsageError

COMPILED = ("qwen3_moe", "olmoe", "gpt_oss")
"""Families that run compiled too."""

PROMPT_TOKENS = 40
STEPS = 24

_CPU = Setting("cpu", vram="0", ram="1GiB")
_Result = TypeVar("_Result")

_QUANTISED = Shape(2, 16, 4, 256, 256, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
"""Large enough for groups of 256."""


class Case(NamedTuple):
    """A row to be: a family, or a codec in which a Qwen3-MoE is stored."""

    name: str
    codec: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name} {self.codec}" if self.codec else self.name


class Errors(NamedTuple):
    """Relative errors of the logits of the prompt and of the decode steps."""

    prefill: float
    decode: float

    def text(self) -> str:
        return f"{self.prefill:.1e} {self.decode:.1e}"


@dataclass(frozen=True, slots=True)
class Row:
    """What was found; `arms` are default, exact, eager and compiled, as far as they ran.

    `turned` counts the positions (of prompt and steps) at which some router chose otherwise than on
    the CPU: a tie that rounding decides. `steady` are the errors of the others, in the eager pass.
    `same_tokens` compares eager and recorded passes; `cpu_tokens` counts the greedy tokens that are
    the CPU's before the first that is not. After a row that is `poisoned` the process is useless.
    """

    case: Case
    arms: dict[str, Errors] = field(default_factory=dict)
    steady: Errors | None = None
    turned: int = 0
    same_tokens: bool | None = None
    cpu_tokens: int = 0
    captured: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    poisoned: bool = False

    def passed(self, tolerance: float) -> bool:
        worst = max(self.steady) if self.steady else float("inf")
        return not self.failures and bool(self.same_tokens) and worst <= tolerance


class Seen(NamedTuple):
    """What one engine gave: logits of prompt and decode steps, greedy tokens, graphs per token.

    `chosen` are the experts of every position before the greedy tokens, [positions, layers · k];
    of recorded passes it holds nothing, since their routers do not pass by here.
    """

    prefill: torch.Tensor
    decode: torch.Tensor
    greedy: list[int]
    captured: str
    chosen: torch.Tensor

    def errors(self, truth: "Seen") -> Errors:
        return Errors(
            relative_error(self.prefill, truth.prefill), relative_error(self.decode, truth.decode)
        )

    def same_choices(self, truth: "Seen") -> tuple[torch.Tensor, torch.Tensor]:
        """Whether all routers chose alike at each position of the prompt, and of the steps."""
        same = (self.chosen == truth.chosen).all(dim=1)
        return same[: len(self.prefill)], same[-len(self.decode) :]

    def steady(self, truth: "Seen") -> Errors:
        """The errors where all routers chose alike."""
        prompt, steps = self.same_choices(truth)
        return Errors(
            relative_error(self.prefill[prompt], truth.prefill[prompt]),
            relative_error(self.decode[steps], truth.decode[steps]),
        )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖; NaN becomes infinity."""
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return error if error == error else float("inf")


class _Recorder:
    """Takes fixed tokens and keeps the logits that it was shown."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self.logits = iter(tokens), list[torch.Tensor]()

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        self.logits.append(logits.detach().to("cpu", torch.float32).clone())
        return next(self._tokens)


def observe(store: Path, setting: Setting) -> Seen:
    """Run one engine over the prompt, the fixed steps and some greedy ones."""
    with _warnings() as warnings, setting.load(store) as engine:
        vocabulary = engine.model.config.get_text_config().vocab_size
        tokens = fixed_tokens(vocabulary, PROMPT_TOKENS + STEPS + 1)
        prompt, fixed = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]
        recorder = _Recorder(fixed)
        with _recorded_choices(engine) as choices:
            prefill = engine.logits(prompt)
            for _ in engine.session().generate(prompt, recorder, len(fixed)):
                pass
        chosen = _by_position(choices, len(engine.store.manifest.layers))
        greedy = engine.generate(prompt, STEPS, sampling=Sampling(temperature=0.0), ignore_eos=True)
        ids = [record.id for record in greedy]
        engine.check_integrity()
        captured = _captured(engine, setting, warnings)
    return Seen(prefill, torch.stack(recorder.logits), ids, captured, chosen)


@contextmanager
def _recorded_choices(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """The experts that every call of an experts layer is given meanwhile, sorted, [T, k] each."""
    name: str = engine.model.config._experts_implementation
    compute = ALL_EXPERTS_FUNCTIONS[name]
    choices: list[torch.Tensor] = []

    def record(module: Any, hidden: Any, top_k: torch.Tensor, weights: Any) -> Any:
        if not torch.compiler.is_compiling() and not _is_recording():
            choices.append(top_k.cpu().sort(dim=-1).values)
        return compute(module, hidden, top_k, weights)

    ALL_EXPERTS_FUNCTIONS.register(name, record)
    try:
        yield choices
    finally:
        ALL_EXPERTS_FUNCTIONS.register(name, compute)


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _by_position(choices: Sequence[torch.Tensor], num_layers: int) -> torch.Tensor:
    """`choices` of calls, layer after layer, as [positions, layers · k]."""
    layers = [torch.cat(tuple(choices[layer::num_layers])) for layer in range(num_layers)]
    return torch.cat(layers, dim=1)


def fixed_tokens(vocabulary: int, count: int) -> list[int]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(1)
    ids: list[int] = torch.randint(3, min(vocabulary, 250), (count,), generator=generator).tolist()
    return ids


def _captured(engine: Engine, setting: Setting, warnings: Sequence[str]) -> str:
    """How many graphs a token is, or why it is none."""
    if setting.device == "cpu" or not setting.graphs:
        return "not asked for"
    backend: Any = engine.backend  # the property is the GPU's
    try:
        segments = int(backend.num_segments)
    except AttributeError:
        return "unknown: the backend has no num_segments"
    said = [text for text in warnings if "graph" in text.lower()]
    return f"{segments} graphs" if segments else "; ".join(said) or "none"


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What tierrun warns of meanwhile."""
    collector, logger = _Collector(), logging.getLogger("tierrun")
    logger.addHandler(collector)
    try:
        yield collector.texts
    finally:
        logger.removeHandler(collector)


def run_case(case: Case, setting: Setting) -> Row:
    """The row of `case`; whatever fails is told in it."""
    trial = _Trial(case, setting.device)
    with tempfile.TemporaryDirectory(prefix="tierrun-parity-") as name:
        store = trial.attempt("store", lambda: make_store(case, Path(name)))
        if store is None:
            return Row(case, failures=trial.failures, poisoned=trial.poisoned)
        truth = trial.attempt("cpu", lambda: observe(store, _CPU))
        seen = {}
        for arm, ours in _arms(case, setting).items():
            made = trial.attempt(arm, partial(observe, store, ours))
            if made is not None:
                seen[arm] = made
    return _row(trial, truth, seen)


class _Trial:
    """Runs the parts of a row; those that fail are told, and none follows a broken device."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self._device = case, device
        self.failures: dict[str, str] = {}
        self.poisoned = False

    def attempt(self, name: str, work: Callable[[], _Result]) -> _Result | None:
        if self.poisoned:
            return None
        try:
            return work()
        except Exception as error:  # whatever it is, the other parts must run
            trace = traceback.format_exc(limit=-6)
            print(f"--- {self.case.title}, {name}\n{trace}", file=sys.stderr, flush=True)
            text = str(error).strip().splitlines() or [""]
            self.failures[name] = f"{type(error).__name__}: {text[0]}"
        self.poisoned = _poisoned(self._device)
        return None


def _row(trial: _Trial, truth: Seen | None, seen: dict[str, Seen]) -> Row:
    exact, eager = seen.get("exact"), seen.get("eager")
    steady = eager.steady(truth) if eager and truth else None
    same = eager.same_choices(truth) if eager and truth else ()
    agreed = 0
    if exact is not None and truth is not None:
        pairs = zip(exact.greedy, truth.greedy, strict=True)
        agreed = [*(ours == theirs for ours, theirs in pairs), False].index(False)
    return Row(
        trial.case,
        arms={} if truth is None else {name: arm.errors(truth) for name, arm in seen.items()},
        steady=steady,
        turned=sum(int((~part).sum()) for part in same),
        same_tokens=exact.greedy == eager.greedy if exact and eager else None,
        cpu_tokens=agreed,
        captured="" if exact is None else exact.captured,
        failures=trial.failures,
        poisoned=trial.poisoned,
    )


def _poisoned(device: str) -> bool:
    """Whether CUDA is beyond use in this process."""
    try:
        devices.synchronise(device)
    except RuntimeError:
        return True
    return False


def make_store(case: Case, directory: Path) -> Path:
    """The store of `case`, converted or written."""
    store = directory / "store"
    if case.codec is not None:
        build_store(store, _QUANTISED, case.codec, case.codec)
    else:
        tiny_models().save_runnable(case.name, directory / "checkpoint")
        tierrun.convert(directory / "checkpoint", store, dtype="bf16")
    return store


def tiny_models() -> Any:
    """The module `tests.engine.models`.

    Raises:
        UsageError: it is not to be found.
    """
    try:
        return importlib.import_module("tests.engine.models")
    except ModuleNotFoundError:
        raise UsageError("no `tests` here; run this from the repository's root") from None


def _arms(case: Case, setting: Setting) -> dict[str, Setting]:
    """`setting` in the ways that are compared."""
    arms = {
        "default": setting,
        "exact": replace(setting, exact=True, compile="off"),
        "eager": replace(setting, exact=True, compile="off", graphs=False),
    }
    if case in map(Case, COMPILED):
        arms["compiled"] = replace(setting, compile="on")
    return arms
