"""The experts hook: what transformers calls instead of its own experts, for every architecture.

`ExpertsInterface` routes each experts module's forward here with the hidden states, the chosen
experts and their weights. Decode leases the few experts of a token, computes those that are there
while the others are read, and takes them as they arrive; prefill streams each expert of the layer
once. Outputs are summed in the order of the top-k slots, whatever order they were computed in: the
result does not depend on where an expert was.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tierrun.engine.architecture import experts_modules
from tierrun.engine.codecs.weight import Weight, matrix_view, widened
from tierrun.engine.compiled import CompiledExperts
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.lookahead import Lookahead
from tierrun.engine.model import EXPERTS_IMPLEMENTATION
from tierrun.io.store import Manifest
from tierrun.tiers.ledger import LayerTiming, Ledger
from tierrun.tiers.residency import Held, Lease, Residency
from tierrun.tiers.tier import Tier

if TYPE_CHECKING:
    from tierrun.engine.host.experts import PresentExperts

_hooks: "WeakKeyDictionary[nn.Module, Callable[[], Callable[..., torch.Tensor] | None]]"
_hooks = WeakKeyDictionary()
"""Experts module → the hook of the engine it belongs to; keeps neither alive."""


_TOGETHER = 8
"""Experts of a prompt that are computed in one call, where they are there: enough that the threads
of many cores end together, and reads that run ahead are topped up in between."""

Matrices = dict[str, Weight]
"""The matrices and biases of one record, by name."""


class Interrupted(Exception):
    """The user asked to stop; raised between layers, where nothing is half done."""


class ExpertsHook:
    """Computes the experts of one model from one residency."""

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        residency: Residency,
        kernels: CpuKernels,
        ledger: Ledger,
        lookahead: Lookahead | None,
        prefill_window: int,
        compiled: CompiledExperts | None = None,
    ) -> None:
        self._compiled = compiled
        self._manifest, self._residency, self._kernels = manifest, residency, kernels
        self._ledger, self._lookahead, self._window = ledger, lookahead, prefill_window
        self._layer_of = {module: i for i, module in enumerate(experts_modules(model).values())}
        self._views: dict[tuple[str, int, int], Matrices] = {}
        self._last_end, self._outputs = time.perf_counter(), torch.empty(0)
        self.usage = [torch.zeros(len(x.records), dtype=torch.int64) for x in manifest.layers]
        self._counts = [counts.numpy() for counts in self.usage]  # of the same memory
        self.present = self._present_experts()
        self.interrupted = False
        for module in self._layer_of:
            _hooks[module] = ref(self)

    def _present_experts(self) -> "PresentExperts | None":
        """A token's without a lease; where experts move between tiers, each is leased."""
        if self._compiled is None or self._residency.placement.promotes:
            return None
        from tierrun.engine.host.experts import PresentExperts  # imports numba: a second

        return PresentExperts(
            self._compiled, self._residency, self._ledger, self.usage, self._lookahead
        )

    def watches(self, layer: int) -> bool:
        """Whether look-ahead must see the modules of `layer` called, to find its router."""
        return self._lookahead is not None and self._lookahead.watches(layer)

    def saw(self, layer: int, hidden: torch.Tensor) -> None:
        """The router of `layer` was given `hidden`, and computed without its module."""
        if self.interrupted:
            raise Interrupted
        if self._lookahead is not None:
            self._lookahead.saw(layer, hidden)

    def start_forward(self) -> None:
        """A forward pass begins: its first layer's resident time counts from here."""
        if self.present is not None:  # of a pass that was interrupted
            self.present.keep_books(self._last_end)
        self._residency.next_step()
        self._last_end = time.perf_counter()

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, top_k: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden` [tokens, H], `top_k` and `weights` [tokens, k] → [tokens, H]."""
        if self.interrupted:
            raise Interrupted
        layer = self._layer_of[module]
        if self.present is not None:
            y = self.present.compute(layer, hidden, top_k, weights)
            if y is not None:
                return y
            self._last_end = self.present.keep_books(self._last_end)
        started, waited = time.perf_counter(), self._ledger.counters.wait_seconds
        reads = self._ledger.counters.cold
        np.add.at(self._counts[layer], top_k.numpy(), 1)  # three operations of torch are slower
        if self._lookahead is not None:
            self._lookahead.observe(layer, top_k)
        y, hits, computed = self._compute(layer, module, hidden, top_k, weights)
        nbytes = (self._ledger.counters.cold - reads) * self._manifest.class_of(layer).nbytes
        waited = self._ledger.counters.wait_seconds - waited
        timing = LayerTiming(
            step=self._residency.placement.step,
            layer=layer,
            tokens=len(hidden),
            resident=started - self._last_end,
            hits=hits,
            misses=computed - hits,
            wait=waited,
            read_bytes=nbytes,
        )
        self._ledger.timings.append(timing)
        self._last_end = time.perf_counter()
        return y

    def _compute(
        self,
        layer: int,
        module: nn.Module,
        hidden: torch.Tensor,
        top_k: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, float, float]:
        """The layer's output; seconds of compute for hits and for all."""
        if self.present is not None and len(hidden) == 1:
            experts = sorted(set(top_k[0].tolist()))
            found = self.present.leased(
                layer, hidden, top_k, weights, lambda: self._lease(layer, experts)
            )
            if found is not None:
                return found
        work = _LayerWork(module, hidden, top_k, weights, self._room(top_k, hidden))
        if len(work.experts) <= self._manifest.layers[layer].top_k:
            hits, computed = self._decode(layer, work)
        else:
            hits, computed = self._prefill(layer, work)
        return self._sum(layer, work), hits, computed

    def _room(self, top_k: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, k, H], kept until the forward pass is over: new memory is slow to touch."""
        shape = *top_k.shape, hidden.shape[1]
        if self._outputs.numel() < math.prod(shape) or self._outputs.dtype != hidden.dtype:
            self._outputs = hidden.new_empty(math.prod(shape))
        return self._outputs[: math.prod(shape)].view(shape)

    def _sum(self, layer: int, work: "_LayerWork") -> torch.Tensor:
        compiled = self._kernels_of(layer)
        if compiled is not None:
            return compiled.weighted_sums(layer, work.outputs, work.weights)
        return work.weighted_sums()

    def _lease(self, layer: int, experts: list[int]) -> Lease:
        """Of `experts`; what the next layer will want is asked for, too."""
        lease = self._residency.lease(layer, experts)
        try:
            self._look_ahead(layer)
        except BaseException:
            lease.release()
            raise
        return lease

    def end_forward(self, tokens: int) -> None:
        """The forward pass is over: what came after the last experts is resident compute too."""
        if self.present is not None:
            self._last_end = self.present.keep_books(self._last_end)
        step, resident = self._residency.placement.step, time.perf_counter() - self._last_end
        self._outputs = torch.empty(0)
        head = len(self._manifest.layers)
        self._ledger.timings.append(LayerTiming(step, head, tokens, resident, 0.0, 0.0, 0.0, 0))

    def _decode(self, layer: int, work: "_LayerWork") -> tuple[float, float]:
        """Hits first, then misses as they arrive; seconds of compute for hits and for all."""
        with self._lease(layer, work.experts) as lease:
            hits = self._compute_all(layer, list(lease.ready), work)
            misses = self._compute_arrivals(lease, work)
        return hits, hits + misses

    def _look_ahead(self, layer: int) -> None:
        if self._lookahead is None:
            return
        experts = self._lookahead.predict(layer + 1)
        if experts:
            self._residency.look_ahead(layer + 1, experts)

    def _compute_arrivals(self, lease: Lease, work: "_LayerWork") -> float:
        return sum(self._compute_all(lease.layer, [held], work) for held in lease.arrivals())

    def _prefill(self, layer: int, work: "_LayerWork") -> tuple[float, float]:
        """Every expert once, most used first; seconds of compute for hits and for all."""
        counters = self._ledger.counters
        cold, hits, computed = counters.cold, 0.0, 0.0
        for group in self._residency.groups(layer, work.experts, self._window, _TOGETHER):
            seconds = self._compute_all(layer, group, work)
            computed += seconds
            hits += seconds if cold == counters.cold else 0.0
            cold = counters.cold
        self._residency.used(layer, work.last_experts())
        return hits, computed

    def _compute_all(self, layer: int, held: Sequence[Held], work: "_LayerWork") -> float:
        started = time.perf_counter()
        compiled = self._kernels_of(layer)
        if compiled is not None:
            records = {expert: tier.memory(slot).data_ptr() for expert, tier, slot in held}
            if records:
                work.add_all(compiled, layer, records)
        else:
            for expert, tier, slot in held:
                work.add(expert, self._matrices(tier, slot), self._kernels)
        return time.perf_counter() - started

    def _kernels_of(self, layer: int) -> CompiledExperts | None:
        """Those that take the experts of `layer`, if any do."""
        takes = self._compiled is not None and self._compiled.takes(layer)
        return self._compiled if takes else None

    def _matrices(self, tier: Tier, slot: int) -> Matrices:
        """Views of the slot's record, made once: slots never move."""
        record_class = int(tier.record_class[slot])
        key = (tier.name, slot, record_class)
        views = self._views.get(key)
        if views is None:
            record = tier.memory(slot)
            matrices = self._manifest.classes[record_class].matrices
            views = {matrix.name: matrix_view(record, matrix) for matrix in matrices}
            self._views[key] = views
        return views


class _LayerWork:
    """One call of an experts module: which tokens want which experts, and their outputs so far."""

    def __init__(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        top_k: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """`outputs` [tokens, k, H] is filled expert by expert; all of `top_k` must be added."""
        self._module, self._hidden, self._top_k = module, hidden, top_k
        self.weights, self.outputs = weights, outputs
        experts, uses = torch.unique(top_k, return_counts=True)
        self.experts: list[int] = experts[uses.argsort(descending=True, stable=True)].tolist()

    def last_experts(self) -> list[int]:
        """What the last token chose: the best guess at what decode will want."""
        chosen: list[int] = self._top_k[-1].tolist()
        return chosen

    def add(self, expert: int, matrices: Matrices, kernels: CpuKernels) -> None:
        """Compute `expert` for every token that chose it."""
        tokens, positions = (self._top_k == expert).nonzero(as_tuple=True)
        y = _expert(self._module, self._hidden[tokens], matrices, kernels)
        self.outputs[tokens, positions] = y

    def add_all(self, compiled: CompiledExperts, layer: int, records: dict[int, int]) -> None:
        """Compute the experts of `records` (by their addresses) for all tokens, in one call."""
        outputs = self.outputs.flatten(0, 1)
        rows = compiled.compute(layer, records, self._hidden, self._top_k, outputs)
        theirs: Any = self._module
        if theirs.has_post_expert_norm:
            outputs[rows] = theirs.post_expert_norm(outputs[rows])

    def weighted_sums(self) -> torch.Tensor:
        """The weighted sum over the top-k slots, [tokens, H]."""
        weighted = self.outputs.mul_(self.weights[:, :, None])
        return weighted.sum(dim=1).to(self._hidden.dtype)


def _expert(
    module: nn.Module, x: torch.Tensor, matrices: Matrices, kernels: CpuKernels
) -> torch.Tensor:
    """One expert's MLP as its module defines it: `x` [n, H] → [n, H].

    Follows `batched_mm_experts_forward` of transformers, one expert at a time.
    """
    theirs: Any = module
    if theirs.has_gate:
        h = theirs._apply_gate(_gate_up(theirs, x, matrices, kernels))
    else:
        h = theirs.act_fn(kernels.linear(x, matrices["up_proj"], _bias(matrices, "up_proj")))
    y = kernels.linear(h, matrices["down_proj"], _bias(matrices, "down_proj"))
    z: torch.Tensor = theirs.post_expert_norm(y) if theirs.has_post_expert_norm else y
    return z


def _gate_up(module: Any, x: torch.Tensor, matrices: Matrices, kernels: CpuKernels) -> torch.Tensor:
    """`x` [n, H] through gate and up, in the order of the module's `gate_up_proj`: [n, 2 I].

    The two are matrices of their own where their codecs differ.
    """
    bias = _bias(matrices, "gate_up_proj")
    if "gate_up_proj" in matrices:
        return kernels.linear(x, matrices["gate_up_proj"], bias)
    both = [kernels.linear(x, matrices[name]) for name in ("gate_proj", "up_proj")]
    h = torch.cat(both, 1) if module.is_concatenated else torch.stack(both, 2).flatten(1)
    return h if bias is None else h.add_(bias)


def _bias(matrices: Matrices, name: str) -> torch.Tensor | None:
    bias = matrices.get(f"{name}_bias")
    return None if bias is None else widened(bias)


def hook_of(module: nn.Module) -> ExpertsHook | None:
    """The hook of the engine that the experts `module` belongs to, if there is one."""
    known = _hooks.get(module)
    found = None if known is None else known()
    return found if isinstance(found, ExpertsHook) else None


@contextmanager
def standing_in(module: nn.Module, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let `function` answer for the experts of `module`, which no engine has yet."""
    assert module not in _hooks, "an engine's experts"
    _hooks[module] = lambda: function
    try:
        yield
    finally:
        del _hooks[module]


def _experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls; finds the hook of the engine that `module` belongs to."""
    hook = _hooks[module]()
    assert hook is not None, "the engine of this model is closed"
    return hook(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)
