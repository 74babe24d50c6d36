"""The next layer's router, found and asked early."""

import logging

import pytest
import torch
from tests.engine.conftest import PROMPT, Model
from torch import nn

import tierrun
from tierrun.engine.lookahead import Lookahead

MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class Router(nn.Module):
    """Chooses two of eight, as transformers' routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = (hidden @ self.weight.T).topk(2)
        return values, indices


class GreedyRouter(Router):
    """Wants what the layer before it left, of the same tokens."""

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, left: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden + left)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for mark in MARKS:
            setattr(self, mark, True)


class Block(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.Identity(), router, Experts()


def blocks(*routers: nn.Module) -> nn.Module:
    return nn.ModuleList([Block(router) for router in routers])


def route(lookahead: Lookahead, model: nn.Module, hidden: torch.Tensor) -> list[list[int]]:
    """One forward pass: what is predicted for each layer before it is asked."""
    predicted = []
    for layer, block in enumerate(model):
        predicted.append(lookahead.predict(layer))
        chosen = block.router(block.norm(hidden))[1]
        lookahead.observe(layer, chosen)
    return predicted


def test_the_next_router_is_asked_with_this_layers_input() -> None:
    torch.manual_seed(0)
    model = blocks(Router(), Router(), Router())
    lookahead = Lookahead(model)
    assert route(lookahead, model, torch.randn(5, 4)) == [[], [], []], "nothing is known yet"
    route(lookahead, model, torch.randn(3, 4))
    hidden = torch.randn(1, 4)
    predicted = route(lookahead, model, hidden)
    truth = [sorted(block.router(hidden)[1][0].tolist()) for block in model]
    assert predicted == [[], truth[1], truth[2]], "the same input for all layers here"


def test_there_is_no_layer_after_the_last() -> None:
    model = blocks(Router(), Router())
    lookahead = Lookahead(model)
    for _ in range(3):
        route(lookahead, model, torch.randn(2, 4))
    assert lookahead.predict(2) == [] == lookahead.predict(0)


def test_an_architecture_without_router_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Inline(nn.Module):
        """Chooses where nobody sees it."""

    model = blocks(Inline(), Inline())
    lookahead = Lookahead(model)
    for _ in range(3):
        for layer in range(2):
            lookahead.observe(layer, torch.tensor([[0, 1]]))
    assert [record.getMessage() for record in caplog.records] == [
        "look-ahead is off: no module of this architecture outputs the routing"
    ]


def test_a_router_that_wants_more_than_hidden_states_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failing guess must not fail the token."""
    model = blocks(GreedyRouter(), GreedyRouter())
    lookahead = Lookahead(model)
    for tokens in (5, 3, 2, 2):
        hidden = torch.randn(tokens, 4)
        for layer, block in enumerate(model):
            assert lookahead.predict(layer) == []
            lookahead.observe(layer, block.router(hidden, hidden)[1])
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "layer 1" in warnings[0].getMessage()


def test_lookahead_can_be_turned_off(model: Model) -> None:
    with tierrun.load(model.store, ram=str(model.smallest), lookahead=False) as engine:
        list(engine.generate(PROMPT, 8, ignore_eos=True))
        assert engine.stats().counters.ahead_issued == 0
