"""The engine: a store, its tiers and its model, put together and taken apart again."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tierrun.engine.experts import ExpertsHook
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.lookahead import Lookahead
from tierrun.engine.model import load_model
from tierrun.engine.resident import ResidentWeights
from tierrun.engine.sampling import Sampler, Sampling, sampling_from
from tierrun.engine.session import Session, StepFigures
from tierrun.engine.text import TextStream, encode, load_tokenizer
from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.reader import choose_reader, open_reader
from tierrun.io.reads import DEFAULT_DEPTH, PART_BYTES, ReadQueue
from tierrun.io.store import Manifest, Store
from tierrun.tiers.budget import Budget, plan_tier, resolve_ram, resolve_vram
from tierrun.tiers.ledger import Counters, Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.policy import make_policy
from tierrun.tiers.residency import Residency
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import Tier
from tierrun.tiers.usage import UsageFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine is set up; the command line's flags have the same names and defaults.

    `context` 0 means the model's own maximum; `threads` 0 what torch chooses; `depth` reads in
    flight per directory, in parts.
    """

    device: str = "cpu"
    vram: str = "auto"
    ram: str = "auto"
    io: str = "auto"
    policy: str = "lfru"
    lookahead: bool = True
    context: int = 0
    ubatch: int = 512
    threads: int = 0
    depth: int = DEFAULT_DEPTH
    strict: bool = False

    def __post_init__(self) -> None:
        if self.device != "cpu":
            raise UsageError(f"--device {self.device}: only cpu is supported in this version")
        for name, value, least in (
            ("-c/--ctx-size", self.context, 0),
            ("-ub/--ubatch-size", self.ubatch, 1),
            ("-t/--threads", self.threads, 0),
            ("--depth", self.depth, 1),
        ):
            if value < least:
                raise UsageError(f"{name} {value}: must be at least {least}")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One generated token: its id, the text it completed (often all of it, sometimes none) and
    what it cost. `finish` says why generation ended, on the last record only."""

    id: int
    text: str
    figures: StepFigures
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals of an engine: the ledger's counters, tier sizes in bytes, and the read queue's."""

    counters: Counters
    hot_bytes: int
    warm_bytes: int
    resident_bytes: int
    reader: str
    mean_depth: float


