"""What a plan says, as a document: `tierrun plan --json`; docs/plan.md describes it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Part):
    """The model that is planned for."""

    name: str
    kind: str = Field(description="store, checkpoint, GGUF or configuration.")
    architecture: str
    layers: int = Field(description="Layers with experts.")
    experts: int = Field(description="Experts of a layer.")
    top_k: int = Field(description="Experts of a layer that a token uses.")
    codec: str = Field(description="Of the experts, as planned for.")
    expert_bytes: int
    resident_bytes: int
    token_bytes: int = Field(description="Bytes of experts that a token uses.")
    smallest_budget: int = Field(description="The least --ram that works, in bytes.")
    kv_bytes_per_1k: float = Field(description="Key-value cache of 1024 positions.")
    kv_source: str


class Codec(_Part):
    """The store with its experts in one codec, and how fast it would be."""

    codec: str
    expert_bytes: int
    store_bytes: int
    tokens_per_second: float = Field(description="Of decode, with the same budgets.")


class Tier(_Part):
    """A tier: its budget, what it keeps, and the share of the lookups that it serves."""

    name: Literal["hot", "warm", "drive"]
    nbytes: int
    share_of_experts: float = Field(ge=0, le=1)
    hit_rate: float = Field(ge=0, le=1)
    reason: str


class Rate(_Part):
    """A rate of the machine, and whence it is known."""

    name: str
    value: float
    source: str


class Range(_Part):
    """Between which speeds it will be, and why that is not known better."""

    least: float
    most: float
    reason: str


class Speed(_Part):
    """Seconds of a token (decode) or of a chunk (prefill), by the resource that takes them."""

    tokens_per_second: float
    among: Range | None = Field(description="null: the routing is known, or makes no difference.")
    tokens: int = Field(description="Computed at once.")
    limit: str = Field(description="The resource that takes the most.")
    seconds: dict[str, float]


class Advice(_Part):
    """A change, what it would make of decode, and how much dearer it is than the others."""

    change: str
    tokens_per_second: float
    factor: float
    cost: int = Field(description="Order of the price: 0 nothing, 1 RAM, 2 a drive, 3 a GPU.")


class Plan(_Part):
    """Everything that a plan says."""

    version: Literal[1] = 1
    tierrun: str
    model: Model
    device: Literal["cpu", "gpu"]
    context: int
    codecs: tuple[Codec, ...]
    tiers: tuple[Tier, ...]
    routing: str
    routing_source: str
    rates: tuple[Rate, ...]
    decode: Speed
    prefill: Speed
    notes: tuple[str, ...] = Field(description="How far these numbers can be trusted.")
    advice: tuple[Advice, ...] = Field(description="What helps, the best buy first; may be empty.")


class Compared(_Part):
    """A figure as predicted and as measured; `error` relative to the measured one."""

    name: str
    predicted: float
    measured: float
    error: float | None


class Check(_Part):
    """`--check`: a plan with the last run's budgets, against that run."""

    version: Literal[1] = 1
    when: str
    tokens: int
    rows: tuple[Compared, ...]
    plan: Plan
