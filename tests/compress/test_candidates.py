"""Policies with budgets of entries, and with budgets that give a number of bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mukv.cache import Policy
from mukv.compress.candidates import candidates, fits_bytes
from mukv.compress.reader import PolicyReader
from mukv.core.errors import BadInput
from mukv.model import Stage
from tests.laws import matrix
from tests.laws.matrix import EXACT


class Plain:
    """Stand in for a model without calibrated centres."""

    def calibrated(self, policy):
        return policy, {}


@pytest.fixture(scope="module")
def reader():
    model = replace(matrix.build("gqa", "rope", "plain"), plan=(Stage(),))
    return PolicyReader(model, None, EXACT, 768, 1024)


def names(found):
    return [(each.policy.name, each.budget) for each in found]


def test_each_policy_with_each_budget_once(reader):
    found = candidates(Plain(), reader, "snapkv,int8,topk:0.1,snapkv", (0.5, 0.25))
    assert names(found) == [
        *(("full", 1.0), ("snapkv", 0.5), ("snapkv", 0.25), ("int8", 1.0), ("topk", 0.1))
    ]
    assert names(candidates(Plain(), reader, "tova")) == [("full", 1.0), ("tova", 0.25)]
    given = "snapkv(window=8,kernel=3),kvpress:knorm:0.5"
    assert names(candidates(Plain(), reader, given)) == [
        *(("full", 1.0), ("snapkv(window=8,kernel=3)", 0.25), ("knorm(recent=0)", 0.5))
    ]


@pytest.mark.parametrize("name", ["streaming", "snapkv", "expected", "h2o+int8", "tova+adaptive"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_largest_budget_that_fits(reader, name, share):
    full, own = candidates(Plain(), reader, name, shares=(share,))
    assert own.cache_bytes <= share * full.cache_bytes
    more = Policy.parse(name, own.budget + 0.001)
    assert reader.cache_bytes(more, {}) > share * full.cache_bytes


def test_equal_bytes_beside_policies_of_fixed_bytes(reader):
    found = candidates(Plain(), reader, "int4,pages,streaming", shares=(0.25,))
    assert [name for name, _ in names(found)] == ["full", "int4", "pages", "streaming"]
    assert dict(names(found))["pages"] == 0.25
    assert [fits_bytes(name) for name in ("int4", "pages", "streaming", "snapkv:0.5")] == [
        *(False, False, True, False)
    ]
    both = candidates(Plain(), reader, "streaming", (0.5,), (0.25,))
    assert len(both) == 3


@pytest.mark.parametrize("share", [0.001, 0.0, 1.5])
def test_bytes_out_of_range(reader, share):
    with pytest.raises(BadInput, match="--bytes"):
        candidates(Plain(), reader, "snapkv", shares=(share,))


def test_other_errors_are_not_hidden(reader):
    with pytest.raises(BadInput, match="did you mean 'snapkv'"):
        candidates(Plain(), reader, "snapvk", shares=(0.5,))
