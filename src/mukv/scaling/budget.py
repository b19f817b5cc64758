"""How numbers tuned for one batch size and number of tokens change for others.

Two published rules, which disagree about the batch: by the square root, from the stochastic
differential equation that training approximates (Complete(d)P, 2025), and by a power law that was
fitted to optimal learning rates (Shen et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mukv.core.errors import BadInput


class Change(NamedTuple):
    """Factors of learning rate, weight decay and Adam's epsilon, and of what an average forgets
    at a step (1 - beta)."""

    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0
    forgetting: float = 1.0


@dataclass(frozen=True)
class Budget:
    """The contract. batch, tokens: per step and in all, of the run that the numbers are of."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            if getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 1 token")

    def change(self, batch: int, tokens: int) -> Change:
        """For a run of `batch` tokens per step and `tokens` in all."""
        raise NotImplementedError


@dataclass(frozen=True)
class SquareRoot(Budget):
    """Rate and decay with the root of batch / tokens, epsilon with its inverse; averages forget
    in proportion to it."""

    kind: Literal["sde"] = "sde"

    def change(self, batch: int, tokens: int) -> Change:
        ratio = (batch / self.batch) / (tokens / self.tokens)
        return Change(ratio**0.5, ratio**0.5, ratio**-0.5, ratio)


@dataclass(frozen=True)
class PowerLaw(Budget):
    """The rate in proportion to the batch, and with a power of the tokens; nothing else."""

    kind: Literal["power"] = "power"
    exponent: float = -0.51

    def change(self, batch: int, tokens: int) -> Change:
        return Change(rate=batch / self.batch * (tokens / self.tokens) ** self.exponent)


BUDGETS: dict[str, type[Budget]] = {"sde": SquareRoot, "power": PowerLaw}
AnyBudget = SquareRoot | PowerLaw
