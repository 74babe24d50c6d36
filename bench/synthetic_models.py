"""Which models a synthetic store can be like, and how its tokens choose their experts.

Every store is a Qwen3-MoE with the named model's routed experts: number, size, how many of them a
token takes, in as many layers as have them. Hidden size and attention heads are the model's too;
attention of another kind (latent, linear) becomes grouped-query attention of 128-wide heads.
Shared experts and dense layers are left out, and the vocabulary is 32000, so that what differs
between models is what streams. `small` is nobody's: 64 experts a layer, for machines without much.
"""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from tierrun.bench.checkpoint import Shape
from tierrun.io.errors import UsageError


class Routing(StrEnum):
    """How tokens choose, of the weights and of the stream of tokens together.

    `seed` is skewed and local: the top fifth of the experts takes about 85 % of the lookups, and
    tokens drift. `local` is flat in the long run, but what was used lately is used again. `uniform`
    is neither: the worst case, in which every cache hits what it holds of the whole.
    """

    UNIFORM = "uniform"
    SEED = "seed"
    LOCAL = "local"


class Model(NamedTuple):
    """A model's shape, and the codec in which its experts are usually run."""

    shape: Shape
    codec: str = "q4_k"

    def routed(self, routing: Routing) -> Shape:
        """The shape; only `seed` has popular experts."""
        return self.shape if routing is Routing.SEED else replace(self.shape, sigma=0.0)


_VOCABULARY = 32000


def _shape(
    layers: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    attention: tuple[int, int, int],
    sigma: float,
) -> Shape:
    return Shape(layers, experts, top_k, hidden, intermediate, *attention, _VOCABULARY, sigma=sigma)


# Attention: heads, key-value heads, head size. Sigma: what makes the top fifth take 80 to 88 %.
MODELS: Mapping[str, Model] = {
    "small": Model(Shape()),
    "qwen3-30b-a3b": Model(_shape(48, 128, 8, 2048, 768, (32, 4, 128), 1.35)),
    "qwen3.6-35b-a3b": Model(_shape(40, 256, 8, 2048, 512, (32, 4, 128), 0.95)),
    "qwen3.8-flash-next": Model(_shape(48, 512, 10, 2560, 640, (24, 2, 256), 0.98)),
    "gpt-oss-20b": Model(_shape(24, 32, 4, 2880, 2880, (64, 8, 64), 2.23), "mxfp4"),
    "gpt-oss-120b": Model(_shape(36, 128, 4, 2880, 2880, (64, 8, 64), 1.09), "mxfp4"),
    "gemma-4-26b-a4b": Model(_shape(30, 128, 8, 2816, 704, (16, 8, 256), 1.35)),
    "glm-5": Model(_shape(75, 256, 8, 6144, 2048, (48, 8, 128), 0.95)),
    "deepseek-v4-flash": Model(_shape(43, 256, 6, 4096, 2048, (32, 8, 128), 0.98), "mxfp4"),
    "deepseek-v4-pro": Model(_shape(61, 384, 6, 7168, 3072, (56, 8, 128), 0.89), "mxfp4"),
    "minimax-m2": Model(_shape(62, 256, 8, 3072, 1536, (48, 8, 128), 0.95)),
    "step-3.5-flash": Model(_shape(42, 288, 8, 4096, 1280, (64, 8, 128), 1.03)),
}


def find_model(name: str) -> tuple[str, Model]:
    """A model by its name, or by a beginning that only one has; its whole name, and what it is.

    Raises:
        UsageError: none, or several; names them.
    """
    wanted = name.lower()
    found = (
        [wanted] if wanted in MODELS else [known for known in MODELS if known.startswith(wanted)]
    )
    if len(found) != 1:
        said = "several begin so" if found else "not known"
        raise UsageError(f"--like {name}: {said}; choose from {', '.join(found or MODELS)}")
    return found[0], MODELS[found[0]]


def find_routing(name: str) -> Routing:
    """Raises UsageError: not one of them; names them."""
    try:
        return Routing(name)
    except ValueError:
        raise UsageError(f"--routing {name}: choose from {', '.join(Routing)}") from None


class Asked(NamedTuple):
    """A model, and what of its dimensions is to be otherwise (None: as the model's)."""

    like: str
    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    vocabulary: int | None = None
    sigma: float | None = None

    def resolve(self, routing: Routing) -> tuple[str, Shape, str]:
        """The model's whole name, the shape, and the codec in which it is usually run.

        Raises:
            UsageError: an unknown name, or more experts per token than there are.
        """
        name, model = find_model(self.like)
        given = {key: value for key, value in self._asdict().items() if value is not None}
        del given["like"]
        shape = replace(model.routed(routing), **given)
        if shape.top_k > shape.experts:
            raise UsageError(f"--top-k {shape.top_k}: there are {shape.experts} experts per layer")
        return name, shape, model.codec


def describe() -> str:
    """A line for each model."""
    width = max(map(len, MODELS))
    return "\n".join(
        f"{name:{width}}  {s.layers} layers × {s.experts} experts, top-{s.top_k}, hidden "
        f"{s.hidden}, expert {s.intermediate}, {codec}"
        for name, (s, codec) in MODELS.items()
    )
