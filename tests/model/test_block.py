"""Norms and gains around a residual branch scale what the branch adds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import named
from mukv.model.block import SandwichNorm
from mukv.scaling.parameterization import Scaling
from tests.laws import matrix

DEEP = Scaling(
    kind="mup",
    base={"embed": 8, "heads": 2, "head_dim": 8, "value_dim": 8, "hidden": 12, "layer": 1},
    depth=0.5,
)


def test_with_depth_the_outer_gain_ends_a_branch():
    model = matrix.build("gqa", "rope", "plain", residual=SandwichNorm(), scaling=DEEP)
    resolved = named(model.resolved())
    for branch in ("attention", "mlp"):
        weight = resolved[f"stage0.slot0.{branch}_post_norm.gain"]
        assert weight.multiplier == pytest.approx(2**-0.5)
        assert not weight.decays


def test_an_offset_from_one_cannot_be_scaled():
    model = matrix.build("gqa", "rope", "plain", residual=SandwichNorm())
    with pytest.raises(BadInput, match=r"scaling\.depth"):
        replace(model, norm=RMSNorm(stored="offset"), scaling=DEEP)
