"""The condensed layer in PyTorch: product, gradients, tracing, and the cache of packings."""

import copy
import ctypes
import gc
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from srigl_core import CondensedWeight, SriglError, ValueTypeError
from srigl_core.contract import ACTIVATIONS
from srigl_core.testing.bounds import first_violation
from srigl_core.testing.oracles import expected_gradients, expected_product
from srigl_core.testing.problem_sources import SeededSource
from srigl_core.testing.product_problems import matmul_problem

torch = pytest.importorskip("torch")

from torch import library, nn  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from srigl_core.torch import (  # noqa: E402
    CondensedLinear,
    CondensedSequential,
    freeze,
    packing,
    quantize,
    unfreeze,
)
from srigl_core.torch.ops import (  # noqa: E402
    condensed_inference,
    condensed_linear,
    condensed_linear_backward,
)
from srigl_core.torch.tensors import as_numpy, from_numpy  # noqa: E402

# PyTorch's own warnings at its first compilation or export.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BUFFERS = ("indices", "active", "counts")


def layer_of(
    shape=(6, 10), *, fan_in=3, n_active=4, budget=None, dtype=np.float64, bias=True, seed=0, **more
):
    """A layer with ablated neurons and room to spare."""
    rng = np.random.default_rng(seed)
    weight = CondensedWeight.random(shape, fan_in=fan_in, n_active=n_active, dtype=dtype, rng=rng)
    numbers = rng.standard_normal(shape[0]).astype(dtype) if bias else None
    budget = weight.nnz + 5 if budget is None else budget
    return CondensedLinear.from_condensed(weight, numbers, nnz_budget=budget, **more)


def batch_of(layer, *lead, seed=1):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((*lead, layer.in_features))).to(layer.values.dtype)


def arguments(layer, x):
    buffers = [getattr(layer, name) for name in BUFFERS]
    return (x, layer.values, *buffers, layer.bias, layer.in_features)


def assert_within(result, outcome):
    violation = first_violation(as_numpy(result), outcome)
    assert violation is None, violation


def assert_right(layer, x):
    """The layer computes with its current values and mask, with and without gradients."""
    expected = layer.to_linear()(x)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def run_python(program, **environment):
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("seed", range(30))
def test_product_and_gradients_are_within_the_error_bound(seed):
    problem = matmul_problem(SeededSource(seed))
    layer = CondensedLinear.from_condensed(problem.weight, problem.bias)
    x = from_numpy(np.array(problem.x)).requires_grad_()
    y = layer(x)
    grad = from_numpy(np.array(problem.grad)).to(y.dtype)
    y.backward(grad)
    with np.errstate(all="ignore"):
        bias = None if problem.bias is None else problem.bias.astype(problem.result_dtype)
    assert y.dtype == from_numpy(np.zeros(1, problem.result_dtype)).dtype
    assert_within(y, expected_product(problem.weight, problem.x, bias, "none"))
    expected = expected_gradients(problem.weight, as_numpy(grad), problem.x)
    assert_within(x.grad, expected["x"])
    assert_within(layer.values.grad.view(problem.weight.values.shape), expected["values"])
    if problem.bias is not None:
        assert_within(layer.bias.grad, expected["bias"])
    for owner in (x, *layer.parameters()):
        assert owner.grad.dtype == owner.dtype
    layer.activation = problem.activation
    with torch.no_grad():
        fused = layer(x)
    assert_within(fused, expected_product(problem.weight, problem.x, bias, problem.activation))


@pytest.mark.parametrize(
    ("dtype", "fan_in", "bias"),
    [*((dtype, 3, True) for dtype in DTYPES), (torch.float64, 1, False), (torch.float64, 10, True)],
    ids=str,
)
def test_a_layer_is_the_masked_dense_one(dtype, fan_in, bias):
    layer = layer_of(fan_in=fan_in, bias=bias).to(dtype)
    dense = layer.to_linear()
    mask = layer.mask
    assert mask.sum() == fan_in * 4
    assert not dense.weight[~mask].any()
    x = batch_of(layer, 5).requires_grad_()
    wanted = dense(x)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype)
    close = {} if tolerance is None else {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(layer(x), wanted, **close)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, **close)
    direction = torch.ones_like(wanted)
    (dx,) = torch.autograd.grad(wanted, x, direction, retain_graph=True)
    wanted.backward(direction)
    x.grad = None
    layer(x).backward(direction)
    torch.testing.assert_close(x.grad, dx, **close)
    used = layer.n_active * layer.fan_in
    rows, columns = np.nonzero(mask.numpy())
    torch.testing.assert_close(layer.values.grad[:used], dense.weight.grad[rows, columns], **close)
    assert not layer.values.grad[used:].any()
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, **close)


