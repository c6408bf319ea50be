"""Which problems the kit draws: every class within a run; what a kernel cannot take is named."""

from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from srigl_core.cli.app import app
from srigl_core.testing import KernelCapabilities, verify
from srigl_core.testing.coverage import Coverage, traits_of
from srigl_core.testing.kernel_capabilities import EVERYTHING, left_out
from srigl_core.testing.problem_sizes import (
    LARGE,
    ProductSizes,
    Schedule,
    product_sizes,
    update_sizes,
)
from srigl_core.testing.problem_sources import SeededSource
from srigl_core.testing.product_problems import matmul_problem
from srigl_core.testing.update_problems import condensed_update_problem, update_problem

DEFAULT = 100  # problems of a law


def not_drawn(traits, part, capabilities=EVERYTHING):
    """Return the members of groups with `part` in their names that no problem has."""
    coverage = Coverage.of(traits, capabilities)
    assert coverage.counts
    return {group: names for group, names in coverage.not_drawn.items() if part in group and names}


def traits(build, seed, numbers, capabilities=EVERYTHING):
    problems = (build(SeededSource(seed, number), capabilities) for number in numbers)
    return Counter(trait for problem in problems for trait in traits_of(problem))


@pytest.mark.parametrize(
    ("build", "n_seeds"),
    [(matmul_problem, 10), (update_problem, 10), (condensed_update_problem, 1)],
)
def test_fifty_problems_have_every_class_of_sizes_and_ten_runs_everything(build, n_seeds):
    everything = Counter()
    for seed in range(n_seeds):
        half = traits(build, seed, range(DEFAULT // 2))
        assert not not_drawn(half, "sizes"), seed
        everything += half
    everything += traits(build, 0, range(DEFAULT // 2, DEFAULT))
    assert not not_drawn(everything, "")


def sizes_of(build, seed, number):
    schedule = Schedule((seed,), number)
    if build is matmul_problem:
        return product_sizes(schedule, 10**9, ablation=True)
    return update_sizes(schedule, 10**9)


@pytest.mark.parametrize("build", [matmul_problem, update_problem])
@pytest.mark.parametrize(("modulus", "n_problems"), [(16, 50), (32, 100)])
def test_a_run_has_every_residue(build, modulus, n_problems):
    names = ("batch", "n_active", "fan_in", "n_in") if build is matmul_problem else ("n_in",)
    for seed in range(100):
        drawn = [sizes_of(build, seed, number) for number in range(n_problems)]
        for name in names:
            assert {getattr(sizes, name) % modulus for sizes in drawn} == set(range(modulus))


def test_every_round_has_each_batch_of_up_to_eight_rows():
    for seed in range(20):
        for first in (0, 50):
            problems = [
                sizes_of(matmul_problem, seed, number) for number in range(first, first + 50)
            ]
            small = [each for each in problems if max(astuple(each)) <= LARGE]
            assert {each.batch for each in small} >= set(range(1, 9))


def test_large_products_of_the_first_fifty_show_each_wrong_number():
    for number in range(50):
        problem = matmul_problem(SeededSource(0, number))
        x, weight = problem.x, problem.weight
        if max(*x.shape[:-1], *weight.shape) > LARGE:
            values = weight.values.astype(float)
            assert problem.activation == "none"
            assert np.abs(x).min() >= 0.5 or "shared" in problem.layout
            assert np.all((values == 0) | (np.abs(values) >= 0.5))
            assert (np.count_nonzero(values, axis=1) <= 8 * 32).all()


def test_as_many_problems_as_a_list_has_options_have_each_of_them():
    for seed in range(5):
        for n_options in (2, 7, 17):
            drawn = [SeededSource(seed, n).sampled_from(range(n_options)) for n in range(n_options)]
            assert sorted(drawn) == list(range(n_options))


def test_problems_cost_no_more_than_a_kernel_allows():
    for most in (300, 10_000, 200_000):
        slow = replace(EVERYTHING, largest_problem=most)
        for number in range(200):
            problem = matmul_problem(SeededSource(0, number), slow)
            weight, batch = problem.weight, problem.x.size // problem.x.shape[-1]
            shape = (weight.shape[0], weight.n_active, weight.shape[1], weight.fan_in)
            assert ProductSizes(1, batch, *shape).cost <= most
            assert update_problem(SeededSource(0, number), slow).mask.size <= most


def test_sizes_that_fit_are_left_as_they_are():
    sizes = ProductSizes(1, 70, 200, 150, 300, 20)
    assert sizes.within(sizes.cost) == sizes
    assert sum(astuple(sizes.within(sizes.cost - 1))) < sum(astuple(sizes))


def test_a_report_says_which_sizes_are_too_large():
    slow = KernelCapabilities(largest_problem=100_000)
    report = verify("reference", max_examples=1, op="update_mask")
    assert "more than one thread" in report.summary
    drawn = traits(matmul_problem, 0, range(DEFAULT), slow)
    assert "n_active > 65,536" in not_drawn(drawn, "sizes", slow)["sizes of a product"]
    assert "n_active > 65,536" in left_out(slow)


def test_the_command_prints_the_coverage():
    options = ("--op", "update_mask", "--max-examples", "3", "--coverage")
    output = CliRunner().invoke(app, ["verify", "reference", *options]).output
    assert "sizes of an update: " in output
    assert "    not drawn: " in output
    assert "sizes of a product" not in output
