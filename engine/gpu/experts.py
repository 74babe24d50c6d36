"""The experts on the device: what transformers calls instead of its own, for every architecture.

Decode (up to 8 tokens): the device looks up by itself which of the experts its router has chosen
lie in VRAM, computes those at once and tells the host; the host reads the letter while they compute
and sees to the missing ones: they are copied into slots and computed by the same kernels. Outputs
are kept apart by top-k slot and summed in that order afterwards, so the result does not depend on
where an expert was. Prefill streams every expert of the layer through VRAM once.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tierrun.engine.architecture import experts_modules
from tierrun.engine.experts import Interrupted
from tierrun.engine.gpu.compute import ExpertCompute, Prefill
from tierrun.engine.gpu.hostlane import HostLane
from tierrun.engine.gpu.layout import ExpertLayout, expert_layout
from tierrun.engine.gpu.letters import Letter, Mailboxes
from tierrun.engine.gpu.ops import DECODE_TOKENS, weighted_sum
from tierrun.engine.kernels.lookup import look_up
from tierrun.io.store import Manifest
from tierrun.io.timeline import HOST, span
from tierrun.tiers.lanes import Lanes
from tierrun.tiers.ledger import LayerTiming
from tierrun.tiers.residency import Held
from tierrun.tiers.vram import Arrival, VramTier

DEVICE_EXPERTS = "tierrun_device"
"""The name of our function in transformers' ExpertsInterface."""

Cut = Callable[[Callable[[], None]], None]
"""Ends the graph that is being recorded; the host step given follows it."""

_SEEDING = 8
"""Last tokens of a prompt's chunk whose choices count as used: what decode is likely to want."""

_keys = count()
_layers: "dict[int, tuple[ReferenceType[DeviceExperts | NoExperts], int]]" = {}
"""Key of an experts module → its owner and its layer there; keeps no owner alive."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One decode call of an experts layer: its input, and what is computed into."""

    layer: int
    hidden: torch.Tensor
    outputs: torch.Tensor
    assignments: int