def strided(x):
    """The same numbers in other layouts: every second, transposed, with an offset."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77.0, dtype=x.dtype)
    wide[..., ::2] = x
    offset = torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)
    return x, wide[..., ::2], x.transpose(0, -1).contiguous().transpose(0, -1), offset


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_and_leading_dimensions_do_not_matter(dtype):
    layer = layer_of().to(dtype)
    x = batch_of(layer, 2, 3)
    grad = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = layer(x)
    x.requires_grad_()
    layer(x).backward(grad)
    dvalues = layer.values.grad.clone()
    for one in strided(x.detach()):
        for other in strided(grad):
            assert torch.equal(layer(one), wanted)
            with torch.no_grad():
                assert torch.equal(layer(one), wanted)
            layer.values.grad = None
            one = one.detach().requires_grad_()
            layer(one).backward(other)
            assert torch.equal(one.grad, x.grad)
            assert torch.equal(layer.values.grad, dvalues)
    for shape in ((6, 10), (1, 6, 10), (3, 1, 2, 10)):
        assert torch.equal(layer(x.view(shape)).reshape(2, 3, 6), wanted)
    layer.bias.grad = None
    layer(x).sum().backward()  # a gradient with strides 0
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6))
    assert torch.equal(layer(x[0, 0]), layer(x[:1, 0])[0])
    same_rows = x[:1, 0].expand(4, -1)
    assert torch.equal(layer(same_rows), layer(same_rows.contiguous()))


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10)])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(shape):
    layer = layer_of()
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert x.grad.shape == shape
    assert not layer.values.grad.any()
    assert not layer.bias.grad.any()
    with torch.no_grad():
        assert layer(x).shape == y.shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_the_same_with_and_without_a_gradient(activation):
    plain, layer = layer_of(), layer_of(activation=activation)
    functions = {
        "none": nn.Identity(),
        "relu": nn.ReLU(),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "silu": nn.SiLU(),
    }
    x = batch_of(layer, 7).requires_grad_()
    wanted = functions[activation](plain(x))
    assert torch.equal(layer(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted.detach())
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(dx, torch.autograd.grad(wanted.square().sum(), x)[0])


def test_nan_at_unconnected_places_reaches_nothing():
    layer = layer_of((6, 40), fan_in=3, n_active=4)
    connected = layer.mask.any(0)
    ablated = ~layer.mask.any(1)
    x = batch_of(layer, 5)
    x[:, ~connected] = float("nan")
    x.requires_grad_()
    y = layer(x)
    assert torch.isfinite(y).all()
    grad = torch.ones_like(y)
    grad[:, ablated] = float("inf")
    y.backward(grad)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.values.grad).all()
    assert torch.isinf(layer.bias.grad[ablated]).all()
    assert torch.equal(y[0, ablated], layer.bias[ablated])


@pytest.mark.parametrize("batch", [1, 40])
def test_subnormals_are_honoured_also_where_pytorch_flushes_them(batch):
    weight = CondensedWeight(np.ones((1, 1), np.float32), [[0]], [0], (2, 2))
    layer = CondensedLinear.from_condensed(weight)
    biased = CondensedLinear.from_condensed(weight, np.array([0, 1e-40]))
    x, grad = torch.full((batch, 2), 1e-40), torch.full((batch, 2), 1e-40)
    x.requires_grad_()
    if not torch.set_flush_denormal(True):
        pytest.skip("PyTorch cannot flush subnormals on this processor")
    try:
        with torch.no_grad():
            results = [layer(x)[:, 0], biased(x)[:, 1]]
        results += [layer(x).detach()[:, 0], *torch.autograd.grad(layer(x), x, grad)[0][:, :1].T]
    finally:
        torch.set_flush_denormal(False)
    for part in results:
        assert torch.equal(part.view(torch.int32), grad[:, 0].view(torch.int32))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_wrong_input_is_refused_also_in_tracing(device):
    layer = layer_of(dtype=ml_dtypes.bfloat16).to(device)
    cases = {
        r"x has shape \(9,\), but its last axis must be the weight's n_in=10": torch.ones(9),
        r"x has shape \(\)": torch.ones(()),
        "float16 and bfloat16 do not combine": torch.ones(2, 10, dtype=torch.float16),
        "x of dtype 'int64' is not supported; convert": torch.ones(2, 10, dtype=torch.int64),
        "x of dtype 'bool' is not supported; convert": torch.ones(2, 10, dtype=torch.bool),
    }
    for message, x in cases.items():
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode, pytest.raises(SriglError, match=message):
                layer(x.to(device))
    assert layer(torch.ones(3, 10, dtype=torch.bfloat16, device=device)).shape == (3, 6)


def test_ops_check_what_would_read_beyond_a_tensor():
    layer = layer_of()
    x, values, indices, active, counts, bias, n_in = arguments(layer, batch_of(layer, 2))
    mask = (indices, active, counts)
    inputs = (x, values, *mask, n_in, True, True, True)
    for message, op, *wrong in (
        (r"bias has shape \(5,\)", condensed_linear, x, values, *mask, bias[:5], n_in),
        (r"bias has shape \(1, 6\)", condensed_linear, x, values, *mask, bias[None], n_in),
        ("room for 16", condensed_linear, x, values[:-1], indices, active, counts + 1, bias, n_in),
        (r"indices holds \d, but must lie in", condensed_linear, x[:, :5], values, *mask, bias, 5),
        ("='tanh' is unknown", condensed_inference, x, values, *mask, bias, n_in, "tanh"),
        (r"grad has shape \(2, 5\)", condensed_linear_backward, torch.ones(2, 5), *inputs),
        (r"x has shape \(2, 10\), but", condensed_linear_backward, torch.ones(3, 6), *inputs),
    ):
        with pytest.raises(SriglError, match=message):
            op(*wrong)


# ---------------------------------------------------------------- PyTorch's own checks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fan_in", [1, 4, 7])
def test_gradcheck_first_and_second_order(fan_in, bias):
    layer = layer_of((5, 7), fan_in=fan_in, n_active=3, bias=bias)
    x = batch_of(layer, 2, 2).requires_grad_()
    inputs = [x, layer.values, *([layer.bias] if bias else [])]

    def product(x, values, bias=None):
        return condensed_linear(x, values, *arguments(layer, x)[2:5], bias, 7)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    layer = layer_of((5, 7), fan_in=2, n_active=3).to(dtype)
    for lead in ((3,), (2, 2), (), (0,)) if dtype is torch.float64 else ((3,),):
        x = batch_of(layer, *lead)
        for needs_x in (True, False):
            library.opcheck(condensed_linear, arguments(layer, x.clone().requires_grad_(needs_x)))
    x, values, *mask, _, n_in = (
        part.detach() if isinstance(part, torch.Tensor) else part for part in arguments(layer, x)
    )
    x, grad = batch_of(layer, 3), torch.ones(3, 5, dtype=dtype)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        library.opcheck(condensed_linear_backward, (grad, x, values, *mask, n_in, *needs))
    for activation in ("none", "gelu"):
        library.opcheck(
            condensed_inference, (x, values, *mask, layer.bias.detach(), n_in, activation)
        )


def test_values_kept_in_order_are_not_captured_in_a_cuda_graph():
    for op in (condensed_linear, condensed_linear_backward, condensed_inference):
        assert torch.Tag.cudagraph_unsafe in op.tags
        assert torch.Tag.pt2_compliant_tag in op.tags


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = layer_of((12, 10), fan_in=3, n_active=9, dtype=np.float32, activation="relu")
        self.second = layer_of((4, 12), fan_in=5, n_active=4, dtype=np.float32, seed=2)

    def forward(self, x):
        return self.second(self.first(x) * 2)


def gradients_of(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def move_connections(layer, seed):
    """Load another mask, with another number of active neurons and another fan-in."""
    shape = (layer.out_features, layer.in_features)
    weight = CondensedWeight.random(shape, fan_in=2, n_active=3, rng=seed)
    layer.load_condensed_(weight)
    assert layer.n_active == 3
    assert layer.fan_in == 2
    return weight


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_the_eager_one_and_outlives_a_mask_update(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Net()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))

    def check():
        torch.testing.assert_close(gradients_of(compiled, x), gradients_of(model, x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    check()
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = model(x)
        move_connections(model.first, 3)
        move_connections(model.second, 4)
        check()
        assert not torch.allclose(model(x), before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients_of(compiled, x)
        optimizer.step()
        check()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_an_exported_model_is_the_same_and_outlives_a_mask_update():
    model, x = Net(), torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=2, max=64)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
            exported = program.module()
            assert torch.equal(exported(x), model(x))
            assert torch.equal(exported(x[:3]), model(x[:3]))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        move_connections(model.first, 3)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_inputs_and_results(dtype, grad):
    layer = layer_of(dtype=np.float32)
    x = batch_of(layer, 5).requires_grad_()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        again = layer(x.to(dtype))
    assert y.dtype == again.dtype == dtype
    wanted = layer(x.to(dtype).float())
    assert torch.equal(y, wanted.to(dtype))
    assert torch.equal(y, again)
    if grad:
        y.sum().backward()
        assert layer.values.grad.dtype == x.grad.dtype == torch.float32
        torch.testing.assert_close(layer.bias.grad, torch.full((6,), 5.0))


def test_autocast_leaves_double_precision_alone_and_other_halves_combine():
    torch._dynamo.reset()
    layer, single = layer_of(), layer_of(dtype=np.float32)
    x = batch_of(layer, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer.to_linear()(x))
        assert layer.half()(x.half()).dtype == torch.bfloat16
        y = torch.compile(single, fullgraph=True, backend="aot_eager")(x.float())
        y.sum().backward()
        assert torch.equal(y, single(x.float()))
    assert y.dtype == torch.bfloat16
    torch._dynamo.reset()


def test_functional_call_takes_other_tensors():
    layer, other = layer_of(), layer_of(seed=7)
    x = batch_of(layer, 3)
    state = {name: tensor.detach().clone() for name, tensor in other.state_dict().items()}
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(layer, state, (x,)), other(x))
        assert_right(layer, x)
    only_values = {"values": layer.values.detach() * 2}
    doubled = torch.func.functional_call(layer, only_values, (x,))
    torch.testing.assert_close(doubled - layer.bias, 2 * (layer(x) - layer.bias))


def test_vmap_falls_back_to_a_loop():
    layer = layer_of()
    x = batch_of(layer, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, layer(x))


def test_no_graph_is_built_and_no_input_kept_unless_they_are_needed():
    layer = layer_of()
    x = batch_of(layer, 2)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        assert layer(x).is_inference()
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.values.grad is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(batch_of(layer, 50).requires_grad_())
    assert all(tensor.shape != (50, 10) for tensor in kept)


def test_checkpointing_gives_the_same_gradients():
    model, x = Net(), torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    wanted = gradients_of(model, x)
    checkpoint = torch.utils.checkpoint.checkpoint
    first, model.first.forward = model.first.forward, None
    model.first.forward = lambda x: checkpoint(first, x, use_reentrant=False)
    for gradient, expected in zip(gradients_of(model, x), wanted, strict=True):
        assert torch.equal(gradient, expected)


# ---------------------------------------------------------------- the cache of packings


def fused(make, **options):
    def step(layer):
        optimizer = make([layer.values], fused=True, **options)
        layer.values.grad = torch.ones_like(layer.values)
        optimizer.step()

    return step


def in_no_grad(write):
    def run(layer):
        with torch.no_grad():
            write(layer)

    return run


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.values.mul_(2)


def by_a_compiled_optimizer(layer):
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    layer.values.grad = torch.ones_like(layer.values)
    torch.compile(optimizer.step, backend="aot_eager")()


def move_one_connection(layer):
    """Write to the indices and nothing else."""
    fan_in = layer.fan_in
    columns = layer.indices[:fan_in].tolist()
    unused = next(c for c in range(layer.in_features) if c not in columns)
    layer.indices[:fan_in] = torch.tensor(sorted([unused, *columns[1:]]), dtype=torch.int32)


def ablate_the_last_neuron(layer):
    layer.active[layer.n_active - 1] = -1
    layer.counts[0] -= 1


def revive_another_neuron(layer):
    rows = layer.active[: layer.n_active].tolist()
    free = next(row for row in range(layer.out_features) if row not in rows)
    layer.active[: len(rows)] = torch.tensor(sorted([*rows[1:], free]))


def one_value_by_a_fused_optimizer(layer):
    """Change a value that is not among those compared."""
    layer.values.grad = torch.zeros_like(layer.values)
    layer.values.grad[-6] = 1
    torch.optim.SGD([layer.values], lr=0.1, fused=True).step()


def written(seed=0):
    """A layer with more values than are compared."""
    return layer_of((40, 60), fan_in=9, n_active=30, seed=seed)


WRITES = {
    "in place": in_no_grad(lambda layer: layer.values.mul_(2)),
    "one value": in_no_grad(lambda layer: layer.values[7].mul_(2)),
    "foreach": in_no_grad(lambda layer: torch._foreach_mul_([layer.values], 2.0)),
    "a view": in_no_grad(lambda layer: layer.values.detach()[2:].mul_(2)),
    "inference mode": in_inference_mode,
    "fused SGD": fused(torch.optim.SGD, lr=0.1),
    "fused AdamW": fused(torch.optim.AdamW, lr=0.1),
    "fused SGD of one value": one_value_by_a_fused_optimizer,
    "a compiled optimizer": by_a_compiled_optimizer,
    ".data =": lambda layer: setattr(layer.values, "data", layer.values.data * 2),
    ".data in place": lambda layer: layer.values.data.mul_(2),
    "NumPy": lambda layer: np.multiply(
        layer.values.detach().numpy(), 2, layer.values.detach().numpy()
    ),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(layer.parameters()), layer.parameters()
    ),
    "load_state_dict": lambda layer: layer.load_state_dict(written(5).state_dict()),
    "assigned state": lambda layer: layer.load_state_dict(written(5).state_dict(), assign=True),
    "load_condensed_": lambda layer: move_connections(layer, 5),
    "another type": lambda layer: layer.float().double(),
    "a new parameter": lambda layer: setattr(
        layer, "values", nn.Parameter(layer.values.detach() * 2)
    ),
    "indices": move_one_connection,
    "active and counts": ablate_the_last_neuron,
    "active": revive_another_neuron,
    "counts": lambda layer: layer.counts[0].sub_(1),
    "indices by .data =": lambda layer: setattr(layer.indices, "data", written(6).indices.clone()),
    "a new buffer": lambda layer: setattr(layer, "indices", written(6).indices),
    "bias": in_no_grad(lambda layer: layer.bias.mul_(2)),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_layer_computes_with_its_numbers_however_they_were_written(how):
    layer = written()
    x = batch_of(layer, 3)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    before = layer(x).detach()
    WRITES[how](layer)
    assert_right(layer, x.to(layer.values.dtype))
    if how != "another type":
        assert not torch.equal(layer(x), before)
    WRITES[how](layer)
    assert_right(layer, x)


UNCOUNTED = {
    ".data": lambda tensor, new: tensor.data.copy_(new),
    "NumPy": lambda tensor, new: np.copyto(tensor.detach().numpy(), new.numpy()),
    "DLPack": lambda tensor, new: np.copyto(np.from_dlpack(tensor.detach()), new.numpy()),
    "storage": lambda tensor, new: tensor.untyped_storage().copy_(new.untyped_storage()),
    "memory": lambda tensor, new: ctypes.memmove(tensor.data_ptr(), new.data_ptr(), new.nbytes),
    "shared": lambda tensor, new: tensor.share_memory_().data.copy_(new),
    "an alias": lambda tensor, new: setattr(tensor, "data", new),
}
"""Ways to write a tensor that do not raise PyTorch's count of its writes."""


