"""The laws reject every wrong backend, and none of them is idle."""

import functools

import pytest
from mutants import MUTANTS

from srigl_core.testing.laws import LAWS, verify

MAX_EXAMPLES = 150


@functools.cache
def rejects(law, mutant):
    (result,) = verify(mutant.backend, laws=[law], max_examples=MAX_EXAMPLES, seed=1)
    return result.status == "failed"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_rejected(mutant):
    laws = [law for law in LAWS if law.operation == mutant.operation]
    assert any(rejects(law, mutant) for law in laws), f"no law rejects {mutant.name}"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_every_law_rejects_some_mutant(law):
    mutants = [mutant for mutant in MUTANTS if mutant.operation == law.operation]
    assert any(rejects(law, mutant) for mutant in mutants)


def test_mutants_differ_by_name():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
