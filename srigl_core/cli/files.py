"""``srigl show``, ``condense``, ``quantize`` and ``export``: files of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from srigl_core.cli.output import Json, echo_json, make_console, one_line_errors
from srigl_core.errors import SriglError

__all__ = ["condense", "export", "quantize", "show"]

_Layers = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file of save_condensed or save_model.")
]
_Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write; replaced if there.")
]


@one_line_errors
def show(
    file: _Layers,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="The backend of the speed-ups.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the speed-ups in place of estimating them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the layers of a file: sizes, types, bytes, and expected speed-ups over dense here."""
    from srigl_core import report_file

    report = report_file(file, backend=backend, measure=measure)
    if as_json:
        echo_json(asdict(report))
    else:
        typer.echo(str(report))


@one_line_errors
def condense(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Dense weights: .safetensors, or a file of torch.save."
        ),
    ],
    masks: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Masks by the names of the weights, in such a file; or the word nonzero: what is "
            "not 0.0 is active.",
        ),
    ],
    out: _Out,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave this weight dense; a pattern such as head.*"),
    ] = None,
) -> None:
    """Condense the masked weights of a checkpoint, and keep its other arrays."""
    from srigl_core import condense_arrays, load_arrays, save_condensed

    arrays = load_arrays(checkpoint)
    given = masks if masks == "nonzero" else load_arrays(masks)
    save_condensed(out, condense_arrays(arrays, given, exclude=exclude or ()))
    _print_written([out])


@one_line_errors
def quantize(
    file: _Layers,
    out: _Out,
    inputs: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Of a file of save_model: float, or int8 to quantise the inputs of each call too.",
        ),
    ] = "float",
) -> None:
    """Quantise the layers of a file: 8-bit values with a scale for each neuron."""
    from srigl_core import quantize_file

    quantize_file(file, out, inputs=inputs)
    _print_written([out])


@one_line_errors
def export(
    file: _Layers,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder of the C files.")
    ],
    c: Annotated[bool, typer.Option("--c", help="Write C11 source and a header.")] = False,
    activation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYER=]NAME",
            help="The activation of a layer, or of all; by default what save_model stored.",
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYER=]TYPE",
            help="float or int8: the inputs of a quantised layer, or of all of them.",
        ),
    ] = None,
) -> None:
    """Write the layers of a file in another form: C source, with a function for each layer.

    An ONNX file needs the model's code: srigl_core.torch.export_onnx writes it.
    """
    from srigl_core import export_c, load_layers

    if not c:
        raise SriglError(
            "say what to write: --c for C source. An ONNX file needs the model's code: "
            "srigl_core.torch.export_onnx(model, path, example_input)"
        )
    layers = load_layers(file)
    quantized = [name for name, layer in layers.items() if layer.weight.dtype.name == "int8"]
    for name, chosen in _by_layer(activation, "activation", layers, layers).items():
        layers[name] = layers[name]._replace(activation=chosen)
    for name, chosen in _by_layer(inputs, "inputs", layers, quantized or layers).items():
        if chosen != "float" and name not in quantized:
            raise SriglError(
                f"--inputs {chosen} is for quantised layers, but layer {name!r} has float values; "
                f"run srigl quantize first, or leave the option out"
            )
        layers[name] = layers[name]._replace(inputs=chosen)
    _print_written(export_c(layers, out, name=file.stem))


def _by_layer(
    settings: list[str] | None, option: str, names: Iterable[str], all_of: Iterable[str]
) -> dict[str, str]:
    """Return the values of an option by layer; one without a layer is for `all_of` them."""
    chosen: dict[str, str] = {}
    for setting in settings or ():
        layer, equals, value = setting.rpartition("=")
        if equals and layer not in names:
            raise SriglError(
                f"--{option} {setting}: the file has no layer {layer!r}; its layers are: "
                f"{', '.join(names)}"
            )
        chosen |= {layer: value} if equals else dict.fromkeys(all_of, value)
    return chosen


def _print_written(paths: Iterable[Path]) -> None:
    for path in paths:
        make_console().print(f"wrote {path}", markup=False, soft_wrap=True)
