"""What an engine needs of the device it runs on; `HostBackend` is the one for the CPU."""

import logging
from collections.abc import Iterable
from typing import Protocol

import torch
from transformers import PreTrainedModel

from tierrun.engine.architecture import experts_modules
from tierrun.engine.compiled import CompiledExperts
from tierrun.engine.context import Context, CpuContext
from tierrun.engine.devices import choose_device
from tierrun.engine.experts import ExpertsHook
from tierrun.engine.host.heap import keep_heap
from tierrun.engine.host.threads import TorchThreads
from tierrun.engine.kernels.cpu import cpu_kernels
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.int8_ready import Int8Ready
from tierrun.engine.lookahead import Lookahead
from tierrun.engine.model import load_model
from tierrun.engine.options import Options
from tierrun.engine.resident import ResidentWeights
from tierrun.engine.storage import measured_paths
from tierrun.io.errors import UsageError
from tierrun.io.reader import choose_reader, open_reader
from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey, Store
from tierrun.tiers.budget import resolve_ram, resolve_vram
from tierrun.tiers.ledger import Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.policy import make_policy
from tierrun.tiers.residency import Residency
from tierrun.tiers.setup import make_tiers, prefill_window

log = logging.getLogger(__name__)


class Hook(Protocol):
    """The experts of one model, as the engine sees them.

    `usage` counts per layer how often each expert was chosen; `interrupted`, once set, ends the
    forward pass under way between two layers.
    """

    usage: list[torch.Tensor]
    interrupted: bool

    def start_forward(self) -> None: ...

    def end_forward(self, tokens: int) -> None: ...


class Backend(Protocol):
    """A model on a device, its experts in their tiers; prompts go in chunks of `chunk` tokens."""

    model: PreTrainedModel
    residency: Residency
    queue: ReadQueue
    chunk: int

    @property
    def hook(self) -> Hook: ...

    @property
    def hot_bytes(self) -> int: ...

    @property
    def warm_bytes(self) -> int: ...

    def context(self) -> Context:
        """An empty context of at most `capacity` tokens."""

    def warm_up(self, order: Iterable[ExpertKey]) -> None:
        """Read the first of `order` that the tiers hold; nothing counts as a lookup."""

    def check_integrity(self) -> None:
        """Every tier's books agree; nothing may be under way."""

    def close(self) -> None:
        """End every read, let go of all memory."""


class HostBackend:
    """Everything in host memory; the hot tier is ordinary memory too."""

    def __init__(
        self, store: Store, weights: ResidentWeights, options: Options, ledger: Ledger
    ) -> None:
        keep_heap()
        threads = options.kernel_threads
        self.chunk = options.host_chunk
        vram = resolve_vram(options.vram, "cpu")
        ram = resolve_ram(options.ram, weights.nbytes + vram.nbytes)
        hot, warm = make_tiers(store.manifest, vram, ram)
        policy = make_policy(options.policy, store.manifest.num_experts)
        reader = chosen_reader(store, options)
        ready = None if options.exact else Int8Ready(_codecs(store))
        try:
            weights.verify()
        finally:
            if ready is not None:
                ready.wait()
        kernels = cpu_kernels(threads, exact=options.exact)
        self.model = load_model(store, weights, kernels)
        compiled = None if options.exact else self._compiled(store, threads)
        self._quick = not options.exact
        quick = not options.exact and self._quicken(threads, compiled)
        self.queue = open_queue(store, reader, options)
        self.residency = Residency(Placement(store.manifest, hot, warm, policy, self.queue, ledger))
        self._threads = TorchThreads(options.num_threads, quick=quick)
        self.hook = ExpertsHook(
            self.model,
            store.manifest,
            self.residency,
            kernels,
            ledger,
            Lookahead(self.model) if options.lookahead else None,
            prefill_window(store, self.residency.placement.landing, options.depth),
            compiled,
        )

    def _compiled(self, store: Store, threads: int) -> CompiledExperts:
        modules = list(experts_modules(self.model).values())
        return CompiledExperts(modules, store.manifest, threads)

    def _quicken(self, threads: int, compiled: CompiledExperts | None) -> bool:
        """Have tokens computed in few calls; whether nothing heavy of them is left to torch."""
        from tierrun.engine.host.tokens import quicken  # imports numba: a second

        whole = quicken(self.model, Int8Linear(threads), threads)
        return whole and compiled is not None and compiled.complete

    @property
    def hot_bytes(self) -> int:
        return self.residency.placement.hot.slab.nbytes

    @property
    def warm_bytes(self) -> int:
        return self.residency.placement.warm.slab.nbytes

    def context(self) -> Context:
        """See `Backend`."""
        return CpuContext(self.model, self._threads.before, grows=self._quick)

    def warm_up(self, order: Iterable[ExpertKey]) -> None:
        """See `Backend`."""
        raise UsageError("warming up is for a GPU; on the CPU the first prompt does it")

    def check_integrity(self) -> None:
        """See `Backend`."""
        self.residency.check_integrity()

    def close(self) -> None:
        """See `Backend`."""
        self.queue.close()


def _codecs(store: Store) -> set[str]:
    """In which experts and resident weights are stored."""
    manifest = store.manifest
    experts = {matrix.codec for kind in manifest.classes for matrix in kind.matrices}
    return experts | {resident.dtype for resident in manifest.residents}


def chosen_reader(store: Store, options: Options) -> str:
    """The name of the reader to use; says which and why. Measures the drives of `store` where it is
    first run on a GPU with kvikio.

    Raises:
        UsageError: as `choose_reader`.
    """
    device = choose_device(options.device).device
    measured = measured_paths(store, options, device) if device.type == "cuda" else None
    choice = choose_reader(options.io, store.shard_paths, options.strict, measured)
    level = logging.WARNING if choice.fallback else logging.INFO
    log.log(level, "reads: %s (%s)", choice.name, choice.reason)
    return choice.name


def open_queue(store: Store, reader: str, options: Options) -> ReadQueue:
    """The read queue over `store`'s shards."""
    return ReadQueue(store, open_reader(reader, store.shard_paths, options.depth), options.depth)
