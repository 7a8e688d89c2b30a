"""Values stored one to an element, with their scales beside them: what FP8 and compressed-tensors containers share."""

from __future__ import annotations

from anychip.errors import CheckpointError, ConfigError
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import column_groups
from anychip.types import cdiv
from anychip.weights.matrix import Matrix, Span, read_one, stream
from anychip.weights.register import WeightRegister


def want_values(register: WeightRegister, matrix: Matrix, dtype: str) -> None:
    """`weight` [rows, columns] in the scheme's own dtype."""

    def take(view: WeightView) -> None:
        if str(view.dtype) != f"torch.{dtype}":
            raise CheckpointError(f"{view.source} is {view.dtype}, quantization_config says {dtype}")
        stream(view, matrix.rows, matrix.columns, lambda chunk, row: matrix.put("", chunk, row))

    register.want(f"{matrix.name}.weight", matrix.shape, take)


def want_scales(register: WeightRegister, matrix: Matrix, scheme: QuantScheme, name: str) -> None:
    """The scheme's scales, in any of the shapes that checkpoints give them."""
    rows, columns = _scale_spans(matrix, scheme)
    whole = _whole_shape(matrix, scheme)

    def take(view: WeightView) -> None:
        if whole is None:  # one scale: [] or [1]
            if view.shape not in ((), (1,)):
                raise CheckpointError(f"{view.source} has shape {list(view.shape)}, expected one scale")
            matrix.put("scale", read_one(view))
        elif view.shape == whole:
            matrix.put("scale", view.read(rows.bounds, columns.bounds).float())
        elif scheme.scales == "channel" and view.shape == whole[:1]:
            matrix.put("scale", view.read(rows.bounds).float())
        else:
            raise CheckpointError(f"{view.source} has shape {list(view.shape)}, the scheme wants {list(whole)}")

    register.want(name, None, take)


def want_input_scale(register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
    """The one scale of static activations."""
    if scheme.activations != "static":
        return

    def take(view: WeightView) -> None:
        matrix.put("input_scale", read_one(view))

    register.want(f"{matrix.name}.input_scale", None, take)


def _whole_shape(matrix: Matrix, scheme: QuantScheme) -> tuple[int, int] | None:
    rows, columns = matrix.shape
    if scheme.scales == "tensor":
        return None
    if scheme.group_size is None:
        return rows, 1
    groups = cdiv(columns, scheme.group_size)
    return (cdiv(rows, scheme.group_size) if scheme.scales == "block" else rows), groups


def _scale_spans(matrix: Matrix, scheme: QuantScheme) -> tuple[Span, Span]:
    size, rows = scheme.group_size, matrix.rows
    columns = column_groups(matrix, scheme)
    if scheme.scales != "block":
        return rows, columns
    assert size is not None
    if rows.start % size:
        raise ConfigError(
            f"{matrix.name} is quantized in blocks of {size} rows, and this rank's begin at {rows.start}; "
            "choose another tensor_parallel_size"
        )
    return Span(rows.start // size, cdiv(rows.count, size)), columns
