"""A model on a GPU: resident weights and hot experts in VRAM, the other experts in pinned RAM.

Memory is taken in this order, so that what is left for experts is known and not guessed: resident
weights, the key-value cache of a short context, the workspace of a prompt's chunk (measured by
forward passes without experts, see `tierrun.engine.gpu.chunks`), then the hot tier, which gives
back what a longer context needs (see `tierrun.engine.gpu.room`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import xxhash

from tierrun.engine.architecture import continues, experts_modules
from tierrun.engine.backend import chosen_reader, open_queue
from tierrun.engine.context import Context
from tierrun.engine.gpu import compiling
from tierrun.engine.gpu.attention import ATTENTION
from tierrun.engine.gpu.cache import LEAST_ROOM, FixedCache, GrowingCache
from tierrun.engine.gpu.chunks import ChunkChooser, Experts, Settled
from tierrun.engine.gpu.context import DeviceContext, DeviceRunner
from tierrun.engine.gpu.experts import DEVICE_EXPERTS, DeviceExperts, forget
from tierrun.engine.gpu.gauge import CudaGauge, Gauge, NoGauge
from tierrun.engine.gpu.hostlane import HostLane
from tierrun.engine.gpu.norms import fuse_norms
from tierrun.engine.gpu.ops import DECODE_TOKENS
from tierrun.engine.gpu.rates import measure_rates
from tierrun.engine.gpu.room import ContextRoom
from tierrun.engine.gpu.routers import fuse_routers
from tierrun.engine.gpu.weights import to_device
from tierrun.engine.gpu.workspace import Workspace, Workspaces
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.kernels.host import supported
from tierrun.engine.model import load_model
from tierrun.engine.options import Options
from tierrun.engine.resident import ResidentWeights
from tierrun.engine.storage import measured_paths, open_straight
from tierrun.io.errors import BudgetError
from tierrun.io.extent import format_bytes
from tierrun.io.store import ExpertKey, Store
from tierrun.tiers.arbiter import Arbiter
from tierrun.tiers.budget import (
    DeviceNeeds,
    resolve_device_vram,
    resolve_ram,
    resolve_vram,
    smallest_budget,
)
from tierrun.tiers.copies import Copies, CudaCopies, HostCopies
from tierrun.tiers.lanes import Cost, Lanes
from tierrun.tiers.ledger import Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.policy import make_policy
from tierrun.tiers.residency import Residency
from tierrun.tiers.setup import (
    DeviceTiers,
    device_figures,
    make_device_tiers,
    prefill_window,
    spare_bytes,
)
from tierrun.tiers.slab import host_bytes
from tierrun.tiers.slottable import InRam
from tierrun.tiers.straight import StraightReads
from tierrun.tiers.tier import Tier
from tierrun.tiers.vram import VramTier

log = logging.getLogger(__name__)


class GpuBackend:
    """See `Backend`. `device` may be the CPU where kernels are interpreted (tests).

    The context has room for `least_room` tokens at first, and grows to `capacity`. Prompts go
    through it in chunks of `chunk` tokens. `gauge` stands in for the device's own memory.
    """

    def __init__(
        self,
        store: Store,
        weights: ResidentWeights,
        options: Options,
        ledger: Ledger,
        device: torch.device,
        capacity: int,
        least_room: int = LEAST_ROOM,
        gauge: Gauge | None = None,
    ) -> None:
        torch.set_num_threads(options.num_threads)
        self._options, self._device, self._capacity = options, device, capacity
        self._store = store
        weights.verify()
        self.model = load_model(
            store, weights, CpuKernels(), experts=DEVICE_EXPERTS, attention=ATTENTION
        )
        with _room_for("the resident weights"):
            resident = to_device(self.model, device)
            fused = fuse_norms(self.model), fuse_routers(self.model)
            log.debug("fused %d norms and %d routers", *fused)
        compiles = self._compiles(store)
        if compiles:
            log.info("the context is allocated at once: layers are compiled for one shape of it")
        least = capacity if compiles else min(capacity, least_room)
        reader = chosen_reader(store, options)
        with _room_for(f"a context of {least} tokens with a chunk of a prompt"):
            self.chunk, (self._cache, workspace) = self._settle_chunk(least, gauge)
        log.info(
            "VRAM: resident weights %s, %s, workspace %s",
            format_bytes(resident),
            _described(self._cache, capacity),
            format_bytes(workspace.nbytes),
        )
        tiers, copies = self._make_tiers(store, workspace.nbytes)
        self.queue = open_queue(store, reader, options)
        self.residency = Residency(
            Placement(
                store.manifest,
                tiers.none,
                tiers.warm,
                make_policy(options.policy, store.manifest.num_experts),
                self.queue,
                ledger,
            )
        )
        window = prefill_window(store, tiers.warm, options.depth)
        in_ram = self._in_ram(tiers)
        self.vram = VramTier(self.residency, tiers.hot, copies, window, in_ram)
        self.vram.straight = self._straight()
        self._warm = tiers.warm
        self.hook = DeviceExperts(self.model, store.manifest, self.vram, device)
        self.lanes: Lanes | None = None
        self._host = self._host_lane(ledger, tiers)
        self._runner = DeviceRunner(
            self.model,
            self.hook,
            self._cache,
            device,
            graphs=options.graphs,
            compiled=self._compiled(store),
        )
        self._room = ContextRoom(
            self._cache,
            self.vram,
            Arbiter(ledger.counters),
            self._spare_bytes(workspace),
            workspace.per_position,
            self._runner.forget_recordings,
        )
        self._say_longest()

    def _settle_chunk(self, least: int, gauge: Gauge | None) -> Settled:
        """The tokens of a chunk, and the cache for them."""
        options, manifest, device = self._options, self._store.manifest, self._device
        if gauge is None:
            gauge = CudaGauge(device) if device.type == "cuda" else NoGauge()
        ram = resolve_ram(options.ram, 0).nbytes
        vocabulary = self.model.config.get_text_config().vocab_size
        return ChunkChooser(
            options,
            self._capacity,
            Experts(manifest.expert_bytes, smallest_budget(manifest), ram),
            Workspaces(self.model, manifest, device, self._capacity, least, gauge),
            gauge,
            lambda: measure_rates(self._store, device, vocabulary),
        ).settle()

    def _straight(self) -> StraightReads | None:
        """Reads past the warm tier, where they are faster than through it."""
        if self._device.type != "cuda":
            return None
        measured = measured_paths(self._store, self._options, self._device)
        if measured.to_device != "gds":
            return None
        log.info("experts not expected back go straight into VRAM (%s)", measured.reason)
        return open_straight(self._store, self._options, self._device, measured.to_device)

    def _in_ram(self, tiers: DeviceTiers) -> InRam:
        """Who computes what RAM has and VRAM has not, without a copy."""
        if tiers.in_place:
            return InRam.IN_PLACE
        log.warning("the GPU cannot read RAM in place: it gets copies of what VRAM lacks")
        return InRam.HIDDEN if self._lane_mode == "gpu" else InRam.FOR_HOST

    @property
    def _lane_mode(self) -> str:
        return "gpu" if self._options.exact else self._options.lanes

    def _host_lane(self, ledger: Ledger, tiers: DeviceTiers) -> HostLane | None:
        """The CPU's part in what VRAM lacks, calibrated; None where it has none, said why."""
        if self._lane_mode == "gpu" or tiers.hot.num_slots >= self._store.manifest.num_experts:
            return None
        layouts, manifest = self.hook.layouts, self._store.manifest
        obstacle = next(filter(None, map(supported, dict.fromkeys(layouts))), None)
        if obstacle is not None:
            log.warning("the CPU computes none of what VRAM lacks: %s", obstacle)
            return None
        top_k = max(layer.top_k for layer in manifest.layers)
        host = HostLane(
            layouts,
            [manifest.class_of(layer).nbytes for layer in range(len(layouts))],
            DECODE_TOKENS,
            DECODE_TOKENS * top_k,
            self._options.num_threads,
            ledger.counters,
            pinned=self._device.type == "cuda",
        )
        gpu = Cost(start=10e-6, slope=1 / 25e9)  # where it is not measured
        for number in range(len(manifest.classes)):
            layer = self.residency.placement.class_of_layer.index(number)
            free = _free_slots(tiers.warm, number, top_k)
            host.calibrate(free, layer)
            if tiers.in_place:
                self.hook.calibrate(gpu, free, layer)
        self.lanes = Lanes(gpu, host.cost, self._lane_mode)
        self.hook.use_lanes(host, self.lanes)
        log.info("lanes: experts in RAM take %s", self.lanes.text())
        return host

    def _make_tiers(self, store: Store, workspace: int) -> tuple[DeviceTiers, Copies]:
        """Budgets become tiers; what the model needs besides is allocated already."""
        options, device = self._options, self._device
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()  # so that each chunk of the slab is memory of its own
            needs = DeviceNeeds(0, 0, workspace)
            vram = resolve_device_vram(options.vram, device_figures(device), needs)
        else:
            vram = resolve_vram(options.vram, "cpu")
        ram = resolve_ram(options.ram, 0)
        tiers = make_device_tiers(store.manifest, vram, ram, device, strict=options.strict)
        return tiers, CudaCopies(device) if cuda else HostCopies()

    def _spare_bytes(self, workspace: Workspace) -> Callable[[], int]:
        """What of the device nobody needs. A CPU that stands in for one is full from the start."""
        device, cache, vram = self._device, self._cache, self.vram
        whole, least = vram.nbytes + cache.nbytes, cache.room
        if device.type != "cuda":
            return lambda: whole - vram.nbytes - cache.nbytes
        return lambda: spare_bytes(device, workspace.at(cache.room - least))

    def _say_longest(self) -> None:
        longest = self._room.longest()
        if isinstance(self._cache, FixedCache) and longest < self._capacity:
            log.warning(
                "of a context of %d tokens (-c) only %d fit into VRAM beside the experts of a "
                "layer; --vram auto leaves the most",
                self._capacity,
                longest,
            )

    @property
    def hot_bytes(self) -> int:
        return self.vram.nbytes

    @property
    def context_bytes(self) -> int:
        """Keys and values, with the room that they have now."""
        return self._cache.nbytes

    @property
    def warm_bytes(self) -> int:
        return self._warm.slab.nbytes

    @property
    def num_segments(self) -> int:
        """CUDA graphs per token; 0 while decode is eager."""
        return self._runner.num_segments

    def context(self) -> Context:
        """See `Backend`."""
        replayed = self.chunk if continues(self.model) else self._capacity
        return DeviceContext(self._runner, replayed, self._room)

    def warm_up(self, order: Iterable[ExpertKey]) -> None:
        """See `Backend`."""
        self.vram.warm_up(order)

    def damaged(self) -> list[ExpertKey]:
        """The experts in VRAM whose bytes are not the store's, by their checksums; reads all."""
        return [key for key, record in self.vram.records() if not self._is_whole(key, record)]

    def _is_whole(self, key: ExpertKey, record: torch.Tensor) -> bool:
        found = xxhash.xxh3_64_intdigest(host_bytes(record.cpu()))
        return found == self._store.locate(key)[0].checksum

    def check_integrity(self) -> None:
        """See `Backend`."""
        self.vram.check_integrity()

    def close(self) -> None:
        """See `Backend`."""
        if self.lanes is not None:
            log.info("lanes: experts in RAM took %s", self.lanes.text())
        self.vram.close()
        if self.vram.straight is not None:
            self.vram.straight.close()
        self.queue.close()
        self._warm.slab.release()
        if self._host is not None:
            self._host.close()
        forget(experts_modules(self.model).values())

    def _compiles(self, store: Store) -> bool:
        """Whether the decoder layers are to be compiled: each room of the context would be anew."""
        choice = "off" if self._options.exact else self._options.compile
        on_gpu = self._device.type == "cuda"
        return on_gpu and compiling.wanted(choice, store.manifest.fingerprint)

    def _compiled(self, store: Store) -> compiling.CompiledLayers | None:
        """The decoder layers compiled, where that is wanted."""
        if not self._compiles(store):
            return None
        log.warning("compiling the model's layers; the first time takes a minute or two")
        return compiling.CompiledLayers(self.model, store.manifest.fingerprint)


def _free_slots(tier: Tier, record_class: int, count: int) -> list[torch.Tensor]:
    """The memory of some slots that hold nothing yet."""
    slots = np.flatnonzero(tier.record_class == record_class)[:count]
    return [tier.memory(slot) for slot in slots.tolist()]


def _described(cache: FixedCache | GrowingCache, capacity: int) -> str:
    """The cache and how it goes on, for the log."""
    if isinstance(cache, GrowingCache):
        return "a key-value cache of the model's own"
    held = f"key-value cache {format_bytes(cache.nbytes)} for {cache.room} tokens"
    if cache.room == capacity:
        return f"{held}, all of the context at once{'' if cache.has_buckets else ' (indexed)'}"
    more = format_bytes(cache.nbytes_more(capacity))
    return f"{held} ({more} more for all {capacity}: from the experts, when they are needed)"


@contextmanager
def _room_for(what: str) -> Iterator[None]:
    """Out of memory, in one line that says what for and what is there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise BudgetError(
            f"{what} does not fit: the GPU has {format_bytes(free)} free of {format_bytes(total)}; "
            "close what else uses it, ask for less (-c, -ub), or use --device cpu"
        ) from error
