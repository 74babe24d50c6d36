"""What Hopper's machine code must not do: write a register that a product under way still reads.

Run as a program it compiles kernels for a Hopper that need not be there and prints, per kernel, how
many loops have products, how many of those take an operand from registers, and which instructions
endanger them. Arguments are `codec:block` (the products of experts) or `codec:block:linear`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_JUMP = re.compile(r"BRA `\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"HGMMA\S* R\d+, (?:R(\d+), )?gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_WRITTEN = re.compile(r"(?:@!?U?P\w+\s+)?(\S+)\s+(?:U?P\w+, )*R(\d+)")
_WRITES_NONE = re.compile(r"ST|RED|LDGSTS|BRA|BAR|EXIT|HGMMA|WARP|[A-Z]*SETP|PLOP")


class Found(NamedTuple):
    """Loops with products, those with an operand in registers, the instructions that harm them."""

    loops: int
    products: int
    hazards: list[str]


def listing(cubin: bytes) -> list[str]:
    """Instructions and labels."""
    from triton import knobs

    with TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(_lines(text))


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        found = _INSTRUCTION.match(line) or _LABEL.match(line)
        if found:
            yield found.group(1)


def check(lines: Sequence[str]) -> Found:
    """Two turns of every loop that has products."""
    places = {line: number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    loops, products, hazards = 0, 0, list[str]()
    for end, line in enumerate(lines):
        jump = _JUMP.search(line)
        start = places.get(jump.group(1), end) if jump else end
        body = lines[start:end]
        if any(_PRODUCT.match(instruction) for instruction in body):
            more, harm = _check_loop(body)
            loops, products, hazards = loops + 1, products + more, hazards + harm
    return Found(loops, products, hazards)


def _check_loop(body: Sequence[str]) -> tuple[int, list[str]]:
    under_way, products, hazards = list[set[int]](), 0, list[str]()
    for line in [*body, *body]:
        if written(line) & set().union(*under_way):
            hazards.append(line)
        product, wait = _PRODUCT.match(line), _WAIT.match(line)
        if product:
            first = product.group(1)
            under_way.append(set(range(int(first), int(first) + 4)) if first else set())
            products += first is not None
        elif wait:
            left = int(wait.group(1), 16)
            under_way = under_way[max(0, len(under_way) - left) :] if left else []
    return products // 2, hazards


def written(instruction: str) -> set[int]:
    """The registers that are its result."""
    found = _WRITTEN.match(instruction)
    if found is None or _WRITES_NONE.match(found.group(1)):
        return set()
    operation, first = found.group(1), int(found.group(2))
    count = 4 if ".128" in operation else 2 if re.search(r"\.64|\.WIDE", operation) else 1
    return set(range(first, first + count))


# -- compiling, in a process of its own: the tests' has Triton interpret --------------------------


def compiled(call: Callable[[], object]) -> list[tuple[str, bytes]]:
    """The kernels that `call` would launch, by name, for a Hopper; nothing is launched."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Driver())  # type: ignore[no-untyped-call]
    kept: list[tuple[str, bytes]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kept.append((self.__name__, kernel.asm["cubin"]))
        return kernel

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return kept


def matrix(codec: str, rows: int, columns: int) -> Any:
    """The geometry of a matrix in a codec, a dense one or a packed one."""
    from tierrun.engine.codecs.codec import find_codec
    from tierrun.engine.codecs.dense import DTYPES
    from tierrun.engine.kernels.geometry import dense_geometry, packed_geometry

    shape = rows, columns
    dense = codec in DTYPES
    return dense_geometry(codec, shape) if dense else packed_geometry(find_codec(codec), shape)


def expert_products(codec: str, block: int) -> None:
    """Both products of some experts, with tiles of `block` tokens."""
    import torch

    from tierrun.engine.kernels import matmul
    from tierrun.engine.kernels.matvec import Gate

    up, down = matrix(codec, 1536, 1024), matrix(codec, 1024, 768)
    grouping = matmul.group(torch.zeros(4, 2, dtype=torch.int64), 2)._replace(block=block)
    slab, slots = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    place = grouping, grouping.tiles(range(2)), slab, slots
    x, h = torch.zeros(4, 1024, dtype=torch.float16), matmul.hidden(grouping, down)
    gate_up, second = matmul.Operand(up), matmul.Operand(down, 1024)
    matmul.gate_up(x, *place, gate_up, Gate("silu"), down, h)
    matmul.down(h, *place, second, torch.zeros(8, 1024))


def linear_product(codec: str, block: int) -> None:
    """The product of a resident matrix, with programs of `block` rows."""
    import torch

    from tierrun.engine.kernels import matmul

    data = torch.zeros(1 << 10, dtype=torch.uint8)
    matmul.linear(torch.zeros(block, 1024), data, matrix(codec, 1536, 1024), block=block)


def main() -> None:
    sys.path.insert(0, os.getcwd())
    from tierrun.engine.kernels import matmul

    matmul._is_hopper = lambda _: True  # type: ignore[assignment]
    matmul._shared_memory = lambda _: 232448  # type: ignore[assignment]
    for argument in sys.argv[1:]:
        codec, block, *kind = argument.split(":")
        call = partial(linear_product if kind else expert_products, codec, int(block))
        for name, cubin in compiled(call):
            print(json.dumps([argument, name, *check(listing(cubin))]))


if __name__ == "__main__":
    main()
