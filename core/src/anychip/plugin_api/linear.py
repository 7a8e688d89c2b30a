"""Matrix products: packing on load, streamed from the checkpoint, and applying. x and `out` may be views: see Form in
plugin_api/ops.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anychip.errors import Unsupported
from anychip.plugin_api.memory import DeviceMemory
from anychip.plugin_api.quantization import QuantScheme
from anychip.plugin_api.sharding import REPLICATED, Placed
from anychip.types import DType

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as torch_dtype

Packed = Any
"""A kernel's weights in its own layout: opaque to core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActFormat:
    """The form in which a kernel takes activations. norm and activation ops are asked for it as out_format, so
    that quantization fuses there. `scheme` None: plain values of `dtype`."""

    dtype: DType
    scheme: str | None = None
    group_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPart:
    """One checkpoint tensor of a packed projection: its rows stand at `offset` in the packed output. `placed` says
    which of the whole matrix's rows and columns these are: for programs that join the ranks' weights to one array."""

    name: str
    offset: int
    rows: int
    placed: Placed = REPLICATED


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """y = x W^T + b on this rank: x [num_tokens, in_features], W [out_features, in_features].

    `scheme` None is a dense product in `dtype`; otherwise activations come and go in `dtype` all the same, and the
    bias is plain. `parts` are the checkpoint tensors stacked along out_features. `epilogue` names an activation of
    MoESpec's: the first half of the features is gate, the second up, and y is act(gate) * up,
    [num_tokens, out_features / 2]. Asked only of dense products, where Capabilities.epilogues has it.
    """

    in_features: int
    out_features: int
    parts: tuple[LinearPart, ...]
    dtype: DType
    bias: bool = False
    scheme: QuantScheme | None = None
    invariant: bool = False
    epilogue: str | None = None


class WeightView(Protocol):
    """A tensor in a checkpoint file: shape and dtype are free, values are read as they are sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch_dtype: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def source(self) -> str:
        """Tensor and file, for messages."""
        ...

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        """The values within (start, stop) of each leading dimension; later dimensions whole."""
        ...


class LinearKernel:
    """Dense, or one quantization scheme. begin, load for every part, finish; then apply.

    `accepts` tells the op before it what to produce. `update` rewrites a part in place: graphs captured over
    the storage stay valid.
    """

    name = "unnamed"
    reads_rows = False
    """Whether `rows` is there."""

    def __init__(self, spec: LinearSpec, platform: DeviceMemory) -> None:
        self.spec = spec
        self.platform = platform
        self._accepts = ActFormat(dtype=spec.dtype)

    @property
    def accepts(self) -> ActFormat:
        return self._accepts

    def begin(self) -> Packed:
        """Allocates the packed weights through the platform."""
        raise Unsupported(self.name, ["begin is not implemented"])

    def load(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """Copies some of one part's rows of this rank, [rows, in_features], of which the first is row `row` of the
        part. A matrix comes in several calls, each but the last with a multiple of 64 rows, and `tensor` is the
        caller's again afterwards. `part` + ".bias" is the bias [rows]; a quantized part's scales and zeros come whole
        as ".scale" and the other kinds that its scheme has, in the forms of QuantScheme, after its values or before."""
        raise Unsupported(self.name, ["load is not implemented"])

    def finish(self, packed: Packed) -> Packed:
        """Called once when every part is loaded; may repack."""
        return packed

    def adopt(self, weight: Tensor) -> Packed:
        """Packs a finished plain weight [out_features, in_features] on the device, sharing its storage where
        the layout allows: tied embeddings are never held twice without need."""
        packed = self.begin()
        for part in self.spec.parts:
            self.load(packed, part.name, weight[part.offset : part.offset + part.rows])
        return self.finish(packed)

    def update(self, packed: Packed, part: str, tensor: Tensor, *, row: int = 0) -> None:
        """Rewrites a part of finished weights, keeping their storage."""
        self.load(packed, part, tensor, row=row)

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """[n, in_features] in `dtype`: the weights of these output features [n], and zeros for an id that is none. An
        embedding that is tied to a quantized head reads the head's storage so."""
        raise Unsupported(self.name, ["rows is not implemented"])

    def apply(self, x: Tensor, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        """[num_tokens, out_features], or half as many with an epilogue. A row follows from its own activations, scales
        of their rounding included, and the result is the caller's, as Ops says."""
        raise Unsupported(self.name, ["apply is not implemented"])
