"""Single and composite ops: their names, versions and signatures, and the table that dispatches them.

An op is called by keyword. Each has a version; its signature here is the contract. An override declares the
arguments it knows: one that lacks an argument added later (its default keeps the old meaning) is not called,
the reference runs, and `doctor` says so.

Form. The tensors of a step are activations, logits, and arrays by row, token or sample. They may be views, for ops and
for every other kernel. Such a tensor begins at any element of its storage. Its last dimension is contiguous, and so is
an array of one dimension. Its other dimensions have any strides: rows may lie apart, heads may lie before tokens in
memory, and a stride may be 0. What may be overwritten has no stride of 0: `out`, y of add_low_rank, what a collective
is given, and the activations and logits of composite ops and of apply_token_masks. Tensors that outlive a step are
contiguous: weights, tables, scales, counts, biases by slot, stacks of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.adapters import AdapterStack
    from anychip.plugin_api.communicator import Communicator
    from anychip.plugin_api.linear import ActFormat, LinearKernel, Packed

F = TypeVar("F", bound=Callable[..., Any])

OP_VERSIONS = {
    "embedding": 1,
    "rms_norm": 1,
    "rotary": 1,
    "gated_activation": 1,
    "softcap": 1,
    "apply_token_masks": 1,
    "edit_logits": 2,
    "count_tokens": 1,
    "accept_drafts": 1,
    "sample": 1,
    "logprobs": 1,
    "qkv_norm_rope": 1,
    "residual_norm_quant": 1,
    "gate_up_act_quant": 1,
    "matmul_reduce": 1,
    "add_low_rank": 1,
}
"""Every op that a platform may override."""

COMPOSITE_OPS = frozenset({"qkv_norm_rope", "residual_norm_quant", "gate_up_act_quant", "matmul_reduce"})

ADAPTER_OPS = frozenset({"add_low_rank"})
"""Run only where Capabilities.lora is declared."""

COMPILED_OPS = frozenset({"gate_up_act_quant", "gated_activation", "residual_norm_quant", "rms_norm", "softcap"})
"""What Platform.compiler is asked to compile: regions that read and write each value once."""


def op_override(name: str, *, version: int) -> Callable[[F], F]:
    """Marks a function as an override of an op at the version that it was written against."""

    def mark(fn: F) -> F:
        fn.__anychip_op__ = (name, version)  # type: ignore[attr-defined]
        return fn

    return mark


@dataclass(slots=True, kw_only=True)
class Rope:
    """Rotary embedding of a layer: cos and sin by position, [max_positions, rotary_dim / 2] each, float32."""

    cos: Tensor
    sin: Tensor
    rotary_dim: int
    interleaved: bool = False
    """False: halves are rotated (neox); True: neighbours are (gpt-j)."""
    axes: Tensor | None = None
    """Where positions have axes (M-RoPE): the axis that each frequency turns by, [rotary_dim / 2] int64. Steps whose
    positions differ between axes turn by a table of their own (ForwardExtras.turning), with any device's ops."""


