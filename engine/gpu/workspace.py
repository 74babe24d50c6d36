"""What a chunk of a prompt needs of a device's memory: measured by forward passes without experts.

The key-value cache is made for a chunk (windows have room for one more), so a size that is tried
has a cache of its own.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from tierrun.engine.gpu.cache import FixedCache, GrowingCache, make_cache
from tierrun.engine.gpu.context import DeviceRunner
from tierrun.engine.gpu.experts import NoExperts
from tierrun.engine.gpu.gauge import Gauge
from tierrun.io.store import Manifest, RecordClass
from tierrun.tiers.budget import DeviceFigures

log = logging.getLogger(__name__)

_SMALL = (512, 1024)
"""Chunks whose needs are a line through which those of larger ones are estimated. What grows with
the square of a chunk (masks) is measured with the chunk that was chosen."""

AnyCache = FixedCache | GrowingCache
_Found = TypeVar("_Found")


class Workspace(NamedTuple):
    """Bytes that a forward pass needs in a short context, and more per position of a longer one."""

    nbytes: int
    per_position: float = 0.0

    def at(self, positions: int) -> int:
        """Bytes in a context that is longer by so many."""
        return self.nbytes + int(self.per_position * positions)


class Measured(NamedTuple):
    """A cache, allocated, and what passes over it need besides, experts included."""

    cache: AnyCache
    workspace: Workspace


class Estimate(NamedTuple):
    """About what chunks take of the device, by their tokens, beside a short context."""

    taken: Mapping[int, int]
    figures: DeviceFigures


class Workspaces:
    """Measures chunks of prompts of one model, whose experts are not there yet.

    Caches are fp16, as llama.cpp keeps them, where the architecture can; else fp32; of the model's
    own making where a fixed one does not fit it. They begin with room for `least` positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        manifest: Manifest,
        device: torch.device,
        capacity: int,
        least: int,
        gauge: Gauge,
    ) -> None:
        self._model, self._manifest, self._device = model, manifest, device
        self._capacity, self._least, self._gauge = capacity, least, gauge
        self._dtypes = [torch.float16, torch.float32]
        self._is_own = False

    def measure(self, chunk: int) -> Measured:
        """A cache for chunks of so many tokens, and what such a chunk and a token after it need.

        Raises:
            torch.OutOfMemoryError: they do not fit; nothing is left of the attempt.
        """
        cache, (nbytes, per_position) = self._in_cache(chunk, lambda it: self._needs(it, chunk))
        return Measured(cache, Workspace(nbytes + self._experts_bytes(chunk), per_position))

    def estimate(self, sizes: Sequence[int]) -> Estimate:
        """What chunks of `sizes` take, by two small ones, and what is free beside those.

        Raises:
            torch.OutOfMemoryError: as `measure`.
        """
        cache, peaks = self._in_cache(_SMALL[-1], self._small_peaks)
        slope = max(0, peaks[1] - peaks[0]) / (_SMALL[1] - _SMALL[0])
        taken = {}
        for size in sizes:
            passes = max(0, int(peaks[0] + slope * (size - _SMALL[0])))
            held = cache.nbytes_more(max(cache.room, min(self._capacity, 2 * size)))
            taken[size] = passes + self._experts_bytes(size) + held
        return Estimate(taken, self._gauge.figures())

    def release(self) -> None:
        """What earlier measurements had goes back to the device."""
        gc.collect()
        self._gauge.figures()

    def _in_cache(
        self, chunk: int, measure: Callable[[AnyCache], _Found]
    ) -> tuple[AnyCache, _Found]:
        """Measure something with a new cache for `chunk`, of the first kind with which it works."""
        while self._dtypes:
            dtype = self._dtypes[0]
            cache = make_cache(
                self._model.config, self._capacity, chunk, dtype, self._device, self._least
            )
            if isinstance(cache, GrowingCache):
                break
            try:
                return cache, measure(cache)
            except (RuntimeError, ValueError, TypeError) as error:
                if _is_out_of_memory(error):
                    raise torch.OutOfMemoryError(str(error)) from error
                reason = str(error).strip().splitlines()[0]
                log.info("a fixed key-value cache in %s does not fit: %s", dtype, reason)
                del self._dtypes[0]
        self._leave_to_model()
        grown = GrowingCache()
        return grown, measure(grown)

    def _leave_to_model(self) -> None:
        if self._is_own:
            return
        if not self._dtypes:
            log.warning("this model makes its own key-value cache: decode runs without CUDA graphs")
        self._dtypes, self._is_own = [], True
        own: str = self._model.get_correct_attn_implementation(None)
        self._model.set_attn_implementation(own)

    # -- passes ---------------------------------------------------------------------------------

    def _needs(self, cache: AnyCache, chunk: int) -> tuple[int, float]:
        """Bytes that passes over `cache` need, experts apart, and more per position before them."""
        runner, prompt = self._runner(cache), self._prompt(chunk)
        nbytes = max(self._peak(runner, tokens) for tokens in (prompt, [0]))
        per_position = self._peak_per_position(runner, prompt)
        cache.reset()
        return nbytes, per_position

    def _small_peaks(self, cache: AnyCache) -> list[int]:
        """Bytes that small chunks need; a first pass, which also loads kernels, does not count."""
        runner, found = self._runner(cache), list[int]()
        for chunk in (_SMALL[0], *_SMALL):
            found.append(self._peak(runner, self._prompt(chunk)))
            cache.reset()
        return found[1:]

    def _runner(self, cache: AnyCache) -> DeviceRunner:
        return DeviceRunner(self._model, NoExperts(self._model), cache, self._device, graphs=False)

    def _prompt(self, chunk: int) -> list[int]:
        return [0] * max(1, min(chunk, self._capacity - 1))

    def _peak_per_position(self, runner: DeviceRunner, prompt: list[int]) -> float:
        """How much more a chunk needs at the end of the room, by position before it."""
        cache = runner.cache
        if self._gauge.interpreted or cache.room in (0, self._capacity):
            return 0.0
        cache.reset()
        peaks = list[int]()
        while cache.length + len(prompt) <= cache.room:
            start = cache.length
            peaks.append(self._peak(runner, prompt))
        return max(0, peaks[-1] - peaks[0]) / max(1, start)

    def _peak(self, runner: DeviceRunner, tokens: list[int]) -> int:
        """The most bytes that a forward pass of `tokens` takes at once, besides the cache."""
        before = runner.cache.nbytes
        peak = self._gauge.peak(lambda: runner.forward(tokens, last_only=True))
        return max(0, peak - (runner.cache.nbytes - before))

    def _experts_bytes(self, tokens: int) -> int:
        """Bytes between the experts' two products, for a chunk."""
        return max(
            min(tokens, self._capacity) * layer.top_k * _bytes_per_assignment(record)
            for number, layer in enumerate(self._manifest.layers)
            for record in (self._manifest.class_of(number),)
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Libraries and launches that find no memory say so in words of their own."""
    found = isinstance(error, torch.OutOfMemoryError)
    return found or any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def _bytes_per_assignment(record: RecordClass) -> int:
    """fp32 of every product's rows, and as much again where the module applies its own gate."""
    rows = sum(matrix.shape[0] for matrix in record.matrices if len(matrix.shape) == 2)
    return 2 * 4 * rows
