"""Products with int8 activations on the CPU: for which matrices there are any."""

from tierrun.engine.kernels.geometry import (
    DIVIDES,
    E4M3,
    ELEMENT,
    GROUP,
    KIND,
    MINIMUM,
    MINIMUM_2,
    NO_LEVEL,
    PER,
    ROW,
    SCALE,
    SCALE_2,
    SPAN,
    Geometry,
    is_dense,
)

FEW_TOKENS = 8
"""With more, codes are unpacked once for a panel of them (`int8_panel`): bits are the same."""


def obstacle(M: Geometry) -> str | None:
    """None if there are int8 kernels for the matrix; or why not."""
    if is_dense(M):
        return "plain numbers"
    if M[KIND] == E4M3:
        return "numbers of eight bits of which some are fractions"
    if M[GROUP] < SPAN // 2:
        return f"groups of {M[GROUP]} inputs"
    return None if _has_known_levels(M) else "levels in another arrangement"


def _has_known_levels(M: Geometry) -> bool:
    """Whether second levels hold for equally long groups, whole spans, or for rows."""
    pers = {level: M[level + PER] for level in _present(M, (SCALE, SCALE_2, MINIMUM, MINIMUM_2))}
    outer = {per for per in pers.values() if SPAN < per < ROW}
    if len(outer) > 1 or any(per % SPAN for per in outer):
        return False
    if any(M[level + DIVIDES] for level, per in pers.items() if per in outer):
        return False
    minima = [pers[level] for level in (MINIMUM, MINIMUM_2) if level in pers]
    return not minima or (minima[0] <= SPAN and set(minima[1:]) == outer)


def _present(M: Geometry, levels: tuple[int, ...]) -> list[int]:
    return [level for level in levels if M[level + ELEMENT] != NO_LEVEL]
