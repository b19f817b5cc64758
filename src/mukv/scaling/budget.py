"""Rules that adapt learning rate, decay and betas to another batch size and number of tokens.

There are three published rules: the square-root rule from the stochastic differential equation that
training approximates (Complete(d)P, Mlodozeniec et al. 2025), and two power laws fitted to optimal
learning rates, which disagree about the batch (Shen et al. 2024; Ren et al. 2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from mukv.core.errors import BadInput
from mukv.core.table import Component, PartTable


class Change(NamedTuple):
    """Factors by which hyperparameters change.

    rate: factor of the learning rate
    decay: factor of the weight decay
    epsilon: factor of Adam's epsilon
    forgetting: factor of 1 - beta, the fraction that a running mean forgets per step
    """

    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0
    forgetting: float = 1.0


@dataclass(frozen=True)
class Budget(Component):
    """Base class of the rules.

    batch: tokens per step of the run that the hyperparameters were tuned for
    tokens: total tokens of that run
    """

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            if getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 1 token")

    def change(self, batch: int, tokens: int) -> Change:
        """Return the factors for a run of `batch` tokens per step and `tokens` in total."""
        raise NotImplementedError


@dataclass(frozen=True)
class SquareRoot(Budget):
    """Scale rate and decay by sqrt(batch / tokens), epsilon by its inverse, 1 - beta by batch /
    tokens.
    """

    kind: Literal["sde"] = "sde"

    def change(self, batch: int, tokens: int) -> Change:
        ratio = (batch / self.batch) / (tokens / self.tokens)
        return Change(ratio**0.5, ratio**0.5, ratio**-0.5, ratio)


@dataclass(frozen=True)
class PowerLaw(Budget):
    """Scale the learning rate by batch * tokens ** exponent; change nothing else.

    exponent: power of the number of tokens
    """

    kind: Literal["power"] = "power"
    exponent: float = -0.51

    def change(self, batch: int, tokens: int) -> Change:
        return Change(rate=batch / self.batch * (tokens / self.tokens) ** self.exponent)


@dataclass(frozen=True)
class HyperP(Budget):
    """Scale the learning rate by sqrt(batch) * tokens ** exponent; change nothing else.

    HyperP (Ren et al. 2026, "Rethinking Language Model Scaling under Transferable Hypersphere
    Optimization", arXiv 2603.28743). The exponent was fitted for Muon on a sphere, and before that
    for AdamW (Bjorck et al. 2024).

    exponent: power of the number of tokens
    """

    kind: Literal["hyperp"] = "hyperp"
    exponent: float = -0.32

    def change(self, batch: int, tokens: int) -> Change:
        ratio = (tokens / self.tokens) ** self.exponent
        return Change(rate=(batch / self.batch) ** 0.5 * ratio)


BUDGETS = PartTable("budget rule", Budget, {"sde": SquareRoot, "power": PowerLaw, "hyperp": HyperP})
AnyBudget = Annotated[Budget, BUDGETS]
