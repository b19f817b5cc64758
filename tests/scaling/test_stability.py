"""The table of exponents, the solver that derives them and the reference agree term by term."""

from __future__ import annotations

import pytest

from mukv.core.errors import BadInput
from mukv.scaling.rows import EXPONENTS, LEARNING_RATES
from mukv.scaling.stability import (
    FULL,
    NONE,
    SCALED,
    Alignment,
    check_start,
    learning_rate_powers,
)

REFERENCE = """
sgd       full  sp +½ -½ -1 | ntk +½ +½ 0 | mup 0 0 0    | mean_field +1 +1 +1
sgd       none  sp +½ 0 -½  | ntk +½ 1 ½  | mup 0 +½ 0   | mean_field +1 +1½ +1
adam      full  sp 0 -1 -1  | ntk 0 -½ -½ | mup -½ -1 -½ | mean_field 0 -½ 0
adam      none  sp 0 -½ -½  | ntk 0 0 0   | mup -½ -½ 0  | mean_field 0 0 +½
adafactor full  sp 0 -½ -½  | ntk 0 -½ -½ | mup 0 -½ 0   | mean_field 0 -½ 0
adafactor none  sp 0 0 0    | ntk 0 0 0   | mup 0 0 0    | mean_field 0 0 0
"""
"""Everett et al. 2024, table 1, typed independently of the package."""


def cells():
    for line in REFERENCE.strip().splitlines():
        family, alignment, rest = line.split(maxsplit=2)
        for row in rest.split("|"):
            kind, *powers = row.split()
            numbers = (float(p.replace("1½", "1.5").replace("½", "0.5")) for p in powers)
            yield family, alignment, kind, tuple(numbers)


@pytest.mark.parametrize(("family", "alignment", "kind", "expected"), list(cells()))
def test_table_solver_and_reference_agree(family, alignment, kind, expected):
    assert LEARNING_RATES[family, alignment][kind] == expected
    aligned = FULL if alignment == "full" else NONE
    exponents = dict(zip(SCALED, EXPONENTS[kind], strict=True))
    solved = learning_rate_powers(exponents, family, aligned, aligned)
    assert tuple(solved.values()) == pytest.approx(expected)


@pytest.mark.parametrize(("family", "power"), [("adam", 1), ("sgd", 2), ("adafactor", 0)])
def test_the_symmetry_of_each_family(family, power):
    """Exponents (a + t, b - t) train as (a, b) if the learning rate's exponent c becomes c - t
    (Adam), c - 2t (SGD) or stays (Adafactor)."""
    exponents = dict(zip(SCALED, EXPONENTS["mup"], strict=True))
    shifted = {role: (a + 0.3, b - 0.3) for role, (a, b) in exponents.items()}
    before, after = (learning_rate_powers(e, family, FULL, FULL) for e in (exponents, shifted))
    for role in SCALED:
        assert after[role] - before[role] == pytest.approx(0.3 * power)


def test_measured_alignment_lies_between():
    exponents = dict(zip(SCALED, EXPONENTS["sp"], strict=True))
    measured = Alignment(alpha=0.8, omega=0.5, both=0.7)
    assert learning_rate_powers(exponents, "adam", measured, FULL)["hidden"] == pytest.approx(-0.8)


@pytest.mark.parametrize("changed", [{"hidden": (0.0, 0.3)}, {"readout": (0.0, 0.2)}, {"out": 1}])
def test_what_starts_unstable_is_refused(changed):
    exponents = dict(zip(SCALED, EXPONENTS["sp"], strict=True)) | changed
    with pytest.raises(BadInput, match="exponents"):
        check_start(exponents)


def test_a_readout_that_agrees_with_changes_slows_what_is_below():
    exponents = dict(zip(SCALED, EXPONENTS["sp"], strict=True))
    agreeing = Alignment(omega=1.0)
    assert learning_rate_powers(exponents, "adam", FULL, agreeing)["hidden"] == pytest.approx(-1.5)