@pytest.mark.parametrize("name", ["values", *BUFFERS])
@pytest.mark.parametrize("how", UNCOUNTED)
def test_writes_that_pytorch_does_not_count_are_found(how, name):
    layer = layer_of((40, 60), fan_in=9, n_active=30, seed=4)
    x = batch_of(layer, 3)
    before = layer(x)
    new = getattr(layer, name).detach().clone()
    place, number = {
        "values": (7, -5.0),
        "indices": (8, 59),
        "active": (0, 0),
        "counts": (0, 29),
    }[name]
    assert new[place] != number
    new[place] = number
    UNCOUNTED[how](getattr(layer, name), new)
    assert_right(layer, x)
    assert not torch.equal(layer(x), before)


def test_a_layer_can_be_converted_by_swapping_its_tensors():
    """PyTorch refuses to swap tensors that have weak references."""
    layer = written()
    x = batch_of(layer, 3)
    layer(x).sum().backward()
    layer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_right(layer, x.float())


def test_a_frozen_layer_is_not_compared_and_refuses_the_writes_that_pytorch_counts():
    model = nn.Sequential(written(), nn.ReLU(), layer_of((6, 40), fan_in=5))
    x = batch_of(model[0], 3)
    expected = model(x).detach()
    assert freeze(model) is model
    assert not model[0].values.requires_grad
    with mock.patch.object(packing, "holds", side_effect=AssertionError("compared")):
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    other = copy.deepcopy(model)
    other[0].values.data.mul_(2)  # a copy is not frozen
    assert_right(other[0], x)
    for name in ("values", *BUFFERS):
        freeze(model)
        with torch.no_grad():
            getattr(model[0], name).mul_(1)
        with pytest.raises(SriglError, match=r"frozen layer was written.*unfreeze"):
            model(x)
    unfreeze(model)
    assert torch.equal(model(x), expected)
    model[0].values.data.mul_(2)
    assert_right(model[0], x)


