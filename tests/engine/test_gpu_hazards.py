"""Prefill's products on Hopper, as machine code: no GPU is needed to see what it does."""

import json
import os
import subprocess
import sys

import pytest
from tests.engine.sass import check, written

EXPERTS = (
    *("q4_k:128", "q6_k:128", "q8_0:128", "bf16:128", "mxfp4:128", "q5_k:128", "fp8_g128_f32:128"),
    *("q4_k:32", "q8_0:16", "bf16:32"),
)
LINEAR = (
    *("q4_k:256:linear", "q6_k:256:linear", "q5_k:256:linear", "int4z_g128_f16:256:linear"),
    *("q4_k:128:linear", "q4_k:64:linear", "bf16:128:linear"),
)
"""A codec, and the rows of a tile."""


def test_no_register_of_a_product_under_way_is_written() -> None:
    """As triton-lang/triton#9433 has it; seen as wrong rows of eight, once in ten launches."""
    pytest.importorskip("triton", reason="kernels need triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.sass", *EXPERTS, *LINEAR],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    products = [row for row in kernels if row[1] == "product"]
    assert len(products) == 2 * len(EXPERTS) + len(LINEAR)
    for case, _, loops, from_registers, hazards in products:
        two = case in EXPERTS and int(case.split(":")[1]) > 32
        assert loops == (2 if two else 1), f"{case}: a loop for full tiles, one for half-empty ones"
        assert from_registers > 0, f"{case}: no product takes an operand from registers"
        assert not hazards, case


LOOP = (
    ".L_x_0",
    "IADD3 R{written}, P0, R5, R6, RZ",
    "HGMMA.64x128x16.F32 R24, R88, gdesc[UR20], R24, gsb0",
    "HGMMA.64x128x16.F32 R24, R92, gdesc[UR20], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, {left}",
    "@P0 BRA `(.L_x_0)",
)


@pytest.mark.parametrize(
    ("register", "left", "hazards"),
    [("92", "0x1", 1), ("95", "0x1", 1), ("88", "0x1", 0), ("92", "0x0", 0), ("96", "0x1", 0)],
)
def test_hazards_are_found_across_turns(register: str, left: str, hazards: int) -> None:
    found = check([line.format(written=register, left=left) for line in LOOP])
    assert found.products == 2
    assert len(found.hazards) == hazards


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("LDS.128 R4, [R8]", {4, 5, 6, 7}),
        ("@!P1 LDG.E.U8 R102, desc[UR18][R6.64]", {102}),
        ("IMAD.WIDE R6, R3, 0x4, R8", {6, 7}),
        ("LDGSTS.E [R39+0xd000], desc[UR18][R28.64]", set()),
        ("STS.128 [R3], R4", set()),
        ("ISETP.GE.AND P0, PT, R3, R4, PT", set()),
    ],
)
def test_registers_written(instruction: str, registers: set[int]) -> None:
    assert written(instruction) == registers
