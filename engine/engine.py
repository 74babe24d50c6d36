"""The engine: a store, its tiers and its model, put together and taken apart again."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tierrun.engine.architecture import read_config
from tierrun.engine.backend import Backend, HostBackend
from tierrun.engine.defaults import ModelDefaults
from tierrun.engine.devices import choose_device
from tierrun.engine.options import Options
from tierrun.engine.resident import ResidentWeights
from tierrun.engine.sampling import Chooser, FixedTokens, Sampler, Sampling
from tierrun.engine.session import Session
from tierrun.engine.text import TextStream, encode, load_tokenizer
from tierrun.engine.tokens import TokenRecord, token_records
from tierrun.io.errors import UsageError
from tierrun.io.store import ExpertKey, Store
from tierrun.tiers.ledger import Counters, Ledger
from tierrun.tiers.usage import UsageFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals of an engine: the ledger's counters, tier sizes in bytes, and the read queue's.

    `read_seconds` is the time in which any read was under way, `mean_depth` the mean number of
    records being read during it.
    """

    counters: Counters
    hot_bytes: int
    warm_bytes: int
    resident_bytes: int
    reader: str
    read_seconds: float
    mean_depth: float


class Engine:
    """Runs the model of one store. A context manager; `close` frees everything.

    One thread may use it at a time.
    """

    def __init__(self, store: Store, options: Options) -> None:
        self.store, self.options, self.ledger = store, options, Ledger()
        self.device, reason = choose_device(options.device)
        log.info("device: %s (%s)", self.device, reason)
        weights = ResidentWeights(store)
        self._resident_bytes = weights.nbytes
        self.tokenizer = load_tokenizer(store.model_dir)
        config = read_config(store.model_dir)
        self.defaults = ModelDefaults(store.model_dir, config, self.tokenizer)
        self.context = self.defaults.context(options.context, on_gpu=self.device.type == "cuda")
        self.backend = self._make_backend(weights)
        self.model, self.hook = self.backend.model, self.backend.hook
        self.residency, self.queue = self.backend.residency, self.backend.queue
        self._usage = UsageFile(store.roots[0], store.manifest)
        self._closed = False
        self._last_stats: EngineStats | None = None

    def _make_backend(self, weights: ResidentWeights) -> Backend:
        if self.device.type == "cpu":
            return HostBackend(self.store, weights, self.options, self.ledger)
        from tierrun.engine.gpu.backend import GpuBackend

        return GpuBackend(self.store, weights, self.options, self.ledger, self.device, self.context)

    def session(self) -> Session:
        """An empty context."""
        return Session(
            self.model,
            self.backend.context(),
            self.hook,
            self.ledger,
            self.context,
            self.backend.chunk,
        )

    def warm_up(self) -> None:
        """Fill the GPU's hot tier now, most used experts first (by the store's usage file).

        Raises:
            UsageError: there is no GPU.
        """
        counts = self._usage.read()
        keys = [ExpertKey(layer, e) for layer, row in enumerate(counts) for e in range(len(row))]
        keys.sort(key=lambda key: -counts[key.layer][key.expert])
        self.backend.warm_up(keys)

    def check_integrity(self) -> None:
        """Every tier's books agree; for tests and soaks, between tokens."""
        self.backend.check_integrity()

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `token_ids` in a context of their own, fp32 [T, vocab].

        Raises:
            UsageError: no token, or more than the context holds.
        """
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
            UsageError: no tokenizer for a text prompt or for stop strings, a token outside the
                vocabulary, or a prompt longer than the context.
            ReadError, CorruptError: the store could not be read.
        """
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if stop and self.tokenizer is None:
            raise UsageError("this store has no tokenizer, so stop strings cannot be found")
        session = session or self.session()
        chooser: Chooser = Sampler(sampling or self.defaults.sampling())
        if fixed:
            chooser, max_new_tokens = FixedTokens(fixed), min(max_new_tokens, len(fixed))
        text = TextStream(self.tokenizer, stop, ids) if self.tokenizer else None
        ends = frozenset() if ignore_eos else self.defaults.eos_tokens()
        yield from token_records(session.generate(ids, chooser, max_new_tokens), text, ends)

    def stats(self) -> EngineStats:
        """Totals since loading; after `close`, the last ones."""
        if self._last_stats is not None:
            return self._last_stats
        queue = self.queue.figures()
        return EngineStats(
            counters=self.ledger.snapshot(),
            hot_bytes=self.backend.hot_bytes,
            warm_bytes=self.backend.warm_bytes,
            resident_bytes=self._resident_bytes,
            reader=self.queue.reader_name,
            read_seconds=queue.busy_seconds,
            mean_depth=queue.mean_depth,
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
        self._closed, self._last_stats = True, self.stats()
        self.backend.close()
        self.save_usage()
        del self.model, self.hook, self.residency, self.backend

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