def test_a_replaced_tensor_of_a_frozen_layer_is_read():
    layer = freeze(written())
    x = batch_of(layer, 3)
    for factor in (2, 3, 4):  # memory that is freed may be used again
        layer.values = nn.Parameter(layer.values.detach() * factor)
        assert_right(layer, x)
        gc.collect()


def test_another_tensor_of_the_same_memory_is_read_anew():
    """Each tensor has its own count of writes, which is 0 in both."""
    layer = written()
    layer.values = nn.Parameter(layer.values.detach().clone())
    x = batch_of(layer, 2)
    before = layer(x)
    layer.values.data[7] += 1
    other = layer.values.data
    assert (other.data_ptr(), other._version) == (layer.values.data_ptr(), layer.values._version)
    result = torch.func.functional_call(layer, {"values": other}, (x,))
    torch.testing.assert_close(result, layer.to_linear()(x))
    assert not torch.equal(result, before)


@pytest.mark.parametrize("name", ["values", "active", "counts"])
def test_memory_that_was_packed_is_freed_when_the_packing_is_not_before(name):
    """Otherwise another tensor at the same address would count as the one that was packed."""
    layer = written()
    x = batch_of(layer, 2)
    layer(x)
    tensor = getattr(layer, name)
    memory = StorageWeakRef(tensor.untyped_storage())
    tensor.data = tensor.data.clone()
    assert not memory.expired()
    assert_right(layer, x)
    assert memory.expired()


