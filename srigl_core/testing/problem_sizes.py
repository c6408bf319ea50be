"""Which sizes the problems have: every residue, boundaries, and several large sizes at once.

The problems of a run go by a schedule. Each `ROUND` of them has every class of sizes once, in an
order of its own. Some have small sizes, and two rounds of these have each residue of a batch, of
neurons, inputs and connections modulo 8, 16 and 32. The others have boundaries, where kernels
change what they do, and sizes that are large alone or together.
A problem has a cost; classes of a larger cost than a kernel's `largest_problem` are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

__all__ = [
    "LARGE",
    "LARGEST_SIZE",
    "ROUND",
    "SMALL",
    "ProductSizes",
    "Schedule",
    "UpdateSizes",
    "classes_too_large",
    "product_sizes",
    "update_sizes",
]

ROUND = 50
"""Problems that have every class of sizes once."""

SMALL = 70
"""The largest of the small sizes."""

LARGE = 256
"""From this size on, most kernels split a layer or a batch."""

LARGEST_SIZE = 300_000
"""No size of a problem is larger."""

LEADS = ("rows", "two axes", "one vector", "no rows")
"""The leading axes of inputs: (batch,), (a, b), () and (0,)."""

_ROW = 10
"""What a row costs that holds no numbers."""

_RESIDUES = 32
_FEW_ROWS = 8
_MORE_ROWS = _RESIDUES - _FEW_ROWS
BOUNDARIES = tuple(
    sorted(
        {
            size + difference
            for size in (*(2**n for n in range(1, 17)), 10, 48, 100, 192, 1_000, 10_000, 100_000)
            for difference in (-1, 0, 1)
        }
    )
)


@dataclass(frozen=True)
class ProductSizes:
    """The sizes of a product: rows of the batch, neurons, active neurons, inputs, fan-in."""

    lead: int  # how the batch is laid out: an index of `LEADS`, plus 1
    batch: int
    n_out: int
    n_active: int
    n_in: int
    fan_in: int

    @property
    def nnz(self) -> int:
        """The number of connections."""
        return self.n_active * self.fan_in

    @property
    def cost(self) -> int:
        """The numbers that a product reads and writes, with `_ROW` more for each row."""
        one_row = self.nnz + self.n_in + self.n_out + _ROW
        return max(self.batch, 1) * one_row + self.nnz + _ROW * self.n_active

    def within(self, most: int) -> ProductSizes:
        """Return sizes that make sense together, and cost `most` or less: some made smaller."""
        one = replace(
            self,
            batch=1,
            n_active=min(self.n_active, self.n_out),
            fan_in=min(self.fan_in, self.n_in),
        )
        if one.cost > most:
            n_out, n_in = (max(1, min(size, most // 4)) for size in (self.n_out, self.n_in))
            n_active = max(1, min(self.n_active, n_out, most // (4 * _ROW)))
            left = most - n_out - n_in - _ROW * (1 + n_active)
            fan_in = max(1, min(self.fan_in, n_in, left // (2 * n_active)))
            one = ProductSizes(self.lead, 1, n_out, n_active, n_in, fan_in)
        of_layer = one.nnz + _ROW * one.n_active
        batch = max(1, min(self.batch, (most - of_layer) // (one.cost - of_layer)))
        return replace(one, batch=batch)

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The leading axes of the inputs."""
        lead = LEADS[self.lead - 1]
        if lead == "two axes":
            first = next(size for size in (2, 3, 5, 1) if self.batch % size == 0)
            return (first, self.batch // first)
        return {"rows": (self.batch,), "one vector": (), "no rows": (0,)}[lead]


@dataclass(frozen=True)
class UpdateSizes:
    """The sizes of a mask update: neurons and inputs."""

    n_out: int
    n_in: int

    @property
    def cost(self) -> int:
        """The number of weights, with `_ROW` more for each row."""
        return self.n_out * (self.n_in + _ROW)

    def within(self, most: int) -> UpdateSizes:
        """Return sizes that cost `most` or less: some made smaller."""
        n_out = max(1, min(self.n_out, most // (2 * _ROW)))
        return UpdateSizes(n_out, max(1, min(self.n_in, most // n_out - _ROW)))


@dataclass(frozen=True)
class Schedule:
    """A problem's place in a run: the run's seed, and the problem's number."""

    seed: tuple[int, ...]
    number: int

    def rng(self) -> Generator:
        """Return the generator of this problem's sizes."""
        return np.random.default_rng((*self.seed, self.number, ROUND))

    def slot(self) -> int:
        """Return which of the `ROUND` classes the problem has."""
        turn, place = divmod(self.number, ROUND)
        return int(np.random.default_rng((*self.seed, turn)).permutation(ROUND)[place])

    def option(self, draw: int, n_options: int) -> int:
        """Return one of `n_options`: as many problems have each of them once, at this draw."""
        turn, place = divmod(self.number, n_options)
        rng = np.random.default_rng((*self.seed, draw, n_options, turn))
        return int(rng.permutation(n_options)[place])

    def few_rows(self, turn: int) -> int:
        """Return a batch of 1 to 8 rows: 8 turns have each of them."""
        rng = np.random.default_rng((*self.seed, _FEW_ROWS, turn // _FEW_ROWS))
        return 1 + int(rng.permutation(_FEW_ROWS)[turn % _FEW_ROWS])

    def more_rows(self, turn: int) -> int:
        """Return a batch of more than 8 rows, and up to `SMALL`.

        With batches of 1 to 8 rows, 8 turns have each residue modulo 16, and 24 turns each one
        modulo 32.
        """
        rng = np.random.default_rng((*self.seed, _RESIDUES, turn // _MORE_ROWS))
        first = rng.permutation(np.arange(9, 17)) + 16 * rng.integers(2, size=_FEW_ROWS)
        others = np.setdiff1d(np.arange(9, 33), first)
        residues = [*first, *rng.permutation(others)]
        return _of_residue(self.rng(), int(residues[turn % _MORE_ROWS]), 9)

    def residue(self, deck: int, turn: int) -> int:
        """Return a residue modulo 32: 8, 16 and 32 turns have all modulo 8, 16 and 32."""
        rng = np.random.default_rng((*self.seed, deck, turn // _RESIDUES))
        low, middle, high = rng.permutation(8), rng.integers(2, size=8), rng.integers(2, size=16)
        block, place = divmod(turn % _RESIDUES, 8)
        residue = int(low[place])
        residue += 8 * (int(middle[place]) ^ (block & 1))
        return residue + 16 * (int(high[residue]) ^ (block >> 1))


Range = tuple[int, int]


@dataclass(frozen=True)
class _Product:
    """A class of products: the range of each size."""

    name: str
    batch: Range = (1, 9)
    n_active: Range = (1, 9)
    n_in: Range = (1, 9)
    fan_in: Range = (1, 3)
    n_out: Range = (1, 1)  # at least n_active
    nnz: Range = (1, 10**9)

    @property
    def smallest(self) -> ProductSizes:
        """The smallest sizes of the class."""
        n_active, fan_in = (
            self.n_active[0],
            max(self.fan_in[0], -(-self.nnz[0] // self.n_active[0])),
        )
        n_out, n_in = max(self.n_out[0], n_active), max(self.n_in[0], fan_in)
        return ProductSizes(1, self.batch[0], n_out, n_active, n_in, fan_in)

    def sizes(self, rng: Generator) -> ProductSizes:
        """Draw sizes."""
        batch, n_active, fan_in = (
            _about(rng, *sizes) for sizes in (self.batch, self.n_active, self.fan_in)
        )
        if self.nnz[0] > 1:
            fan_in = _about(rng, -(-self.nnz[0] // n_active), self.nnz[1] // n_active)
        n_in = max(_about(rng, *self.n_in), fan_in)
        n_out = max(_about(rng, *self.n_out), n_active)
        if rng.random() < 0.5:
            n_out += 1 if rng.random() < 0.5 else int(rng.integers(1, max(2, n_active // 3)))
        return ProductSizes(_any_lead(rng, batch), batch, n_out, n_active, n_in, fan_in)


def _any_lead(rng: Generator, batch: int) -> int:
    """Draw leading axes; one vector only in place of few rows."""
    return int(rng.choice((1, 1, 1, 2, 3, 3) if batch < 10 else (1, 1, 2)))


def _about(rng: Generator, least: int, most: int) -> int:
    """Draw a size: from the whole range, or a boundary in it."""
    boundaries = [size for size in BOUNDARIES if least <= size <= most]
    if boundaries and rng.random() < 0.5:
        return int(rng.choice(boundaries))
    return int(rng.integers(least, most, endpoint=True))


_LARGE = (
    _Product("three large sizes", (65, 140), (130, 400), (300, 1_500), (2, 10)),
    _Product("many inputs of a batch", (65, 140), (130, 200), (2_101, 4_400), (2, 10)),
    _Product("four large sizes", (5, 40), (193, 600), (900, 2_100), (24, 60)),
    _Product("many neurons of a batch", (5, 24), (769, 1_100), (900, 2_100), (24, 40)),
    _Product("one row of a large layer", (1, 4), (65, 600), (130, 2_100), (4, 90)),
    _Product("y of more than 2^20 numbers", (1_030, 1_101), (1_025, 1_040), (1, 70), (1, 1)),
    _Product("many inputs and connections", (1, 4), (65, 130), (16_385, 20_000), (200, 800)),
    *2
    * (
        _Product(
            "work for several threads", (85, 96), (400, 430), (129, 400), (64, 72), (440, 600)
        ),
    ),
    _Product("nnz > 131,072", (1, 2), (500, 1_100), nnz=(131_073, 150_000)),
    _Product("nnz > 262,144", (1, 1), (700, 1_500), nnz=(262_145, 280_000)),
    _Product("n_active > 2,048", (1, 4), (2_049, 4_200), (1, 70), (1, 5)),
    _Product("n_active > 2,048", (9, 17), (2_049, 4_200), (1, 70), (1, 5)),
    _Product("n_active > 65,536", (1, 2), (65_537, 66_000), (1, 70), (1, 2)),
    _Product("n_out > 65,536", (1, 2), (1, 300), (1, 70), (1, 9), (65_537, 66_000)),
    _Product("batch > 1,100", (1_101, 2_047), (1, 17), (1, 33), (1, 9)),
    _Product("batch > 2,048", (2_049, 4_200), (1, 17), (1, 17), (1, 5)),
    _Product("batch > 65,535", (65_600, 65_700), (1, 2), (1, 2), (1, 2)),
    _Product("fan_in > 1,024", (1, 9), (1, 9), (1_025, 2_100), (1_025, 2_048)),
    _Product("fan_in > 2,048", (1, 9), (1, 9), (2_049, 9_000), (2_049, 4_096)),
    _Product("fan_in > 4,096", (1, 5), (1, 5), (4_097, 9_000), (4_097, 8_200)),
    _Product("n_in = 65,536", (1, 3), (1, 9), (65_536, 65_536), (1, 5)),
    _Product("n_in = 65,537", (1, 3), (1, 9), (65_537, 65_537), (1, 5)),
    _Product("n_in > 32,768", (1, 3), (1, 9), (32_769, 65_535), (1, 5)),
    _Product("n_in > 131,072", (1, 2), (1, 9), (131_073, 140_000), (1, 5)),
    _Product("x of more than 2^20 numbers", (1_030, 1_101), (1, 9), (1_025, 1_040), (1, 5)),
)
_SMALL_SHARE, _DENSE_SHARE, _SQUARE_SHARE = 17, 2, 3
_FIRST_BOUNDARY = _SMALL_SHARE + _DENSE_SHARE + _SQUARE_SHARE
_MORE_ROWS_SHARE = _SMALL_SHARE // 2 + _DENSE_SHARE + _SQUARE_SHARE


def product_sizes(schedule: Schedule, most: int, *, ablation: bool) -> ProductSizes:
    """Return the sizes of a problem of a run, of a cost of `most` or less."""
    slot, rng = schedule.slot(), schedule.rng()
    turn = schedule.number // ROUND
    large = slot - (ROUND - len(_LARGE))
    if large >= 0 and _LARGE[large].smallest.cost <= most:
        sizes = _LARGE[large].sizes(rng)
        if sizes.cost > most:
            sizes = _LARGE[large].smallest
    elif _SMALL_SHARE <= slot < _FIRST_BOUNDARY:
        place = _SMALL_SHARE // 2 + slot - _SMALL_SHARE
        batch = schedule.more_rows(turn * _MORE_ROWS_SHARE + place)
        is_square = slot >= _SMALL_SHARE + _DENSE_SHARE
        sizes = _square(rng, batch) if is_square else _dense_rows(rng, batch)
        if slot == _FIRST_BOUNDARY - 1:
            sizes = replace(sizes, n_active=sizes.n_out, fan_in=sizes.n_in)
    elif _FIRST_BOUNDARY <= slot < ROUND - len(_LARGE):
        sizes = _at_a_boundary(rng, int(rng.integers(4)))
        if slot == _FIRST_BOUNDARY:
            sizes = replace(sizes, lead=1 + LEADS.index("no rows"))
    else:
        sizes = _small(schedule, rng, turn, slot)
    if not ablation:
        sizes = replace(sizes, n_out=sizes.n_active)
    return sizes.within(most)


def _of_residue(rng: Generator, residue: int, least: int = 1) -> int:
    """Draw a size of a residue modulo 32, from the `SMALL` sizes that are at least `least`."""
    first = least + (residue - least) % _RESIDUES
    return int(rng.choice(range(first, max(first, SMALL) + 1, _RESIDUES)))


def _small(schedule: Schedule, rng: Generator, turn: int, slot: int) -> ProductSizes:
    place = turn * _SMALL_SHARE + slot
    n_active, fan_in, n_in, n_out = (schedule.residue(deck, place) for deck in range(4))
    active, connections = _of_residue(rng, n_active), _of_residue(rng, fan_in)
    inputs = _of_residue(rng, n_in, connections)
    neurons = _of_residue(rng, n_out, active) if rng.random() < 0.5 else active
    # A large class that costs too much has small sizes in its place.
    if slot % 2 and slot < _SMALL_SHARE:
        batch = schedule.more_rows(turn * _MORE_ROWS_SHARE + slot // 2)
    else:
        batch = schedule.few_rows(2 * turn * _FEW_ROWS + slot // 2)
    return ProductSizes(int(rng.choice([1, 1, 1, 2])), batch, neurons, active, inputs, connections)


def _dense_rows(rng: Generator, batch: int) -> ProductSizes:
    n_active, n_in = (int(rng.integers(9, 200)) for _ in range(2))
    fan_in = n_in if rng.random() < 0.2 else int(rng.integers(n_in // 2 + 1, n_in))
    n_out = n_active + int(rng.integers(2)) * int(rng.integers(1, 40))
    return ProductSizes(_any_lead(rng, batch), batch, n_out, n_active, n_in, fan_in)


def _square(rng: Generator, batch: int) -> ProductSizes:
    """Draw as many neurons as inputs, and sometimes as many rows."""
    size = batch if rng.random() < 0.3 else int(rng.integers(2, SMALL))
    n_active, fan_in = (int(rng.integers(1, size, endpoint=True)) for _ in range(2))
    n_active = size if rng.random() < 0.6 else n_active
    return ProductSizes(_any_lead(rng, batch), batch, size, n_active, size, fan_in)


def _at_a_boundary(rng: Generator, which: int) -> ProductSizes:
    """Draw sizes of which one is at a boundary up to 4,097, and the others often are."""
    sizes = [_about(rng, 1, 33) for _ in range(4)]
    sizes[which] = int(rng.choice([size for size in BOUNDARIES if size <= 4_097]))
    batch, n_active, n_in, fan_in = sizes
    n_out = n_active + int(rng.choice([0, 1, int(rng.integers(1, 33))]))
    return ProductSizes(_any_lead(rng, batch), batch, n_out, n_active, max(n_in, fan_in), fan_in)


_UPDATES: tuple[tuple[str, Range, Range], ...] = (
    ("rows and columns", (257, 401), (257, 401)),
    *4 * (("rows and columns", (20, 256), (100, 256)),),
    ("many columns", (1, 9), (1_025, 4_200)),
    ("many rows", (1_025, 4_200), (1, 9)),
    *2 * (("n_out > 65,536", (66_000, 75_000), (2, 3)),),
    *2 * (("n_in > 65,536", (1, 3), (65_537, 70_000)),),
    *2 * (("n_in > 131,072", (1, 2), (131_073, 140_000)),),
    ("more than 2^18 weights", (540, 600), (505, 520)),
    ("more than 2^20 weights", (1_050, 1_080), (1_024, 1_032)),
)
_UPDATE_BOUNDARIES = 6


def update_sizes(schedule: Schedule, most: int) -> UpdateSizes:
    """Return the sizes of a problem of a run, of a cost of `most` or less."""
    slot, rng = schedule.slot(), schedule.rng()
    n_small = ROUND - len(_UPDATES) - _UPDATE_BOUNDARIES
    turn = schedule.number // ROUND * n_small + slot
    large = slot - (ROUND - len(_UPDATES))
    if large >= 0:
        _, n_out, n_in = _UPDATES[large]
        if UpdateSizes(n_out[0], n_in[0]).cost <= most:
            return UpdateSizes(_about(rng, *n_out), _about(rng, *n_in)).within(most)
    elif slot >= n_small:
        boundary = int(rng.choice([size for size in BOUNDARIES if size <= 1_025]))
        sizes = (boundary, _about(rng, 1, 70))
        return UpdateSizes(*sizes[:: 1 if slot % 2 else -1])
    residues = (schedule.residue(deck, turn) for deck in range(2))
    return UpdateSizes(*(_of_residue(rng, residue) for residue in residues)).within(most)


def classes_too_large(most: int, *, products: bool, updates: bool) -> list[str]:
    """Return the classes of sizes that cost more than `most`, so that no problem has them."""
    names = [each.name for each in _LARGE if each.smallest.cost > most] if products else []
    if updates:
        names += [
            name for name, n_out, n_in in _UPDATES if UpdateSizes(n_out[0], n_in[0]).cost > most
        ]
    return list(dict.fromkeys(names))
