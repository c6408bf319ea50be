"""The launch model: what it chooses on GPUs that are not here, and its bank conflicts."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from simulated import SimulatedDevice
from typer.testing import CliRunner

from srigl_core import CondensedWeight, prepare
from srigl_core._arrays.dtypes import value_dtype
from srigl_core.backends.cupy_gpu.gpu_backend import CAPABILITIES, GpuBackend
from srigl_core.backends.cupy_gpu.launch_model import (
    LaunchModel,
    bank_factor,
    padded_connections,
    resident_blocks,
)
from srigl_core.backends.cupy_gpu.layouts import Layouts
from srigl_core.backends.cupy_gpu.products import Products
from srigl_core.backends.cupy_gpu.tiles import rows_of_tile
from srigl_core.benchmarks.cases import HEADLINE, Case, Layer
from srigl_core.benchmarks.predict import GPUS, against_dense, in_the_docs, predicted, table
from srigl_core.cli.app import app

BATCHES = (1, 8, 64, 256, 2048)
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
NARROW = ("float16", "bfloat16")
by_name = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.properties.name)
H200 = next(gpu for gpu in GPUS if gpu.properties.name == "H200")


def model_of(layer, gpu):
    return LaunchModel(gpu.properties, layer.n_out, layer.n_in, layer.n_active, layer.fan_in)


def blocks_of_weight(density_k, lanes):
    """Return the places of a tile of a random mask, (chunks, members, 4)."""
    device = SimpleNamespace(upload=np.asarray, finish=lambda: None, is_capturing=lambda: False)
    weight = CondensedWeight.random((256, 3072), fan_in=density_k, rng=0)
    tiles = Layouts(weight, device, H200.properties.block_shared_bytes).tiles(lanes)
    return tiles.places.reshape(-1, 32 // lanes, 4)


@by_name
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_choice_fits_the_device_and_shares_quads_evenly(gpu, sparsity):
    layer = Layer.random(*HEADLINE, sparsity)
    model, properties = model_of(layer, gpu), gpu.properties
    for batch, dtype in ((b, np.dtype(d)) for b in BATCHES for d in ("float16", "float32")):
        for of_columns in (False, True):
            chosen = model.tile(batch, dtype, of_columns=of_columns)
            n_neurons, n_inputs = HEADLINE if of_columns else HEADLINE[::-1]
            tile_rows, _ = rows_of_tile(n_inputs, chosen.lanes, properties.block_shared_bytes)
            shared = 16 * chosen.lanes * (tile_rows + 1)
            assert shared <= properties.block_shared_bytes
            assert chosen.tiles * chosen.lanes * 16 >= batch * dtype.itemsize
            assert 1 <= chosen.splits <= -(-n_neurons * chosen.lanes // 32)
            assert 16 <= chosen.warps <= 32
            assert chosen.warps % chosen.lanes == 0
        gradient = model.gradient(batch, dtype)
        assert 16 <= gradient.warps <= 32
        assert gradient.splits <= -(-batch * dtype.itemsize // 64)
    for batch in (1, 2, 3, 8):
        stream = model.stream(batch, np.dtype(np.float32))
        assert batch <= stream.rows
        assert stream.shared_bytes in (0, layer.n_in * stream.rows * 4)
        assert stream.shared_bytes <= properties.block_shared_bytes


@by_name
def test_no_prediction_is_below_its_floor(gpu):
    for sparsity in SPARSITIES:
        layer = Layer.random(*HEADLINE, sparsity)
        cases = [Case("forward", layer, batch=batch) for batch in BATCHES]
        cases += [Case("backward", layer, batch=batch) for batch in (64, 256, 2048)]
        for case in cases:
            prediction = predicted(case, gpu)
            assert prediction.floor <= prediction.time < 1e5


def test_the_papers_layer_is_staged_on_its_gpu_at_batch_eight():
    """On a TITAN V the inputs of eight rows take all the shared memory that a block can have."""
    titan = next(gpu for gpu in GPUS if gpu.properties.name == "TITAN V")
    model = model_of(Layer.random(*HEADLINE, 0.9), titan)
    assert model.stream(8, np.dtype(np.float32)).shared_bytes == titan.properties.block_shared_bytes


@by_name
def test_a_quantised_value_is_read_as_a_byte(gpu):
    """Where the weight's bytes bound the time, it is that of the bytes: a value and its index."""
    layer, float32 = Layer(768, 670_000, 32, 670_000), np.dtype(np.float32)
    wide = model_of(layer, gpu)
    narrow = replace(wide, is_quantized=True)
    assert wide.stream(1, float32).lanes == narrow.stream(1, float32).lanes
    slower, faster = (model.stream(1, float32).cycles for model in (wide, narrow))
    assert faster == pytest.approx(slower * (1 + 2) / (4 + 2), rel=0.1)
    device = SimpleNamespace(properties=gpu.properties)
    weight = CondensedWeight.random((8, 16), fan_in=4, rng=0)
    assert not Products(weight, device).model.is_quantized
    assert Products(weight.quantize(), device).model.is_quantized


def test_a_grid_of_few_tiles_has_as_many_blocks_as_the_device_runs():
    model = model_of(Layer.random(*HEADLINE, 0.9), H200)
    chosen = model.tile(64, np.dtype(np.float32))
    assert 0.75 * H200.properties.processors <= chosen.tiles * chosen.splits


def test_a_sparser_layer_prefers_narrow_tiles():
    """With few connections staging counts for more than bank conflicts."""
    lanes = [
        model_of(Layer.random(*HEADLINE, sparsity), H200).tile(256, np.dtype(np.float32)).lanes
        for sparsity in SPARSITIES
    ]
    assert sorted(lanes, reverse=True) == lanes
    assert lanes[-1] < lanes[0]