def test_a_layer_made_in_inference_mode_is_read_each_time():
    with torch.inference_mode():
        layer = layer_of()
        x = batch_of(layer, 3)
        for _ in range(3):
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            layer.values[4] += 1
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            move_one_connection(layer)


def test_tensors_at_the_address_of_freed_ones_are_packed_anew():
    gc.collect()
    before, identities = len(packing._packings), set()
    memory = {name: t.numpy().copy() for name, t in layer_of().state_dict().items()}
    for seed in range(20):
        for name, tensor in layer_of(seed=seed).state_dict().items():
            memory[name][...] = tensor.numpy()
        tensors = {name: torch.from_numpy(array) for name, array in memory.items()}
        identities.add(id(tensors["indices"]))
        layer = layer_of()
        x = batch_of(layer, 2)
        values, *mask, bias = (tensors[name] for name in ("values", *BUFFERS, "bias"))
        result = condensed_inference(x, values, *mask, bias, 10, "none")
        layer.load_state_dict(tensors)
        torch.testing.assert_close(result, layer.to_linear()(x).detach())
        del layer, tensors, values, mask, bias
    assert len(identities) < 20, "no address was reused, so the test shows nothing"
    assert len(packing._packings) == before


def test_packings_are_made_once_for_a_mask_and_once_for_values(monkeypatch):
    made, arranged = [], []
    layer = layer_of((40, 60), fan_in=9, n_active=30)
    backend = packing.get_backend(operation="condensed_matmul_backward")
    prepared = type(backend.prepare(layer.to_condensed()))
    for cls, name, calls in ((type(backend), "prepare", made), (prepared, "with_values", arranged)):
        method = getattr(cls, name)
        spy = lambda self, w, method=method, calls=calls: calls.append(w) or method(self, w)  # noqa: E731
        monkeypatch.setattr(cls, name, spy)

    def counts():
        result = len(made), len(arranged)
        made.clear(), arranged.clear()
        return result

    x = batch_of(layer, 3)
    for _ in range(3):
        with torch.no_grad():
            layer(x)
    layer(x).sum().backward()
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    assert counts() == (1, 0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).sum().backward()
        layer(x).sum().backward()
        optimizer.step()
    assert counts() == (0, 2)
    move_connections(layer, 1)
    layer(x).sum().backward()
    assert counts() == (1, 0)
    with torch.no_grad():  # as DistributedDataParallel does before each forward pass
        for name in BUFFERS:
            getattr(layer, name).copy_(getattr(layer, name).clone())
        layer(x)
    layer.requires_grad_(False)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1).step()
    layer(x)
    assert counts() == (0, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_uses_as_many_threads_as_pytorch(threads, monkeypatch):
    layer = layer_of((300, 400), fan_in=100, n_active=290)
    x = batch_of(layer, 256)
    y = layer(x)
    asked, before = [], torch.get_num_threads()
    plan = type(packing.packing_of(*arguments(layer, x)[1:5], 400).plan)
    for name in ("fast_product", "write_product", "write_gradients"):
        call = getattr(plan, name)

        def spy(*args, call=call, **options):
            asked.append(inspect.signature(call).bind(*args, **options).arguments["threads"])
            return call(*args, **options)

        monkeypatch.setattr(plan, name, spy)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), y)
        layer(x).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert len(asked) >= 3
    assert set(asked) == {threads}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_starting_the_kernels_threads_leaves_pytorch_its_own(way):
    program = f"""
import torch
from srigl_core.torch import CondensedLinear, ops
torch.set_num_threads(2)
layer, x = CondensedLinear(400, 300, fan_in=100), torch.randn(256, 400)
if {way == "forward"}:
    layer(x)
else:
    buffers = layer.indices, layer.active, layer.counts
    needs = True, True, True
    with torch.no_grad():
        ops.condensed_linear_backward(torch.ones(256, 300), x, layer.values, *buffers, 400, *needs)
print(torch.get_num_threads())
"""
    assert run_python(program, NUMBA_NUM_THREADS="3") == "2\n"


def test_threads_share_a_layer():
    layer = layer_of((200, 300), fan_in=30, n_active=150, dtype=np.float32)
    x = batch_of(layer, 8)
    wanted = gradients_of(layer, x)[:2]
    layer.values.grad = layer.bias.grad = None
    wrong, start = [], threading.Barrier(6)

    def work(number):
        start.wait()
        for _ in range(15):
            if number % 2:
                with torch.no_grad():
                    good = torch.equal(layer(x), wanted[0])
            else:
                mine = x.clone().requires_grad_()
                y = layer(mine)
                (dx,) = torch.autograd.grad(y.square().sum(), mine)
                good = torch.equal(y, wanted[0]) and torch.equal(dx, wanted[1])
            if not good:
                wrong.append(number)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            layer.values.mul_(1)  # the same numbers, which are packed again
            layer.indices.mul_(1)
    assert not wrong


