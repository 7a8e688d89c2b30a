"""Values stored one to an element, with their scales beside them: what FP8 and compressed-tensors containers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from anychip.errors import CheckpointError, ConfigError
from anychip.plugin_api import QuantScheme, WeightView
from anychip.quantization.format import column_groups
from anychip.types import cdiv
from anychip.weights.matrix import Matrix, Span, read_one, row_chunks, stream
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


def want_together(
    register: WeightRegister, tensors: Mapping[str, tuple[int, ...] | None], take: Callable[[dict[str, Tensor]], None]
) -> None:
    """Asks for tensors that mean something together alone, by name with their shapes: `take` gets all of them, whole,
    once the last is there."""
    held: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[[WeightView], None]:
        def arrived(view: WeightView) -> None:
            held[name] = view.read()
            if held.keys() == tensors.keys():
                take(dict(held))
                held.clear()

        return arrived

    for name, shape in tensors.items():
        register.want(name, shape, taker(name))


def want_nothing(register: WeightRegister, *names: str) -> None:
    """Tensors that a container may have and that are not needed here."""
    for name in names:
        register.want(name, None, lambda view: None)
        register.optional.add(name)


def put_grouped(
    matrix: Matrix, scheme: QuantScheme, values: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> None:
    """This rank's share of a whole matrix [rows, columns] and of its scales and zeros [rows, groups]."""
    rows, columns = slice(*matrix.rows.bounds), slice(*matrix.columns.bounds)
    groups = slice(*column_groups(matrix, scheme).bounds)
    for start, stop in row_chunks(matrix.rows, matrix.shape[1]):
        matrix.put("", values[start:stop, columns], start - matrix.rows.start)
    matrix.put("scale", scales[rows, groups])
    if zeros is not None:
        matrix.put("zero", zeros[rows, groups])


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


def cache_scale_beside(register: WeightRegister, name: str, named: Callable[[str], str]) -> None:
    """The KV cache's scale of a module k_proj or v_proj, which some containers keep beside its weights: `named` gives
    what they call it, of "k" or "v"."""
    module, _, projection = name.rpartition(".")
    if projection in ("k_proj", "v_proj"):
        letter = projection[0]
        register.aliases[f"{name}.{named(letter)}"] = f"{module}.{letter}_scale"