class Engine:
    """Runs the model of one store. A context manager; `close` frees everything.

    One thread may use it at a time.
    """

    def __init__(self, store: Store, options: Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.store, self.options = store, options
        self.ledger = Ledger()
        self._weights = ResidentWeights(store)
        vram = resolve_vram(options.vram, options.device)
        ram = resolve_ram(options.ram, self._weights.nbytes)
        hot, warm = make_tiers(store.manifest, vram, ram)
        self._hot, self._warm = hot, warm
        paths = store.shard_paths
        choice = choose_reader(options.io, paths, options.strict)
        log.log(
            logging.WARNING if choice.fallback else logging.INFO,
            "reads: %s (%s)", choice.name, choice.reason,
        )  # fmt: skip
        self._weights.verify()
        kernels = CpuKernels()
        self.model = load_model(store, self._weights, kernels)
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(store.model_dir)
        self.context = _context(self.model.config.get_text_config(), options.context)
        self.queue = ReadQueue(store, open_reader(choice.name, paths, options.depth), options.depth)
        policy = make_policy(options.policy, store.manifest.num_experts)
        placement = Placement(store.manifest, hot, warm, policy, self.queue, self.ledger)
        self.residency = Residency(placement)
        self.hook = ExpertsHook(
            self.model,
            store.manifest,
            self.residency,
            kernels,
            self.ledger,
            Lookahead(self.model) if options.lookahead else None,
            _prefill_window(store.manifest, placement.landing, options.depth),
        )
        self.reader = choice.name
        self._usage = UsageFile(store.roots[0], store.manifest)
        self._closed = False

    def session(self) -> Session:
        """An empty context."""
        return Session(self.model, self.hook, self.ledger, self.context, self.options.ubatch)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `token_ids` in a context of their own, fp32 [T, vocab]."""
        return self.session().logits(token_ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        fixed: Sequence[int] = (),
        session: Session | None = None,
    ) -> Iterator[TokenRecord]:
        """Continue `prompt` (raw text, or token ids), one record per token.

        Args:
            prompt: text needs the store to have a tokenizer; ids do not.
            max_new_tokens: upper bound; the context's end is another.
            sampling: default: the model's generation_config.
            stop: strings that end the answer; they are not part of it.
            ignore_eos: go on past end-of-sequence tokens.
            fixed: token ids taken instead of sampled ones (benchmarks).
            session: a context to continue; its tokens are reused where the prompt begins with them.

        Raises:
            UsageError: no tokenizer for a text prompt, or a prompt longer than the context.
            ReadError, CorruptError: the store could not be read.
        """
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        session = session or self.session()
        sampler = Sampler(sampling or self.default_sampling())
        text = TextStream(self.tokenizer, stop) if self.tokenizer else None
        ends = frozenset() if ignore_eos else self.eos_tokens()
        count = min(max_new_tokens, len(fixed)) if fixed else max_new_tokens
        steps = session.generate(session.extend_to(ids), sampler, count, fixed)
        yield from _records(steps, text, ends)

    def default_sampling(self, **given: Any) -> Sampling:
        """The model's own generation_config, overridden by what is `given` (None: not given)."""
        return sampling_from(self._generation_config(), **given)

    def eos_tokens(self) -> frozenset[int]:
        """The tokens that end an answer, from the generation config, config and tokenizer."""
        for source in (
            self._generation_config().get("eos_token_id"),
            getattr(self.model.config.get_text_config(), "eos_token_id", None),
            self.tokenizer.eos_token_id if self.tokenizer else None,
        ):
            if source is not None:
                return frozenset(source if isinstance(source, list) else [source])
        return frozenset()

    def _generation_config(self) -> dict[str, Any]:
        path = self.store.model_dir / "generation_config.json"
        document = json.loads(path.read_text()) if path.is_file() else {}
        return document if isinstance(document, dict) else {}

    def stats(self) -> EngineStats:
        """Totals since loading."""
        return EngineStats(
            counters=self.ledger.snapshot(),
            hot_bytes=self._hot.slab.nbytes,
            warm_bytes=self._warm.slab.nbytes,
            resident_bytes=self._weights.nbytes,
            reader=self.reader,
            mean_depth=self.queue.figures().mean_depth,
        )

    def save_usage(self) -> None:
        """Add what was used since the last time to the store's usage file."""
        counts = [row.numpy().copy() for row in self.hook.usage]
        if any(row.any() for row in counts):
            self._usage.add(counts)
        for row in self.hook.usage:
            row.zero_()

    def close(self) -> None:
        """End every read, save the usage, let go of all memory."""
        if self._closed:
            return
        self._closed = True
        self.queue.close()
        self.save_usage()
        del self.model, self.hook, self.residency, self._hot, self._warm, self._weights

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load(nvme_dir: str | Path | Sequence[str | Path], **options: Any) -> Engine:
    """Open the store in `nvme_dir` (several directories: the first holds the manifest).

    Args:
        options: the fields of `Options`: `device`, `vram`, `ram`, `io`, `policy`, `lookahead`, …

    Raises:
        StoreError: not a store, or damaged.
        UsageError: an option out of range; BudgetError among them says the smallest that works.
        ModelError: transformers cannot build the architecture.
    """
    directories = [nvme_dir] if isinstance(nvme_dir, str | Path) else list(nvme_dir)
    return Engine(Store.open(directories), Options(**options))


def make_tiers(manifest: Manifest, vram: Budget, ram: Budget) -> tuple[Tier, Tier]:
    """The hot and the warm tier within their budgets; says what each took and why.

    Raises:
        BudgetError: the tier that reads land in is too small.
    """
    landing_is_hot = ram.nbytes == 0 and vram.nbytes > 0
    return (
        _make_tier("hot", "--vram", manifest, vram, landing=landing_is_hot),
        _make_tier("warm", "--ram", manifest, ram, landing=not landing_is_hot),
    )


def _make_tier(name: str, flag: str, manifest: Manifest, budget: Budget, *, landing: bool) -> Tier:
    try:
        plan = plan_tier(budget.nbytes, manifest, landing=landing)
    except BudgetError as error:
        raise BudgetError(f"{flag}: {error}") from None
    slab = Slab(len(plan.extent_classes), plan.extent_bytes)
    tier = Tier(name, slab, tuple(c.nbytes for c in manifest.classes))
    for extent, record_class in enumerate(plan.extent_classes):
        tier.assign(extent, record_class)
    log.info(
        "%s tier: %s for %d of %d experts (%s)",
        name, format_bytes(slab.nbytes), tier.num_slots, manifest.num_experts, budget.reason,
    )  # fmt: skip
    return tier


def _prefill_window(manifest: Manifest, landing: Tier, depth: int) -> int:
    """Reads ahead of the compute in prefill: enough records to keep `depth` parts in flight."""
    smallest = min(c.nbytes for c in manifest.classes)
    wanted = -(-depth * PART_BYTES // smallest) + 1
    slots = min(landing.num_slots_of(c) for c in range(len(manifest.classes)))
    return max(1, min(wanted, slots // 2, 2 * depth))


def _context(config: Any, asked: int) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return asked or 1 << 20
    if asked > longest:
        raise UsageError(f"-c/--ctx-size {asked}: this model's context ends at {longest}")
    return asked or int(longest)


def _records(
    steps: Iterator[tuple[int, StepFigures, bool]],
    text: TextStream | None,
    ends: frozenset[int],
) -> Iterator[TokenRecord]:
    """Attach text to tokens, and end where the answer ends; exactly one record per token."""
    for token, figures, last in steps:
        if token in ends:
            yield TokenRecord(token, text.finish() if text else "", figures, "stop")
            return
        piece = text.add(token) if text else ""
        if text and text.stopped:
            yield TokenRecord(token, piece, figures, "stop")
            return
        if last and text:
            piece += text.finish()
        yield TokenRecord(token, piece, figures, "length" if last else None)