def test_replicas_of_a_layer_share_its_gradient():
    layer = layer_of()
    x = batch_of(layer, 6)
    replicas = []
    for _ in range(2):  # as DataParallel makes them
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter.clone())
        for name, buffer in layer.named_buffers():
            replica._buffers[name] = buffer.clone()
        replicas.append(replica)
    result = torch.cat([replica(part) for replica, part in zip(replicas, x.split(3), strict=True)])
    assert torch.equal(result, layer(x))
    result.sum().backward()
    together = layer.values.grad.clone()
    layer.values.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(together, layer.values.grad)


# ---------------------------------------------------------------- the module


@pytest.mark.parametrize(
    ("options", "fan_in", "budget", "dtype"),
    [
        ({"fan_in": 3}, 3, 24, torch.float16),
        ({"nnz_budget": 30}, 3, 30, torch.bfloat16),
        ({"sparsity": 0.8}, 4, 32, torch.float32),
        ({"fan_in": 20}, 20, 160, torch.float64),
    ],
    ids=str,
)
def test_a_new_layer_has_random_connections_within_its_budget(options, fan_in, budget, dtype):
    layer = CondensedLinear(20, 8, **options, dtype=dtype, rng=0)
    assert (layer.in_features, layer.out_features) == (20, 8)
    assert (layer.fan_in, layer.n_active, layer.nnz_budget) == (fan_in, 8, budget)
    assert torch.equal(layer.mask.sum(1), torch.full((8,), fan_in))
    assert layer.values.dtype == layer.bias.dtype == dtype
    assert layer.values.shape == layer.indices.shape == (budget,)
    used = 8 * fan_in
    for numbers in (layer.values[:used], layer.bias):
        assert numbers.float().abs().max() <= fan_in**-0.5 * 1.01
        assert numbers.unique().numel() > 1
    assert not layer.values[used:].any()
    assert not layer.indices[used:].any()
    same = CondensedLinear(20, 8, **options, dtype=dtype, rng=np.random.default_rng(0))
    assert layer.to_condensed() == same.to_condensed()
    assert CondensedLinear(20, 8, **options, bias=False).bias is None


def test_pytorchs_seed_draws_the_layer():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(CondensedLinear(30, 10, fan_in=4).to_condensed())
    assert drawn[0] == drawn[1] != drawn[2]
    layer = CondensedLinear(30, 10, fan_in=4, rng=3)
    layer.reset_parameters(4)
    assert layer.to_condensed() == CondensedLinear(30, 10, fan_in=4, rng=4).to_condensed()


WRONG = {
    "exactly one": [{}, {"fan_in": 2, "sparsity": 0.5}, {"nnz_budget": 9, "fan_in": 2}],
    "fan_in=11 must be between 1 and 10": [{"fan_in": 11}],
    "fan_in=0": [{"fan_in": 0}],
    "fan_in=2.0 must be an integer": [{"fan_in": 2.0}],
    "nnz_budget=5 must be between 6 and 60": [{"nnz_budget": 5}, {"sparsity": 0.91}],
    "nnz_budget=61": [{"nnz_budget": 61}],
    "sparsity=1.5": [{"sparsity": 1.5}],
    "activation='tanh' is unknown": [{"fan_in": 2, "activation": "tanh"}],
    "rng=-1": [{"fan_in": 2, "rng": -1}],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_layer_that_cannot_be_is_refused(message):
    for options in WRONG[message]:
        with pytest.raises(SriglError, match=message):
            CondensedLinear(10, 6, **options)


def test_sizes_that_int32_cannot_number_are_refused():
    with pytest.raises(SriglError, match="in_features=2147483648"):
        CondensedLinear(2**31, 2, fan_in=2)
    with pytest.raises(SriglError, match="out_features=0"):
        CondensedLinear(2, 0, fan_in=2)
    wide = CondensedWeight(np.ones((1, 1), np.float32), [[2**31]], [0], (1, 2**31 + 1))
    with pytest.raises(SriglError, match="in_features=2147483649"):
        CondensedLinear.from_condensed(wide)


def test_columns_beyond_sixteen_bits():
    weight = CondensedWeight.random((3, 70_000), fan_in=500, dtype=np.float64, rng=0)
    layer = CondensedLinear.from_condensed(weight)
    assert layer.indices.max() > 65_536
    assert_right(layer, batch_of(layer, 2))


@pytest.mark.parametrize(("dtype", "bias"), [*zip(DTYPES, (1, 0, 1, 0), strict=True)], ids=str)
def test_a_linear_layer_is_condensed_and_back(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(10, 6, bias=bool(bias), dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    mask = layer_of().mask
    for argument in (mask, mask.numpy()):
        layer = CondensedLinear.from_linear(linear, argument, nnz_budget=20)
        assert torch.equal(layer.mask, mask)
        assert (layer.n_active, layer.fan_in, layer.nnz_budget) == (4, 3, 20)
        assert not layer.training
        assert not layer.values.requires_grad
        assert layer.bias is None or layer.bias.requires_grad
        back = layer.to_linear()
        assert type(back) is nn.Linear
        assert (back.in_features, back.out_features) == (10, 6)
        assert torch.equal(back.weight, torch.where(mask, linear.weight, 0))
        assert not back.training
        assert not back.weight.requires_grad
        assert (back.bias is None) == (not bias)
        if bias:
            assert torch.equal(back.bias, linear.bias)
            assert back.bias.requires_grad
            with torch.no_grad():
                layer.bias += 1
            assert not torch.equal(back.bias, layer.bias)
            assert not torch.equal(linear.bias, layer.bias)
    assert CondensedLinear.from_linear(linear, mask).nnz_budget == 12


def test_masks_and_modules_that_cannot_be_condensed_are_refused():
    linear = nn.Linear(10, 6)
    mask = layer_of().mask
    uneven = mask.clone()
    uneven[mask.any(1).nonzero()[0], mask[mask.any(1)][0].nonzero()[0]] = False
    row, weight = int(mask.any(1).nonzero()[0]), layer_of().to_condensed()
    from_linear, from_condensed = CondensedLinear.from_linear, CondensedLinear.from_condensed
    for message, make, *inputs in (
        (rf"1 of 4 active rows .* 3 weights \(row {row} has 2\)", from_linear, linear, uneven),
        ("no active weight", from_linear, linear, mask & False),
        (r"must be an? .*of bool", from_linear, linear, mask.float()),
        (r"mask has shape \(10, 6\)", from_linear, linear, mask.T),
        ("must be a torch.nn.Linear, got Conv2d", from_linear, nn.Conv2d(1, 1, 1), mask),
        (r"bias has shape \(7,\)", from_condensed, weight, np.ones(7)),
        ("must be a CondensedWeight, got ndarray", from_condensed, weight.to_dense()),
    ):
        error = ValueTypeError if message.startswith("must be a") else SriglError
        with pytest.raises(error, match=message):
            make(*inputs)
    with pytest.raises(SriglError, match="nnz_budget=11 must be between 12 and 60"):
        from_linear(linear, mask, nnz_budget=11)


def test_another_weight_is_taken_over_in_place():
    layer = layer_of(budget=20)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for seed, (fan_in, n_active) in enumerate([(10, 2), (1, 1), (4, 5), (3, 6)]):
        weight = CondensedWeight.random(
            (6, 10), fan_in=fan_in, n_active=n_active, dtype=np.float64, rng=seed
        )
        layer.load_condensed_(weight)
        assert layer.to_condensed() == weight
        used = weight.nnz
        assert not layer.values[used:].any()
        assert not layer.indices[used:].any()
        assert (layer.active[n_active:] == -1).all()
        assert_right(layer, batch_of(layer, 3))
    for name, tensor in tensors.items():
        assert getattr(layer, name) is tensor
        assert tensor.data_ptr() == addresses[name]
    before = copy.deepcopy(layer.state_dict())
    for shape, fan_in in (((6, 10), 4), ((6, 11), 3), ((5, 10), 3)):
        with pytest.raises(SriglError, match="does not fit a layer of shape"):
            layer.load_condensed_(CondensedWeight.random(shape, fan_in=fan_in, rng=0))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    with pytest.raises(ValueTypeError, match="must be a CondensedWeight"):
        layer.load_condensed_(layer)


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1), torch.optim.AdamW]
)
def test_values_after_the_active_ones_stay_zero(make):
    layer = layer_of()
    optimizer = make(layer.parameters(), lr=0.1)
    before = layer.values.detach().clone()
    for step in range(5):
        optimizer.zero_grad()
        layer(batch_of(layer, 4, seed=step)).square().sum().backward()
        assert not layer.values.grad[12:].any()
        optimizer.step()
    assert not layer.values[12:].any()
    assert (layer.values != before)[:12].all()
    for part in optimizer.state[layer.values].values():
        assert part.shape != layer.values.shape or not part[12:].any()


