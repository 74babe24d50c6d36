"""The experts of a CPU engine by compiled kernels.

All experts of a layer that are there are computed in one call: gate, up, activation and down.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tierrun.engine.gpu.layout import ExpertLayout, expert_layout
from tierrun.engine.kernels.host import HostExperts, supported, supports_int8
from tierrun.io.errors import ModelError
from tierrun.io.store import Manifest

log = logging.getLogger(__name__)


class CompiledExperts:
    """Of the layers of one model; those of one layout share their kernels."""

    def __init__(self, modules: Sequence[nn.Module], manifest: Manifest, threads: int) -> None:
        """`modules` are the layers' experts. Compiles, or takes from disk, what they need."""
        layouts = [_layout(module, manifest, layer) for layer, module in enumerate(modules)]
        made = {x: HostExperts(x, threads, int8=True) for x in dict.fromkeys(layouts) if x}
        self._layers = [made[layout] if layout else None for layout in layouts]
        count = sum(layer is not None for layer in self._layers)
        if count:
            log.info(
                "int8 activations for experts in %d of %d layers (--exact: fp32)",
                count,
                len(layouts),
            )

    @property
    def complete(self) -> bool:
        """Whether there are kernels for every layer."""
        return all(layer is not None for layer in self._layers)

    def takes(self, layer: int) -> bool:
        """Whether there are kernels for the experts of `layer`."""
        return self._layers[layer] is not None

    def kernels(self, layer: int) -> HostExperts | None:
        """The kernels of `layer`, if there are any."""
        return self._layers[layer]

    def compute(
        self,
        layer: int,
        records: dict[int, int],
        hidden: torch.Tensor,
        top_k: torch.Tensor,
        out: torch.Tensor,
    ) -> NDArray[np.int64]:
        """What `records` (expert → address) make of the tokens that chose them, unweighted.

        Rows of `out` [tokens · k, H] are in the order of `top_k`, flattened; returns which got
        something.
        """
        kernels = self._layers[layer]
        assert kernels is not None, "never asked whether it takes this"
        chosen, k = top_k.flatten().numpy(), top_k.shape[1]
        number = np.full(max(chosen.max(), *records) + 1, -1)
        number[list(records)] = np.arange(len(records))
        which = number[chosen]
        rows = np.flatnonzero(which >= 0)
        addresses = np.array(list(records.values()), np.int64)
        x = hidden.contiguous().numpy()
        kernels.begin(addresses, x, rows // k, which[rows], out.numpy(), rows)
        kernels.finish()
        return rows

    def weighted_sums(
        self, layer: int, outputs: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Of each token's experts [T, k, H] by their `weights` [T, k], in their order: [T, H].

        To the same bits as where no lease was needed (`TokenExperts`).
        """
        from tierrun.engine.kernels.prompt_rows import weighted_sums

        kernels = self._layers[layer]
        assert kernels is not None, "never asked whether it takes this"
        return weighted_sums(kernels.workers, outputs, weights.float().contiguous())


def _layout(module: nn.Module, manifest: Manifest, layer: int) -> ExpertLayout | None:
    """None where there are no int8 kernels."""
    try:
        layout = expert_layout(module, manifest.class_of(layer))
    except ModelError:
        return None
    return layout if supported(layout) is None and supports_int8(layout) else None
