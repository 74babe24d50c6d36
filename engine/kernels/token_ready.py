"""The kernels of a token that are the same for every model, made ready together.

Importing them compiles what has a fixed signature, or takes it from disk.
"""

from tierrun.engine.kernels import (
    token_attention,
    token_products,
    token_router,
    token_run,  # noqa: F401 (compiled by its import)
)


def compile_all() -> None:
    """Compile what threads call."""
    for module in (token_attention, token_products, token_router):
        module.perform()