def by_state_dict(layer):
    other = layer_of(seed=9, activation="relu")
    other.load_state_dict(layer.state_dict())
    return other


def by_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_state_dict, copy.deepcopy, by_file])
def test_a_copy_is_the_same_and_independent(duplicate):
    layer = layer_of(activation="relu")
    x = batch_of(layer, 3)
    wanted = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), wanted)
    assert other.to_condensed() == layer.to_condensed()
    assert repr(other) == repr(layer)
    with torch.no_grad():
        other.values.mul_(2)
        other.bias.zero_()
    move_connections(other, 1)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(other(x), wanted)


def bad_states():
    """Functions that spoil a state, by the message that names the fault."""

    def put(name, place, number):
        return lambda state: state[name].__setitem__(place, number)

    return {
        r"0\.indices holds 10, but must lie in 0..9": put("0.indices", 2, 10),
        r"0\.indices holds -1": put("0.indices", 0, -1),
        r"0\.indices must be strictly ascending": put("0.indices", slice(0, 3), 4),
        r"0\.active holds 6": put("0.active", 3, 6),
        r"0\.active holds -1": put("0.active", 3, -1),
        r"0\.active must be strictly ascending": put("0.active", slice(0, 4), 1),
        r"0\.counts holds n_active=7": put("0.counts", 0, 7),
        r"0\.counts holds n_active=0": put("0.counts", 0, 0),
        r"0\.counts holds n_active=4 and fan_in=11": put("0.counts", 1, 11),
        r"0\.counts holds .* room for 17 values": put("0.counts", 1, 5),
        r"0\.values of the state has shape \(18,\).*\(17,\)": lambda state: state.update(
            {"0.values": torch.zeros(18)}
        ),
        r"0\.indices of the state has shape": lambda state: state.update(
            {"0.indices": torch.zeros(18)}
        ),
        r"0\.bias of the state has shape": lambda state: state.update({"0.bias": torch.zeros(7)}),
    }


@pytest.mark.parametrize("message", bad_states())
def test_a_state_with_a_bad_mask_is_refused_and_the_layer_left_as_it_was(message):
    model = nn.Sequential(layer_of())
    before = copy.deepcopy(model.state_dict())
    x = batch_of(model[0], 2)
    wanted = model(x)
    state = copy.deepcopy(nn.Sequential(layer_of(seed=4)).state_dict())
    bad_states()[message](state)
    with pytest.raises(SriglError, match=message):
        model.load_state_dict(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), wanted)


def test_a_part_of_a_state_is_taken_if_the_mask_stays_valid():
    layer, other = layer_of(), layer_of(seed=4)
    layer.load_state_dict({"values": other.values}, strict=False)
    assert torch.equal(layer.values, other.values)
    fewer = {"counts": torch.tensor([3, 3])}
    layer.load_state_dict(fewer, strict=False)
    assert layer.n_active == 3
    with pytest.raises(SriglError, match="counts holds n_active=9"):
        layer.load_state_dict({"counts": torch.tensor([9, 1])}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"values": other.values})


