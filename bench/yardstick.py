"""Two things measured in turns, so that what changes on the machine changes both."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Y = TypeVar("Y")


class Turns(NamedTuple, Generic[T, Y]):
    """`ours`, and before and after each of them a `yardstick`: one more of these."""

    ours: Sequence[T]
    yardsticks: Sequence[Y]

    def ratios(
        self, of_ours: Callable[[T], float], of_yardstick: Callable[[Y], float]
    ) -> list[float]:
        """Each of ours over the mean of the yardsticks before and after it."""
        sizes = [of_yardstick(yardstick) for yardstick in self.yardsticks]
        means = [(before + after) / 2 for before, after in zip(sizes, sizes[1:], strict=False)]
        return [of_ours(mine) / mean for mine, mean in zip(self.ours, means, strict=True)]


def by_rounds(
    ours: Callable[[int], T], yardstick: Callable[[int], Y], rounds: int
) -> Iterator[Turns[T, Y]]:
    """Yardstick, ours, yardstick, ours, …, yardstick; both are told which of theirs it is.

    All turns until then, after each round.
    """
    yardsticks, mine = [yardstick(0)], list[T]()
    for number in range(rounds):
        mine.append(ours(number))
        yardsticks.append(yardstick(number + 1))
        yield Turns(tuple(mine), tuple(yardsticks))


def alternate(ours: Callable[[int], T], yardstick: Callable[[int], Y], rounds: int) -> Turns[T, Y]:
    """All turns of at least one round; see `by_rounds`."""
    *_, whole = by_rounds(ours, yardstick, rounds)
    return whole
