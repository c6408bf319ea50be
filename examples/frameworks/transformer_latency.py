"""Compare latency and memory of condensed transformer layers at 90% sparsity with dense PyTorch.

The layers are the MLP blocks of a ViT-B/16 (197 tokens an image) and a GPT-2 block that generates
(one token a sequence, after 256 others), at batch 1 and 8. Weights are random, since only time is
measured. With `--quick` there are two blocks and few calls, and nothing is compiled.
"""

import argparse
import functools
import statistics
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import srigl_core
from srigl_core.torch import CondensedLinear

SPARSITY, CONTEXT = 0.9, 256


class MlpBlock(nn.Module):
    """LayerNorm, 768 to 3072, GELU, back, and the residual."""

    def __init__(self, linear):
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.widen, self.narrow = linear(768, 3072), linear(3072, 768)

    def forward(self, x):
        """Return the block's output, of x (..., 768)."""
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


class DecoderBlock(nn.Module):
    """A GPT-2 block for the next token, with the keys and values of earlier tokens."""

    def __init__(self, linear):
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.qkv, self.project = linear(768, 2304), linear(768, 768)
        self.mlp = MlpBlock(linear)

    def forward(self, x, keys, values):
        """Return the output for one token of each sequence, x (batch, 768)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 12, 64)).unbind(-3)
        keys = torch.cat([keys, k[:, :, None]], 2)
        values = torch.cat([values, v[:, :, None]], 2)
        seen = nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values)
        return self.mlp(x + self.project(seen.flatten(1)))


def condensed(n_in, n_out):
    return CondensedLinear(n_in, n_out, sparsity=SPARSITY, rng=0)


def networks(n_blocks):
    """Return, for each network, functions that build it from linear layers and make its inputs."""

    def vit(linear):
        return nn.Sequential(*(MlpBlock(linear) for _ in range(n_blocks)))

    return {
        f"ViT-B/16, {n_blocks} MLP blocks": (vit, lambda b: (torch.randn(b, 197, 768),)),
        "GPT-2 block": (
            DecoderBlock,
            lambda b: (torch.randn(b, 768), *torch.randn(2, b, 12, CONTEXT, 64)),
        ),
    }


def median_seconds(contenders, seconds):
    """Return the median time of each call; the calls take turns."""
    times = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    ends = time.perf_counter() + seconds * len(contenders)
    rounds = 0
    while time.perf_counter() < ends or rounds < 3:
        rounds += 1
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(samples) for name, samples in times.items()}


def mebibytes(model):
    return sum(part.nbytes for part in [*model.parameters(), *model.buffers()]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    srigl_core.get_backend("numba")
    made = networks(2 if options.quick else 12)
    columns = (
        "network",
        "batch",
        "dense ms",
        "dense compiled ms",
        "condensed ms",
        "condensed compiled ms",
    )
    table = Table(*columns, "faster than dense", "dense MiB", "condensed MiB")
    with torch.no_grad(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=2 * len(made))
        for name, (make, inputs) in made.items():
            dense, sparse = make(nn.Linear).eval(), make(condensed).eval()
            for batch in (1, 8):
                arguments = inputs(batch)
                torch.compiler.reset()
                models = {"dense": dense, "condensed": sparse}
                if not options.quick:
                    models |= {f"{n}, compiled": torch.compile(m) for n, m in list(models.items())}
                times = median_seconds(
                    {n: functools.partial(m, *arguments) for n, m in models.items()},
                    0.2 if options.quick else 3.0,
                )
                best, ours = (
                    min(t for n, t in times.items() if n.startswith(form))
                    for form in ("dense", "condensed")
                )
                order = ("dense", "dense, compiled", "condensed", "condensed, compiled")
                table.add_row(
                    name,
                    str(batch),
                    *(f"{1e3 * times[n]:.2f}" if n in times else "-" for n in order),
                    f"{best / ours:.2f}",
                    f"{mebibytes(dense):.1f}",
                    f"{mebibytes(sparse):.1f}",
                )
                progress.advance(task)
    console = Console(width=130)
    console.print(table)
    console.print(
        f"medians; PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32"
    )


if __name__ == "__main__":
    main()
