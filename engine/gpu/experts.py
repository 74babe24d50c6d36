"""The experts on the device: what transformers calls instead of its own, for every architecture.

Decode (up to 8 tokens): the device looks up by itself where the experts lie that its router has
chosen, computes those in VRAM and those that it can read in RAM at once, and tells the host. The
host reads the letter while they compute, and sees to the others: what is read from the store, or
copied, is computed by the same kernels when it has come; what is left to the CPU is computed there
meanwhile. Outputs are kept apart by top-k slot and summed in that order afterwards, so the result
does not depend on where an expert was. Prefill streams every expert of the layer through VRAM once.
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
from tierrun.engine.gpu.graphs import Work, graph_seconds
from tierrun.engine.gpu.hostlane import HostLane
from tierrun.engine.gpu.layout import ExpertLayout, expert_layout
from tierrun.engine.gpu.letters import Letter, Mailboxes
from tierrun.engine.gpu.ops import DECODE_TOKENS, weighted_sum
from tierrun.engine.kernels import answer as answers
from tierrun.engine.kernels.geometry import COLUMNS, ROWS
from tierrun.engine.kernels.lookup import look_up, look_up_late
from tierrun.io.store import Manifest
from tierrun.io.timeline import EXPERTS, HOST, REST, between, moment, span
from tierrun.tiers.lanes import Cost, Lanes
from tierrun.tiers.ledger import LayerTiming
from tierrun.tiers.residency import Held
from tierrun.tiers.slottable import ABSENT, IN_PLACE, KIND, InRam
from tierrun.tiers.vram import VramTier

DEVICE_EXPERTS = "tierrun_device"
"""The name of our function in transformers' ExpertsInterface."""

Cut = Callable[..., None]
"""Ends the graph that is being recorded; the host step given follows it, with work beside."""

_SEEDING = 8
"""Last tokens of a prompt's chunk whose choices count as used: what decode is likely to want."""

_TRIALS = 3
"""Of the same number of experts in RAM, when the cost of reading them is measured."""

_LOOKS = 4
"""Every so many layers it is asked which lane was later: the question takes some microseconds."""

