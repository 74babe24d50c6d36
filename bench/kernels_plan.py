"""What `tierrun bench kernels` measures: which layers, codecs, tokens, devices and threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.bench.cells import Value
from tierrun.bench.kernels_layers import LAYERS, Layer, parse_layer, record_nbytes
from tierrun.bench.words import (
    checked_duration,
    each,
    fair_seconds,
    known,
    num_cores,
    thread_count,
)
from tierrun.engine.codecs.codec import is_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.ops import DECODE_TOKENS
from tierrun.io.errors import UsageError
from tierrun.tools.sources.ggml_blocks import CODECS as GGUF_CODECS

ALL_CODECS = (
    *DTYPES,
    *GGUF_CODECS.values(),
    *("nvfp4", "nvfp4_div", "fp8_g128_f32", "fp8_row_f32"),
    *("int4_g128_bf16", "int4z_g128_f16", "int8_row_f32", "int8z_g128_f16"),
)
"""Every codec, of those that come in families with any group one or two members of each."""
USUAL_CODECS = ("bf16", "q8_0", "fp8_g128_f32", "q6_k", "q4_k", "mxfp4", "nvfp4")

ALL_TOKENS = (1, 2, 4, 8, 64, 512, 2048)
USUAL_TOKENS = {"cpu": (1, 4), "cuda": (1, 8, 512, 2048)}
"""On a CPU a call with many tokens takes seconds: only when asked for."""
MOST_TOKENS = 1 << 15

USUAL_LAYERS = (LAYERS["qwen3.6-35b-a3b"],)
FULL_LAYERS = (*USUAL_LAYERS, LAYERS["glm-5"], parse_layer("4096x14336"))

INT8, FP32, EXPAND, MATVEC, MATMUL = "int8", "fp32", "expand", "matvec", "matmul"
EXPERTS_KERNELS, MATRIX_KERNELS = (INT8, FP32, EXPAND), (INT8, EXPAND)
"""The CPU's."""

MEMORY, CACHE = "memory", "cache"
"""Where a call finds its weights; in a cache it is always the same expert, or matrix."""

_BUDGET_SECONDS = 100.0
_SHORTEST, _LONGEST = 0.02, 0.3
_LASTS = 3.0
"""What a round of a cell takes, in its seconds: weights, warming up, finding out how often."""


class Case(NamedTuple):
    """One cell; `threads` of the CPU; `source` is where a call finds its weights."""

    device: str
    layer: Layer
    codec: str
    kernel: str
    tokens: int
    threads: int | None = None
    source: str = MEMORY

    def key(self) -> dict[str, Value]:
        """As a cell of the results."""
        return {
            "device": self.device,
            "layer": self.layer.name,
            "codec": self.codec,
            "kernel": self.kernel,
            "tokens": self.tokens,
            "threads": "-" if self.threads is None else self.threads,
            "from": self.source,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. None: the usual. `kernels`, `threads` and `cached` are of the CPU."""

    layers: tuple[Layer, ...] | None = None
    codecs: tuple[str, ...] | None = None
    kernels: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    cached: bool = False
    full: bool = False
    rounds: int = 5
    seconds: float | None = None

    @staticmethod
    def of(
        layers: str | None,
        codecs: str | None,
        kernels: str | None,
        tokens: str | None,
        threads: str | None,
        cached: bool,
        full: bool,
        rounds: int,
        seconds: float | None,
    ) -> "Plan":
        """From the words of a command line.

        Raises:
            UsageError: one that is not understood.
        """
        return Plan(
            each(layers, parse_layer),
            ALL_CODECS if codecs == "all" else each(codecs, _codec),
            each(kernels, lambda name: known("--kernels", name, EXPERTS_KERNELS)),
            each(tokens, _tokens),
            each(threads, thread_count),
            cached,
            full,
            rounds,
            checked_duration(seconds),
        )

    def cases(self, devices: tuple[str, ...]) -> list[Case]:
        """All cells, those of the same weights side by side."""
        layers = self.layers or (FULL_LAYERS if self.full else USUAL_LAYERS)
        codecs = self.codecs or (ALL_CODECS if self.full else USUAL_CODECS)
        return [
            case
            for device in devices
            for layer in layers
            for codec in codecs
            for case in self._cases_of(device, layer, codec)
        ]

    def _cases_of(self, device: str, layer: Layer, codec: str) -> Iterator[Case]:
        usual = ALL_TOKENS if self.full else USUAL_TOKENS[device]
        for tokens in self.tokens or usual:
            if device != "cpu":
                kernel = MATVEC if tokens <= DECODE_TOKENS else MATMUL
                yield Case(device, layer, codec, kernel, tokens)
                continue
            for threads in self.threads or (num_cores(),):
                for kernel in self.kernels or usual_kernels(layer):
                    for source in (MEMORY, CACHE) if self.cached else (MEMORY,):
                        yield Case(device, layer, codec, kernel, tokens, threads, source)

    def seconds_of(self, num_cases: int) -> float:
        """Of each round of each case; what takes longer is done once."""
        if self.seconds is not None:
            return self.seconds
        if self.full:
            return _LONGEST
        goes, budget = num_cases * self.rounds, _BUDGET_SECONDS / _LASTS
        return fair_seconds(goes, budget, _SHORTEST, _LONGEST)


def usual_kernels(layer: Layer) -> tuple[str, ...]:
    """The CPU's for `layer`."""
    return EXPERTS_KERNELS if layer.experts else MATRIX_KERNELS


def largest_record(cases: list[Case]) -> int:
    """Bytes of it; 0 without cases."""
    kinds = {(case.layer, case.codec) for case in cases}
    return max((record_nbytes(*kind) for kind in kinds), default=0)


def _codec(name: str) -> str:
    if name not in DTYPES and not is_codec(name):
        raise UsageError(f"--codecs {name}: choose from {', '.join(ALL_CODECS)}, or all")
    return name


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_TOKENS:
        raise UsageError(f"--tokens {text!r}: write numbers from 1 to {MOST_TOKENS}, like 1,8,512")
    return int(text)