class DeviceExperts:
    """Computes the experts of one model from one VRAM tier."""

    def __init__(
        self, model: nn.Module, manifest: Manifest, vram: VramTier, device: torch.device
    ) -> None:
        self._manifest, self._vram, self._device = manifest, vram, device
        self._ledger, self._last_end = vram.ledger, time.perf_counter()
        modules = list(experts_modules(model).values())
        self._compute = [
            ExpertCompute(module, expert_layout(module, manifest.class_of(layer)))
            for layer, module in enumerate(modules)
        ]
        most = DECODE_TOKENS * max(layer.top_k for layer in manifest.layers)
        self._mailboxes = Mailboxes(len(modules), most, pinned=device.type == "cuda")
        self._staging = _Staging(most, device)
        self._unaccounted: list[tuple[int, NDArray[np.int64]]] = []
        sizes = [len(layer.records) for layer in manifest.layers]
        counts = torch.zeros(sum(sizes), dtype=torch.int64)
        self.usage = list(torch.split(counts, sizes))
        self._counts, self._first = counts.numpy(), np.cumsum([0, *sizes])
        self.interrupted = False
        self.cut: Cut | None = None
        self.lanes: Lanes | None = None
        self._host: HostLane | None = None
        for layer, module in enumerate(modules):
            _register(self, layer, module)

    @property
    def layouts(self) -> list[ExpertLayout]:
        """Of every layer."""
        return [compute.layout for compute in self._compute]

    def use_lanes(self, host: HostLane, lanes: Lanes) -> None:
        """Have `host` compute what `lanes` does not want copied; before the first forward pass."""
        self._host, self.lanes = host, lanes

    def start_forward(self) -> None:
        """A forward pass begins: what is not serving misses counts as resident from here."""
        self._vram.next_step()
        self._last_end = time.perf_counter()

    def end_forward(self, tokens: int) -> None:
        """It is over; the policy learns of the layers that had everything."""
        self._account()
        self._time(len(self._manifest.layers), tokens, time.perf_counter(), 0.0, 0)

    def abandon(self) -> None:
        """A forward pass was broken off: nothing of it is left under way."""
        if self._host is not None:
            self._host.abandon()
        self._vram.abandon()
        self._vram.copies.synchronize()
        self._mailboxes.clear()
        self._unaccounted.clear()

    def __call__(self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        """`hidden` fp32 [T, H], `top_k` int64 [T, k] → outputs of each, unweighted: [T, k, H]."""
        hidden, top_k = hidden.contiguous(), top_k.contiguous()
        outputs = hidden.new_empty(top_k.numel(), hidden.shape[-1])
        if len(hidden) <= DECODE_TOKENS:
            self._decode(layer, hidden, top_k, outputs)
        else:
            self._prefill(layer, hidden, top_k, outputs)
        return outputs.view(*top_k.shape, -1)

    # -- decode ---------------------------------------------------------------------------------

    def _decode(
        self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Look up, compute what is there, and let the host see to the rest."""
        slots = torch.empty(top_k.numel(), dtype=torch.int64, device=self._device)
        told = () if self._host is None else (hidden, self._host.hidden)
        look_up(self._vram.table_of(layer), top_k, slots, self._mailboxes.memory(layer), *told)
        self._compute[layer].decode(hidden, self._vram.base, slots, outputs)
        call = _Call(layer, hidden, outputs, top_k.numel())
        if self.cut is not None:
            self.cut(lambda: self._serve(call))
        else:
            self._serve(call)

    def _serve(self, call: _Call) -> None:
        """The host's part of a layer: nothing, where everything was in VRAM."""
        if self.interrupted:
            raise Interrupted
        with span(HOST, f"layer {call.layer}: waits for the letter"):
            letter = self._mailboxes.wait(call.layer, call.assignments)
        if letter.slots.min() >= 0:
            self._unaccounted.append((call.layer, letter.experts))
            return
        self._account()
        started, counters = time.perf_counter(), self._ledger.counters
        waited, read = counters.wait_seconds, counters.cold
        with span(HOST, f"layer {call.layer}: serves misses"):
            self._fetch(call, letter)
        nbytes = (counters.cold - read) * self._manifest.class_of(call.layer).nbytes
        waited = counters.wait_seconds - waited
        self._time(call.layer, len(call.hidden), started, waited, nbytes)

    def _time(self, layer: int, tokens: int, started: float, waited: float, nbytes: int) -> None:
        """Note a layer that had misses: the time before it, and what serving them took."""
        now = time.perf_counter()
        timing = LayerTiming(
            step=self._vram.residency.placement.step,
            layer=layer,
            tokens=tokens,
            resident=started - self._last_end,
            hits=0.0,
            misses=now - started - waited,
            wait=waited,
            read_bytes=nbytes,
        )
        self._ledger.timings.append(timing)
        self._last_end = now

    def _fetch(self, call: _Call, letter: Letter) -> None:
        """Compute the assignments that had no slot, in VRAM and in RAM, as their experts come."""
        self._count([(call.layer, letter.experts)])
        wanted = list(dict.fromkeys(letter.experts.tolist()))
        if self._host is None or self.lanes is None:
            for arrived, _ in self._vram.fetch(call.layer, wanted):
                self._launch(call, letter, arrived)
            return
        host, choose = self._host, partial(self._num_copied, self.lanes, call.layer, letter)
        host.begin()
        for arrived, held in self._vram.fetch(call.layer, wanted, choose):
            if held:
                host.start(call.layer, held, letter.experts, call.assignments // len(call.hidden))
            self._launch(call, letter, arrived)
            if held:
                host.finish(call.outputs)

    def _launch(self, call: _Call, letter: Letter, arrived: Sequence[Arrival]) -> None:
        """Compute, on the device, the assignments that want what has just come."""
        slots = np.full(call.assignments, -1, dtype=np.int64)
        for expert, offset in arrived:
            slots[(letter.experts == expert) & (letter.slots < 0)] = offset
        if (slots < 0).all():
            return
        self._vram.copies.ready()
        places = self._staging.upload(slots)
        self._compute[call.layer].decode(call.hidden, self._vram.base, places, call.outputs)

    def _num_copied(self, lanes: Lanes, layer: int, letter: Letter, held: list[Held]) -> int:
        """Of experts in RAM, how many go up; the CPU has one product per token that wants it."""
        tokens = [int((letter.experts == one.expert).sum()) for one in held]
        nbytes = self._manifest.class_of(layer).nbytes
        return lanes.num_copied([nbytes] * len(held), [nbytes * count for count in tokens])

    def _account(self) -> None:
        """Tell policy and counters of the layers that found everything in VRAM."""
        self._count(self._unaccounted)
        self._vram.all_hit(self._unaccounted)
        self._unaccounted.clear()

    def _count(self, calls: Sequence[tuple[int, NDArray[np.int64]]]) -> None:
        if calls:
            places = [experts + self._first[layer] for layer, experts in calls]
            np.add.at(self._counts, np.concatenate(places), 1)

    # -- prefill --------------------------------------------------------------------------------

    def _prefill(
        self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Every expert of the layer once, most used first, in groups as they come into VRAM."""
        if self.interrupted:
            raise Interrupted
        self._account()
        prefill = Prefill(self._compute[layer], hidden, top_k, len(self.usage[layer]))
        self.usage[layer] += torch.tensor(prefill.counts)
        with span(HOST, f"layer {layer}: streams {len(prefill.experts)} experts"):
            for group in self._vram.stream(layer, prefill.experts):
                self._vram.copies.ready()
                prefill.run(self._vram.base, group, outputs)
        for chosen in top_k[-_SEEDING:].tolist():
            self._vram.used(layer, chosen)


class NoExperts:
    """Stands for the experts while memory is measured: they give zeros."""

    cut: Cut | None = None

    def __init__(self, model: nn.Module) -> None:
        for layer, module in enumerate(experts_modules(model).values()):
            _register(self, layer, module)

    def __call__(self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H], `top_k` [T, k] → zeros [T, k, H]."""
        return hidden.new_zeros(*top_k.shape, hidden.shape[-1])

    def abandon(self) -> None:
        """Nothing is ever under way."""


class _Staging:
    """Slots of single launches on their way to the device: a ring in pinned memory.

    Assumes: no more than a ring's worth of uploads between two letters of the device, which say
    that everything before them is done.
    """

    def __init__(self, assignments: int, device: torch.device) -> None:
        shape, pinned = (2 * assignments, assignments), device.type == "cuda"
        self._host = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.empty(shape, dtype=torch.int64, device=device)
        self._next = 0

    def upload(self, slots: NDArray[np.int64]) -> torch.Tensor:
        """`slots` [A] on the device, in stream order."""
        row = self._next
        self._next = (row + 1) % len(self._host)
        count = len(slots)
        self._host[row, :count] = torch.from_numpy(slots)
        self._device[row, :count].copy_(self._host[row, :count], non_blocking=True)
        return self._device[row, :count]


def _register(owner: DeviceExperts | NoExperts, layer: int, module: Any) -> None:
    """Make `owner` compute `module`, whoever did before."""
    if not hasattr(module, "tierrun_key"):
        module.tierrun_key = next(_keys)
    _layers[module.tierrun_key] = (ref(owner), layer)


def forget(modules: Iterable[Any]) -> None:
    """The engine of these experts modules is closed."""
    for module in modules:
        _layers.pop(module.tierrun_key, None)


@torch.library.custom_op("tierrun::experts", mutates_args=())
def _experts(hidden: torch.Tensor, top_k: torch.Tensor, key: int) -> torch.Tensor:
    """Opaque to torch.compile: the host takes part in it."""
    owner, layer = _layers[key]
    experts = owner()
    assert experts is not None, "the engine of this model is closed"
    return experts(layer, hidden, top_k)


@_experts.register_fake
def _(hidden: torch.Tensor, top_k: torch.Tensor, key: int) -> torch.Tensor:
    return hidden.new_empty(*top_k.shape, hidden.shape[-1])


def _experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls: [T, H], [T, k], [T, k] → [T, H]."""
    outputs = _experts(hidden, top_k_index, module.tierrun_key)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    if torch.compiler.is_compiling():  # fused with what follows
        weighted: torch.Tensor = (outputs * top_k_weights[..., None]).sum(dim=1)
        return weighted
    summed: torch.Tensor = weighted_sum(outputs, top_k_weights)
    return summed


ALL_EXPERTS_FUNCTIONS.register(DEVICE_EXPERTS, _experts_forward)
