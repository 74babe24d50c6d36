"""How many threads torch computes with on the CPU, from one forward pass to the next.

Compiled kernels have threads of their own. Where they compute all that is heavy, as for a token,
torch's would only take turns with them on the same cores: torch keeps to the caller's thread then.
"""

import torch

from tierrun.engine.kernels.int8 import FEW_TOKENS


class TorchThreads:
    """Sets torch's threads before a forward pass; they are the whole process's."""

    def __init__(self, prompts: int, *, quick: bool) -> None:
        """So many for a prompt; `quick`: a few tokens are computed by kernels."""
        self._prompts, self._quick = prompts, quick

    def before(self, tokens: int) -> None:
        """A forward pass of so many tokens is next."""
        wanted = 1 if self._quick and tokens <= FEW_TOKENS else self._prompts
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