def test_more_of_any_resource_is_never_slower():
    properties, layer = H200.properties, Layer.random(*HEADLINE, 0.9)
    more = (
        replace(properties, processors=2 * properties.processors),
        replace(properties, processor_shared_bytes=2 * properties.processor_shared_bytes),
    )
    for batch in (64, 256, 2048):
        cycles = model_of(layer, H200).tile(batch, np.dtype(np.float32)).cycles
        for each in more:
            chosen = model_of(layer, replace(H200, properties=each))
            assert chosen.tile(batch, np.dtype(np.float32)).cycles <= cycles


def test_residency_is_limited_by_threads_registers_and_memory():
    properties = replace(
        GPUS[0].properties, processor_threads=1536, processor_shared_bytes=100 << 10
    )
    assert resident_blocks(properties, 1024, 1 << 10) == 1
    assert resident_blocks(properties, 512, 1 << 10) == 2  # 64 registers a thread
    assert resident_blocks(properties, 512, 1 << 10, registers=32) == 3
    assert resident_blocks(properties, 256, 49 << 10) == 2
    assert resident_blocks(properties, 256, 99 << 10) == 1


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("fan_in", [614, 307, 154, 31])
def test_bank_conflicts_are_those_that_the_packing_leaves(lanes, fan_in):
    places = blocks_of_weight(fan_in, lanes)
    classes = 8 // lanes
    banks = places // lanes % classes  # (chunks, members, 4)
    shared = banks.reshape(len(banks), 32 // lanes // classes, classes, 4)
    counts = [(shared == bank).sum(axis=2) for bank in range(classes)]
    counted = np.max(counts, axis=0).mean()
    assert bank_factor(lanes, fan_in) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("fan_in", [614, 307, 31])
@pytest.mark.parametrize("kib", [24, 96, 227])
def test_padding_is_that_of_the_packing(lanes, fan_in, kib):
    device = SimpleNamespace(upload=np.asarray, finish=lambda: None, is_capturing=lambda: False)
    weight = CondensedWeight.random((256, 3072), fan_in=fan_in, rng=0)
    tiles = Layouts(weight, device, kib << 10).tiles(lanes)
    expected = padded_connections(fan_in, 3072, tiles.n_segments, lanes)
    assert expected == pytest.approx(tiles.positions.size / 256, rel=0.06)


def test_the_page_has_the_predictions_of_the_model():
    page = Path(__file__).parents[2].joinpath("docs", "gpu.md").read_text()
    shown = page.split("<!-- predictions -->\n")[1].split("<!-- /predictions -->")[0]
    assert shown == table(in_the_docs())

    shown = page.split("<!-- against dense -->\n")[1].split("<!-- /against dense -->")[0]
    assert shown == against_dense()


def test_dense_tensor_cores_win_at_large_batches_and_not_where_few_inputs_are_connected():
    models = [model_of(Layer.random(*HEADLINE, sparsity), H200) for sparsity in SPARSITIES]
    float16 = np.dtype(np.float16)
    first = [model.against_dense(float16) for model in models]
    assert first[-1] == "predicted slower up to batch 2048"
    batches = [int(re.fullmatch(r"predicted faster from batch (\d+) on", w)[1]) for w in first[:-1]]
    assert batches == sorted(batches)
    for model, batch in zip(models, batches, strict=False):
        assert model.dense(batch, float16) < model.forward(batch, float16).cycles
        assert model.dense(batch // 2, float16) >= model.forward(batch // 2, float16).cycles


def test_only_16_bits_are_compared_with_tensor_cores_and_only_where_there_are_any():
    layer, float16, bfloat16 = Layer.random(*HEADLINE, 0.9), *map(value_dtype, NARROW)
    model = model_of(layer, H200)
    assert model.dense(64, np.dtype(np.float32)) is None
    assert model.against_dense(np.dtype(np.float32)) is None
    old = replace(model, properties=replace(H200.properties, architecture=70))
    assert old.dense(64, float16) > model.dense(64, float16)
    assert old.against_dense(bfloat16) is None
    unknown = replace(model, properties=replace(H200.properties, architecture=0))
    assert unknown.against_dense(float16) is None


def test_a_plan_in_16_bits_says_where_dense_is_predicted_to_be_faster():
    for dtype in NARROW:
        weight = CondensedWeight.random((768, 3072), fan_in=307, rng=0)
        values = weight.values.astype(value_dtype(dtype))
        weight = CondensedWeight(values, weight.indices, weight.active, weight.shape)
        device = SimulatedDevice(H200.properties)
        text = str(prepare(weight, backend=GpuBackend(device, "cupy", CAPABILITIES)))
        assert "dense on tensor cores=predicted faster from batch 64 on" in text
    text = str(prepare(weight.quantize(), backend=GpuBackend(device, "cupy", CAPABILITIES)))
    assert "tensor cores" not in text


def test_predictions_in_16_bits_come_with_the_comparison():
    words = ["--predict", "--only", "3072-768", "--only", "batch=256", "--only", "float16"]
    done = CliRunner().invoke(app, ["bench", "gpu", *words])
    assert done.output.endswith(f"\n\n{against_dense()}")


def test_the_command_prints_predictions_without_a_device():
    words = ["--predict", "--only", "3072-768", "--only", "90%", "--only", "batch=256"]
    words += ["--only", "forward", "--only", "float32"]
    done = CliRunner().invoke(app, ["bench", "gpu", *words])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines()[2:]]
    assert {row[0].strip("| ") for row in rows} == {gpu.properties.name for gpu in GPUS}
    for row in rows:
        assert all(int(cell) > 0 for cell in row[5:9])
        assert re.fullmatch(r"predicted [\d.]+", row[9])
        assert float(row[9].split()[1]) >= float(row[10])
