"""What the user asks of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierrun.io.errors import UsageError


@dataclass(frozen=True, slots=True)
class Request:
    """As on the command line; `assume` by name, `codec` None: as the source has it, `routing`
    None: what is recorded, else the seed's; `measure`: the machine again, whatever is kept.

    Raises:
        UsageError: a context that is not positive.
    """

    source: str
    vram: str = "auto"
    ram: str = "auto"
    directories: Sequence[Path] = ()
    context: int = 4096
    codec: str | None = None
    routing: str | None = None
    device: str = "auto"
    assume: str | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UsageError(f"--context {self.context}: must be at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device {self.device}: a plan is for auto, cpu or cuda")
