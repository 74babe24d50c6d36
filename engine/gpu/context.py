"""Contexts on the device: one key-value cache, and the forward pass as graphs where that works."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from tierrun.engine.architecture import keeps_few_logits
from tierrun.engine.gpu.cache import FixedCache, GrowingCache
from tierrun.engine.gpu.compiling import CompiledLayers
from tierrun.engine.gpu.experts import DeviceExperts, NoExperts
from tierrun.engine.gpu.graphs import SegmentedGraph
from tierrun.engine.gpu.ops import DECODE_TOKENS
from tierrun.engine.gpu.room import ContextRoom
from tierrun.io.errors import DeviceError

log = logging.getLogger(__name__)

_GIVEN_BACK = 256 << 20
"""Bytes that are given back when the device runs out of memory; twice as many the next time."""


class _Recording(NamedTuple):
    """The graphs of one shape of cache, and the logits that their replay fills."""

    graph: SegmentedGraph
    logits: torch.Tensor


class DeviceRunner:
    """The forward pass of one model on the device, over one cache.

    A single token goes through the recorded graph once there is one; `graphs` False, or an
    architecture whose forward cannot be recorded, means eager passes (said once, with the reason).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: DeviceExperts | NoExperts,
        cache: FixedCache | GrowingCache,
        device: torch.device,
        *,
        graphs: bool,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._model, self._experts, self.cache = model, experts, cache
        self._few_logits = keeps_few_logits(model)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._device = device
        self._compiled = compiled
        if compiled is not None:
            cache.has_buckets = False  # each would be compiled anew
        self._graphs = graphs and device.type == "cuda" and cache.fits_graphs
        self._recorded: dict[int, _Recording] = {}
        self.owner: object | None = None

    @property
    def num_segments(self) -> int:
        """Graphs per token; 0 while decode is eager."""
        return max((r.graph.num_segments for r in self._recorded.values()), default=0)

    def forget_recordings(self) -> None:
        """No pass that was recorded is replayed again: what it reads or writes has moved."""
        self._recorded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """The logits after each of `tokens`, or the last: fp32 [n, vocab] on the CPU.

        Raises:
            DeviceError: the device failed.
            torch.OutOfMemoryError: as it says; the context needs a reset.
        """
        count, fixed = len(tokens), len(tokens) <= DECODE_TOKENS
        self.cache.begin(count, fixed=fixed)
        try:
            with torch.inference_mode(), _device_errors():
                logits = self._run(tokens, last_only)
        except BaseException:
            self._experts.abandon()
            raise
        self.cache.end(count)
        return logits

    def _run(self, tokens: Sequence[int], last_only: bool) -> torch.Tensor:
        if len(tokens) == 1 and self.cache.length > 0:
            self._token.fill_(tokens[0])
            return self._decode()[0].float().cpu()
        ids = torch.tensor([list(tokens)], device=self._device)
        return self._pass(ids, last_only)[0].float().cpu()

    def _decode(self) -> torch.Tensor:
        """One token through its graph, which is recorded after a first eager pass of its shapes."""
        recording = self._recorded.get(self.cache.bucket)
        if recording is not None:
            recording.graph.replay()
            return recording.logits
        with self._compiled.active() if self._compiled else nullcontext():
            logits = self._pass(self._token, True)
            if self._graphs:
                self._record()
        return logits

    def _record(self) -> None:
        """Record the pass; nothing in it is executed, so the context stays as it is."""
        graph = SegmentedGraph()
        self._experts.cut = graph.cut
        try:
            logits = graph.record(lambda: self._pass(self._token, True))
            self._recorded[self.cache.bucket] = _Recording(graph, logits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graphs = False
            reason = str(error).strip().splitlines()[0]
            log.warning("decode runs without CUDA graphs: %s", reason)
        finally:
            self._experts.cut = None

    def _pass(self, ids: torch.Tensor, last_only: bool) -> torch.Tensor:
        """The model's own forward: [1, n] → [1, n or 1, vocab]."""
        keep = {"logits_to_keep": 1} if last_only and self._few_logits else {}
        forward: Callable[..., Any] = self._model
        output = forward(input_ids=ids, past_key_values=self.cache.held, use_cache=True, **keep)
        self.cache.keep(output.past_key_values)
        logits: torch.Tensor = output.logits
        return logits


class DeviceContext:
    """One sequence on a runner that several take turns on.

    The device holds one cache: a context that comes back after another has used it computes its
    past again, at the speed of a prompt. `room` is what it grows into.
    """

    def __init__(self, runner: DeviceRunner, chunk: int, room: ContextRoom) -> None:
        self._runner, self._chunk, self._room = runner, chunk, room
        self._past: list[int] = []

    def reserve(self, length: int, *, kept: int) -> None:
        """See `tierrun.engine.context.Context`."""
        begins = kept == 0 or self._runner.owner is not self
        if begins and self._room.shrink_to(length):
            self._runner.owner = None
        self._room.grow_to(length)

    def forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """See `tierrun.engine.context.Context`.

        Where the device's memory runs out (another process wants it), the hot tier gives some back
        and the pass is made once more, from the beginning of the context.
        """
        length, wanted = len(self._past) + len(tokens), _GIVEN_BACK
        self._room.grow_to(length)
        while True:
            try:
                if self._runner.owner is not self:
                    self._take_over()
                logits = self._runner.forward(tokens, last_only=last_only)
            except torch.OutOfMemoryError as error:
                self._runner.owner = None
                if not self._room.relieve(wanted, length):
                    reason = str(error).split(". ")[0]
                    raise DeviceError(
                        f"the GPU is out of memory: {reason}; lower -c or -ub, or close what "
                        "else uses it"
                    ) from error
                wanted *= 2
            else:
                self._past += tokens
                return logits

    def reset(self) -> None:
        """See `tierrun.engine.context.Context`."""
        self._past = []
        if self._runner.owner is self:
            self._runner.owner = None

    def _take_over(self) -> None:
        self._runner.cache.reset()
        self._runner.owner = self
        for first in range(0, len(self._past), self._chunk):
            self._runner.forward(self._past[first : first + self._chunk], last_only=True)


@contextmanager
def _device_errors() -> Iterator[None]:
    """What the device does wrong, in one line."""
    try:
        yield
    except torch.AcceleratorError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"the GPU failed: {reason}; the store is untouched") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"compiling failed: {reason}; use --compile off") from error
