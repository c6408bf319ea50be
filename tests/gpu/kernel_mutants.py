"""Wrong GPU kernels that exact checks and sanitizers must catch; for the kit's there is mutants."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHECKS", "MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A replacement in one file.

    Parameters
    ----------
    name : str
    file, right, wrong : str
    settings : tuple of str
        Those of `simulated.SETTINGS` in which they are to.
    needs_sanitizer : bool
        Whether it touches memory that is not its own, rather than gives a wrong result.
    """

    name: str
    file: str
    right: str
    wrong: str
    settings: tuple[str, ...] = ("four lanes",)
    needs_sanitizer: bool = False


TILE, STREAM, VALUES, MASK = (
    "tile_product.cu",
    "stream_product.cu",
    "value_gradient.cu",
    "mask_update.cu",
)

CHECKS = {
    TILE: ("products",),
    "batch_tile.cuh": ("products",),
    STREAM: ("products", "far inputs"),
    VALUES: ("gradients",),
    MASK: ("updates", "not finite"),
}
"""The exact checks that show what is wrong in a file."""

MUTANTS = (
    Mutant(
        "segments overlap",
        TILE,
        "static_cast<long long>(segment) * tile_rows;",
        "static_cast<long long>(segment) * (tile_rows - 1);",
    ),
    Mutant("sums of the segment before", TILE, "segment) * (groups + 1) + group", "0) + group"),
    Mutant(
        "last chunk lost", TILE, "chunk < stop; ++chunk", "chunk + 1 < stop; ++chunk", ("one lane",)
    ),
    Mutant(
        "compact result at the neuron's own column",
        TILE,
        "compact ? neuron : column",
        "column",
        needs_sanitizer=True,
    ),
    Mutant(
        "result behind the last row",
        TILE,
        "      if (b < batch)\n",
        "",
        needs_sanitizer=True,
    ),
    Mutant(
        "input behind the last row",
        "batch_tile.cuh",
        "left = batch - b;",
        "left = batch + 1 - b;",
        needs_sanitizer=True,
    ),
    Mutant(
        "no row of zeros for the padding",
        "batch_tile.cuh",
        "if (threadIdx.x < Lanes)",
        "if (false)",
    ),
    Mutant(
        "quads not exchanged as the host packs them",
        "batch_tile.cuh",
        "(row / rows_a_wavefront) % Lanes",
        "0",
    ),
    Mutant(
        "lanes of a row swapped",
        "batch_tile.cuh",
        "place_of_row<Lanes>(own_row) ^ quad_of",
        "place_of_row<Lanes>(own_row) ^ (Lanes - 1 - quad_of)",
    ),
    Mutant(
        "inputs of a later trip are those of the first",
        "batch_tile.cuh",
        "    from += ahead * stride;\n",
        "",
        ("several trips",),
    ),
    Mutant(
        "later trips go to the wrong rows",
        "batch_tile.cuh",
        "to += ahead * stride * Lanes;",
        "to += ahead * stride;",
        ("several trips",),
    ),
    Mutant(
        "quads of a trip too near to each other",
        "batch_tile.cuh",
        "to[a * stride * Lanes] = quads[a]",
        "to[a * stride] = quads[a]",
        ("several trips",),
    ),
    Mutant(
        "quads of a trip have the inputs of its first",
        "batch_tile.cuh",
        "__ldg(next + a * stride)",
        "__ldg(next)",
        ("several trips",),
    ),
    Mutant(
        "a trip begins before the one before it ends",
        "batch_tile.cuh",
        "row += ahead * stride",
        "row += stride",
        ("several trips",),
        needs_sanitizer=True,
    ),
    Mutant(
        "inputs read before they are staged",
        STREAM,
        "    __syncthreads();\n",
        "",
        ("streamed",),
    ),
    Mutant(
        "values of a warp's next neurons not loaded",
        STREAM,
        "is_last ? slice + stride : slice",
        "slice",
        ("streamed again",),
    ),
    Mutant(
        "address of 32 bits",
        STREAM,
        "widened(__ldg(x + b * n_in + c))",
        "widened(__ldg(x + b * static_cast<int>(n_in) + static_cast<int>(c)))",
        ("streamed in place",),
        needs_sanitizer=True,
    ),
    Mutant(
        "gradients' tile is overwritten while it is read",
        VALUES,
        "      __syncthreads();  // all warps are done with the tile before\n",
        "",
        ("eight lanes",),
    ),
    Mutant("tile before forgotten", VALUES, "sum : mine[at] + sum", "sum : sum", ("whole inputs",)),
    Mutant("first split alone", VALUES, "s < splits", "s < 1"),
    Mutant("one tie too many", MASK, "seen + before < own_ties", "seen + before <= own_ties"),
    Mutant(
        "digits of others counted",
        MASK,
        "size >> (shift + kDigitBits) != so_far) continue;",
        "false) continue;",
    ),
    Mutant("infinity is finite", MASK, "size >= infinity", "size > infinity"),
    Mutant("inactive weights must be finite", MASK, "(candidates != kActive || mask[i])", "true"),
    Mutant("counted for each digit", MASK, "is_first && size >= infinity", "size >= infinity"),
    Mutant("zeros of survivors kept", MASK, "active && survives && nonzero", "active && survives"),
    Mutant(
        "full rows keep the smallest",
        MASK,
        "(size > last || (is_tie && before <",
        "(size < last || (is_tie && before <",
    ),
    Mutant(
        "grown weight keeps what it was",
        MASK,
        "before ? bits[i] : grown_init",
        "bits[i]",
    ),
)