_keys = count()
_layers: "dict[int, tuple[ReferenceType[DeviceExperts | NoExperts], int]]" = {}
"""Key of an experts module → its owner and its layer there; keeps no owner alive."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One decode call of an experts layer: what is computed from, and into."""

    layer: int
    hidden: torch.Tensor
    top_k: torch.Tensor
    slots: torch.Tensor
    outputs: torch.Tensor

    @property
    def assignments(self) -> int:
        return self.top_k.numel()

    @property
    def per_token(self) -> int:
        return self.top_k.shape[-1]


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
        pinned = device.type == "cuda"
        self._mailboxes = Mailboxes(len(modules), most, pinned=pinned)
        self._shares = torch.zeros(
            len(manifest.classes), most + 1, dtype=torch.int64, device=device
        )
        self._names = [f"layer {layer}: waits for the letter" for layer in range(len(modules))]
        sizes = [len(layer.records) for layer in manifest.layers]
        counts = torch.zeros(sum(sizes), dtype=torch.int64)
        self.usage = list(torch.split(counts, sizes))
        self._counts, self._first = counts.numpy(), np.cumsum([0, *sizes])
        nbytes = [manifest.class_of(layer).nbytes for layer in range(len(sizes))]
        self._record_bytes: NDArray[np.int64] = np.array(nbytes)
        self._starts: list[int] = self._first.tolist()
        self._bytes_of = np.repeat(self._record_bytes, sizes)
        self.interrupted = False
        self.cut: Cut | None = None
        self._left: object = None
        self.lanes: Lanes | None = None
        self._host: HostLane | None = None
        for layer, module in enumerate(modules):
            _register(self, layer, module)

    @property
    def layouts(self) -> list[ExpertLayout]:
        """Of every layer."""
        return [compute.layout for compute in self._compute]

    def use_lanes(self, host: HostLane, lanes: Lanes) -> None:
        """Have `host` compute what `lanes` leaves to it; before the first forward pass."""
        self._host, self.lanes = host, lanes

    def calibrate(self, cost: Cost, records: Sequence[torch.Tensor], layer: int) -> None:
        """Fit `cost` to products of `layer` with `records`, free memory that the device reads."""
        if self._device.type != "cuda":
            return
        base, compute = self._vram.base, self._compute[layer]
        hidden = torch.zeros(1, compute.layout.first[0].matrix[COLUMNS], device=self._device)
        outputs = hidden.new_empty(len(records), compute.layout.down.matrix[ROWS])
        places = [record.data_ptr() - base.data_ptr() for record in records]
        slots = torch.tensor(places, device=self._device)
        for number in range(1, len(records) + 1):
            work = partial(compute.decode, hidden, base, slots[:number], outputs[:number])
            for seconds in graph_seconds(work, _TRIALS):
                cost.observe(number * len(records[0]), seconds)

    def start_forward(self) -> None:
        """A forward pass begins: what is not serving misses counts as resident from here."""
        self._vram.next_step()
        if self.lanes is not None:
            self._share_out(self.lanes)
        self._last_end = time.perf_counter()
        self._left = moment()

    def _share_out(self, lanes: Lanes) -> None:
        """Tell the device how many of so many experts in RAM it is to leave to the CPU."""
        if lanes.has_changed():
            numbers = range(self._shares.shape[1])
            sizes = [described.nbytes for described in self._manifest.classes]
            shares = [[lanes.cpu_share(number, size) for number in numbers] for size in sizes]
            self._shares.copy_(torch.tensor(shares))

    def end_forward(self, tokens: int) -> None:
        """It is over."""
        if tokens > DECODE_TOKENS:
            between(REST, "after the last experts", self._left, moment())
        self._account()
        self._time(len(self._manifest.layers), tokens, time.perf_counter(), 0.0, 0)

    def abandon(self) -> None:
        """A forward pass was broken off: nothing of it is left under way."""
        if self._host is not None:
            self._host.abandon()
        self._vram.abandon()
        self._vram.copies.synchronize()
        self._mailboxes.clear()

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
        call = _Call(layer, hidden, top_k, slots, outputs)
        told = () if self._host is None else (hidden, self._host.hidden)
        shares = self._shares[self._manifest.layers[layer].record_class]
        box = self._mailboxes.memory(layer)
        look_up(self._vram.table_of(layer), top_k, slots, box, shares, *told)
        self._compute[layer].decode(hidden, self._vram.base, slots, outputs)
        work = {"late": partial(self._compute_late, call)}
        if self._host is not None:
            work["join"] = partial(self._host.join, outputs)
        if self.cut is not None:
            self.cut(partial(self._serve, call), **work)
        else:
            self._serve(call, **work)

    def _compute_late(self, call: _Call) -> None:
        """Enqueue the products with records that have come since the lookup."""
        found = torch.empty_like(call.slots)
        look_up_late(self._vram.table_of(call.layer), call.top_k, call.slots, found)
        self._compute[call.layer].decode(call.hidden, self._vram.base, found, call.outputs)

    def _serve(self, call: _Call, late: Work, join: Work | None = None) -> None:
        """The host's part of a layer: only to take note, where the device had everything.

        `late` enqueues products with what has come meanwhile, `join` brings the CPU's results.
        """
        if self.interrupted:
            raise Interrupted
        layer, host = call.layer, self._host
        with span(HOST, self._names[layer]):
            found = self._mailboxes.answer(
                layer,
                call.assignments,
                call.per_token,
                self._starts[layer],
                self._vram.addresses,
                host.claim(layer) if host is not None else None,
            )
        if found & answers.ABSENT:
            self._serve_absent(call, found, late)
        if host is not None:
            self._end_host_part(host, layer, found)
            if found & answers.COMPUTED and join is not None:
                join()
        if layer + 1 == len(self._compute):
            self._account()  # while the device is still busy

    def _end_host_part(self, host: HostLane, layer: int, found: int) -> None:
        """The CPU's part is over: it is already, unless something was absent."""
        if found & answers.ABSENT:
            host.finish()
            return
        host.release()
        if found & answers.SHARED and self.lanes is not None and layer % _LOOKS == 0:
            self.lanes.balance(gpu_was_last=self._vram.copies.is_computing())

    def _serve_absent(self, call: _Call, found: int, late: Work) -> None:
        """Bring the experts that are in neither VRAM nor RAM, and note what that took."""
        started, counters = time.perf_counter(), self._ledger.counters
        waited, read = counters.wait_seconds, counters.cold
        letter = self._mailboxes.letter(call.layer, call.assignments)
        if self._host is not None and not found & answers.COMPUTED:
            self._host.release()
        with span(HOST, f"layer {call.layer}: serves misses"):
            self._fetch(call, letter, late)
        nbytes = (counters.cold - read) * int(self._record_bytes[call.layer])
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

    def _fetch(self, call: _Call, letter: Letter, late: Work) -> None:
        """Bring what is absent; compute each as it comes."""
        vram, wanted = self._vram, list(dict.fromkeys(letter.experts.tolist()))
        absent = set(letter.experts[letter.entries & KIND == ABSENT & KIND].tolist())
        np.add.at(self._counts, letter.experts + self._first[call.layer], 1)
        in_place = vram.in_ram is InRam.IN_PLACE
        many = in_place and len(wanted) > call.per_token
        if many or vram.in_ram is InRam.FOR_HOST:
            self._leave_to(call, letter, absent)
            wanted = [expert for expert in wanted if expert in absent]
        for arrived, held in vram.fetch(call.layer, wanted, _none_copied if in_place else None):
            come = {one.expert for one in arrived} | {one.expert for one in held}
            if absent.isdisjoint(come):
                continue  # these are read in place already
            vram.publish()
            late()
            nbytes = self._record_bytes[call.layer] * len(held)
            self._ledger.counters.zero_copy_bytes += int(nbytes)
            if many:
                vram.copies.synchronize()

    def _leave_to(self, call: _Call, letter: Letter, absent: set[int]) -> None:
        """Nobody reads an expert in RAM any more: `absent` ones may be read in their place."""
        if self._host is not None:
            self._host.finish()
        self._vram.copies.synchronize()
        others = [expert for expert in letter.experts.tolist() if expert not in absent]
        self._vram.served(np.array(others, dtype=np.int64) + self._first[call.layer])

    def _account(self) -> None:
        """Tell policy and counters of the layers that needed nothing but compute."""
        experts, entries = self._mailboxes.noted()
        if len(experts) or self._vram.is_owed:
            in_place = experts[entries & KIND == IN_PLACE]
            self._ledger.counters.zero_copy_bytes += int(self._bytes_of[in_place].sum())
            np.add.at(self._counts, experts, 1)
            self._vram.served(experts)
        if self._host is not None:
            self._host.account()

    # -- prefill --------------------------------------------------------------------------------

    def _prefill(
        self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Every expert of the layer once, most used first, in groups as they come into VRAM."""
        if self.interrupted:
            raise Interrupted
        between(REST, f"layer {layer}: before its experts", self._left, moment())
        self._account()
        with span(HOST, f"layer {layer}: groups tokens"):
            prefill = Prefill(self._compute[layer], hidden, top_k, len(self.usage[layer]))
        self.usage[layer] += torch.tensor(prefill.counts)
        last = top_k[-_SEEDING:].tolist()  # now, while the device has nothing to do
        with span(HOST, f"layer {layer}: streams {len(prefill.experts)} experts"):
            for group in self._vram.stream(layer, prefill.experts):
                self._vram.copies.ready()
                begun = moment()
                prefill.run(self._vram.base, group, outputs)
                between(EXPERTS, f"layer {layer}: {len(group)} experts", begun, moment())
        if layer + 1 < len(self._compute) and 2 * len(prefill.experts) > len(self.usage[layer]):
            self._vram.copy_ahead(layer + 1, self._most_used(layer + 1))
        for chosen in last:
            self._vram.used(layer, chosen)
        self._left = moment()

    def _most_used(self, layer: int) -> list[int]:
        """Experts of `layer` that any token has chosen so far, the most used first."""
        counts = self.usage[layer].numpy()
        most = np.argsort(-counts, kind="stable")
        used: list[int] = most[: np.count_nonzero(counts)].tolist()
        return used


def _none_copied(held: list[Held]) -> int:
    """For `VramTier.fetch`: the device reads in place what has come into RAM."""
    return 0


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