def test_a_layer_without_memory_is_filled_by_a_state():
    layer = CondensedLinear(10, 6, nnz_budget=17, device="meta", dtype=torch.float64)
    assert (
        repr(layer) == "CondensedLinear(in_features=10, out_features=6, nnz_budget=17, bias=True)"
    )
    wanted = layer_of()
    layer.load_state_dict(layer.state_dict())
    layer.load_state_dict(wanted.state_dict(), assign=True)
    x = batch_of(wanted, 2)
    assert torch.equal(layer(x), wanted(x))
    assert repr(layer) == (
        "CondensedLinear(in_features=10, out_features=6, fan_in=3, n_active=4, nnz_budget=17, "
        "bias=True)"
    )
    assert "activation=gelu" in repr(layer_of(activation="gelu"))


LARGE = """
import json, torch
from srigl_core.torch import CondensedLinear

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def train(n, fan_in, batch):
    layer = CondensedLinear(n, n, fan_in=fan_in, rng=0)
    optimizer = torch.optim.AdamW(layer.parameters())
    for step in range(2):
        x = torch.randn(batch, n, requires_grad=True)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    layer.load_condensed_(layer.to_condensed())
    with torch.no_grad():
        layer(x)
    return layer

train(64, 4, 8)
before = peak()
layer = train(16384, 16, 8)
condensed = peak()
layer.mask
print(json.dumps([condensed - before, peak() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_nothing_of_the_dense_size_is_ever_allocated():
    """Not even a mask with one byte for each place, which would be 256 MiB."""
    training, with_a_mask = json.loads(run_python(LARGE, OMP_NUM_THREADS="1"))
    assert training < 16384**2 / 4
    assert with_a_mask > 16384**2


def test_without_pytorch_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from srigl_core import BackendUnavailableError\n"
        "try:\n    import srigl_core.torch\n"
        "except BackendUnavailableError as error:\n    print(isinstance(error, ImportError), error)"
    )
    message = run_python(program)
    assert message.startswith("True srigl_core.torch needs PyTorch")
    assert "pip install torch" in message


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_arrays_that_no_tensor_can_view_are_copied(dtype):
    array = np.arange(6, dtype=dtype)
    packed = np.zeros(6, [("mark", "u1"), ("number", dtype)])
    packed["number"] = array
    for one in (array[::-1], packed["number"]):
        np.testing.assert_array_equal(as_numpy(from_numpy(one)), one)
    from_numpy(array[::2])[1] = 9
    assert array[2] == 9


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.int32], ids=str)
def test_tensors_and_arrays_share_their_memory(dtype):
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype).T
    array = as_numpy(tensor)
    assert array.shape == (3, 2)
    assert (array.dtype == ml_dtypes.bfloat16) == (dtype is torch.bfloat16)
    np.testing.assert_array_equal(array.astype(float), tensor.double().numpy())
    tensor[0, 0] = 1
    assert array[0, 0] == 1
    back = from_numpy(array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = from_numpy(array)
    assert torch.equal(copied, tensor)
    assert copied.data_ptr() != tensor.data_ptr()
    if dtype.is_floating_point:
        assert as_numpy(tensor.requires_grad_()).shape == (3, 2)


def test_plain_tensors_go_past_the_dispatcher_with_the_bits_of_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **kwargs or {})

    seen = []
    layer = CondensedLinear(20, 9, fan_in=4, rng=0)
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def results():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.values, layer.bias))

    plain = results()
    assert "CondensedLinearFunction" in plain[0].grad_fn.name()
    with Seen():
        dispatched = results()
    assert {
        "srigl_core.condensed_linear.default",
        "srigl_core.condensed_linear_backward.default",
    } <= {*seen}
    for got, expected in zip(plain, dispatched, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), plain[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    y = layer(x).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    assert dx.requires_grad


@pytest.mark.parametrize("kind", ["condensed", "quantised", "row of layers"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_inputs_that_are_views_with_another_sign_are_read(kind, has_gradient):
    """PyTorch keeps the sign of `x.conj().imag` as a bit of the tensor, which NumPy cannot read."""
    layers = [CondensedLinear(16, 16, fan_in=4, rng=i) for i in range(2)]
    model = CondensedSequential(*(layers if kind == "row of layers" else layers[:1]))
    if kind == "quantised":
        quantize(model)
    x = torch.complex(torch.ones(3, 16), torch.randn(3, 16)).conj().imag
    assert x.is_neg()
    with torch.set_grad_enabled(has_gradient):
        wanted = [model(x.clone()) for _ in range(3)][-1]
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["condensed", "quantised", "row of layers"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (3.0, r"x must be a torch\.Tensor, got float"),
        ([[1.0] * 16], r"x must be a torch\.Tensor, got list"),
        (None, r"x must be a torch\.Tensor, got NoneType"),
        ("nested", "x is a nested tensor.*to_padded_tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_inputs_of_another_kind_are_refused(kind, x, message):
    layers = [CondensedLinear(16, 16, fan_in=4, rng=i) for i in range(2)]
    model = CondensedSequential(*(layers if kind == "row of layers" else layers[:1]))
    if kind == "quantised":
        quantize(model)
    if x == "nested":
        x = torch.nested.nested_tensor([torch.ones(2, 16)])
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(ValueTypeError, match=message):
            model(x)


def test_a_layer_without_memory_says_what_to_do():
    with torch.device("meta"):
        layer = CondensedLinear(16, 16, fan_in=4)
    for read in (layer.to_condensed, lambda: quantize(nn.Sequential(layer))):
        with pytest.raises(ValueTypeError, match=r"on the device meta.*to_empty"):
            read()
    model = nn.Sequential(CondensedLinear(16, 16, fan_in=4, rng=0))
    with torch.device("meta"):  # a layer on the CPU is quantised there
        quantize(model)
    assert model(torch.ones(2, 16)).shape == (2, 16)
