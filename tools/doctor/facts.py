"""What the doctor's child processes find out, as they print it."""

from pydantic import BaseModel, ConfigDict

LIFETIME = 20
"""Seconds after which a child ends itself: its parent may have been killed."""


class Facts(BaseModel):
    """A document on one line of a child's output."""

    model_config = ConfigDict(frozen=True)


class Imports(Facts):
    """Why a package cannot be loaded; None: it can."""

    numba: str | None
    triton: str | None


class Gpu(Facts):
    """A GPU as CUDA sees it. Bytes are those that this child was offered; `obstacle`: why tierrun
    cannot compute on it; `address`: where it is on the PCI bus (`0000:01:00.0`)."""

    name: str
    capability: tuple[int, int]
    free: int | None
    total: int | None
    address: str | None
    obstacle: str | None


class SmiLink(Facts):
    """A PCIe link as nvidia-smi tells it, and whether copies were under way. `most_…`: of GPU and
    slot together."""

    address: str
    generation: int | None
    width: int | None
    most_generation: int | None
    most_width: int | None
    loaded: bool


class Pinned(Facts):
    """Bytes that could be pinned, and what ended it before the cap that the child sets itself."""

    nbytes: int
    obstacle: str | None


class Gds(Facts):
    """Whether kvikio reads natively into the GPU, and why (not); `usable`: whether at all."""

    usable: bool
    native: bool
    reason: str


class Cuda(Facts):
    """Everything about torch and CUDA, as far as the child came before it ended.

    `built_for` is the CUDA version of torch's build, `supports` what the driver supports (13000 for
    13.0), `visible` the environment's CUDA_VISIBLE_DEVICES, `obstacle` why CUDA cannot be used.
    """

    torch: str | None = None
    torch_error: str | None = None
    built_for: str | None = None
    supports: int | None = None
    visible: str | None = None
    obstacle: str | None = None
    gpus: tuple[Gpu, ...] | None = None
    pinned: Pinned | None = None
    links: tuple[SmiLink, ...] | None = None
    gds: Gds | None = None