@dataclass(slots=True, kw_only=True)
class QKNorm:
    """RMS norm over head_dim of queries and keys, before rotary."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float
    unit_offset: bool = False


class Ops(Protocol):
    """The ops as models call them. Shapes use docs/glossary.md; all arguments go by keyword.

    What an op gives for a row follows from that row and from the shapes: whatever stands in the others, NaN and
    infinities too, changes no bit of it. A result is the caller's: later calls leave it, and so does who overwrites
    the arguments behind the call, but for ops that say they may give an argument back."""

    def embedding(self, *, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
        """Rows of weight [rows, hidden_size] for ids [num_tokens]; weight holds ids from `first` on, and an id
        it does not hold gives zeros, also where weight holds NaN."""
        ...

    def rms_norm(self, *, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
        """x / rms(x) * weight over the last dimension, computed in float32. unit_offset: weight + 1."""
        ...

    def rotary(self, *, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
        """Rotates x [num_tokens, heads, head_dim] by its position; dimensions past rotary_dim pass through."""
        ...

    def gated_activation(self, *, gate_up: Tensor, activation: str) -> Tensor:
        """act(gate) * up for gate_up [num_tokens, 2 * intermediate_size]; `activation` as in MoESpec."""
        ...

    def softcap(self, *, x: Tensor, cap: float) -> Tensor:
        """cap * tanh(x / cap)."""
        ...

    def apply_token_masks(self, *, logits: Tensor, masks: Tensor) -> Tensor:
        """Minus infinity where a packed bitmask [rows, words] int32 has a 0 bit, whatever the logit was: NaN too."""
        ...

    def edit_logits(
        self,
        *,
        logits: Tensor,
        slots: Tensor,
        counts: Tensor,
        repetition_penalty: Tensor,
        presence_penalty: Tensor,
        frequency_penalty: Tensor,
        bias_ids: Tensor,
        biases: Tensor,
        num_biases: Tensor,
    ) -> Tensor:
        """logits [rows, vocab_size] float32 changed by each row's penalties and the biases of its slot. slots and
        num_biases [rows] int32, penalties [rows] float32; by slot: counts [num_slots, vocab_size] int32, bias_ids
        [num_slots, MAX_BIASES] int32 and biases float32, of which the first num_biases count.

        A count holds IN_PROMPT once for a token of the prompt, and DRAWN for each time it stands in the output. The
        logit of a token with a count is divided by repetition_penalty where it is positive and multiplied where it is
        negative; a token of the output loses presence_penalty, and frequency_penalty for each time; then biases are
        added. A row without penalties and biases keeps its bits, whatever its slot holds; so does the argument."""
        ...

    def count_tokens(self, *, counts: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
        """counts [num_slots, vocab_size] int32 with DRAWN added for each pair of slots and ids [rows] int32; a repeated
        pair counts again. The argument may be overwritten, and returned."""
        ...

    def sample(
        self,
        *,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed_low: Tensor,
        seed_high: Tensor,
        sample_index: Tensor,
        position: Tensor,
        all_greedy: bool = False,
    ) -> Tensor:
        """Token ids [rows] int32 drawn as docs/reference/randomness.md specifies. `all_greedy` is a promise.
        A row that has NaN or infinity, or no token above minus infinity, draws some id of the vocabulary."""
        ...

    def accept_drafts(self, *, ids: Tensor, draft_ids: Tensor, first_samples: Tensor) -> Tensor:
        """Which samples are kept, [num_samples] bool: those before which every sample of the row drew its draft, and
        so each row's first. ids, draft_ids and first_samples [num_samples] int32: what was drawn, the token drafted
        behind (-1: none), and the index of the row's first sample. A row's samples stand together."""
        ...

    def logprobs(self, *, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of token_ids [rows], then the num_top likeliest ids and their log-probabilities. Ids are of
        the vocabulary, whatever the row holds."""
        ...

    def qkv_norm_rope(
        self, *, q: Tensor, k: Tensor | None, positions: Tensor, rope: Rope | None, qk_norm: QKNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """rms_norm of queries and keys over head_dim, then rotary; each where given."""
        ...

    def residual_norm_quant(
        self,
        *,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        unit_offset: bool = False,
        out_format: ActFormat | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual) in out_format, x + residual); residual None: x itself."""
        ...

    def gate_up_act_quant(self, *, gate_up: Tensor, activation: str, out_format: ActFormat | None = None) -> Tensor:
        """gated_activation in out_format."""
        ...

    def matmul_reduce(self, *, x: Tensor, kernel: LinearKernel, packed: Packed, communicator: Communicator) -> Tensor:
        """kernel.apply, then all_reduce."""
        ...

    def add_low_rank(self, *, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
        """y [num_tokens, out_features] plus, for the token t with slot s, scale * (x[t] down[s]^T) up[s], part by
        part of the stack; x [num_tokens, in_features], slots [num_tokens] int32. Sums are taken in float32, also that
        between the two products. A token whose slot is negative keeps its bits, whatever the slots hold. y may be
        overwritten, and returned."""
        ...
