"""The recurrences that state layers may compute: what each reads, what it keeps of a sequence, and its rule.

Shapes are given by the names of their dimensions: an input's and the output's for one token, a weight's for the layer,
an array's for one sequence. Sums are float32, whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Dims = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """`like` names the input whose shape the output has. Inputs and weights are of the spec's dtype, and arrays are
    float32; `wide` names the inputs and weights that are float32 in every model, `narrow` the arrays that are of the
    spec's dtype because they hold inputs as they are. `optional` weights may be left out."""

    rule: str
    inputs: Mapping[str, Dims]
    arrays: Mapping[str, Dims]
    like: str
    weights: Mapping[str, Dims] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()
    narrow: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_HEAD = {"q": ("heads", "key_dim"), "k": ("heads", "key_dim"), "v": ("heads", "value_dim")}
_MATRIX = {"state": ("heads", "key_dim", "value_dim")}
_DELTA = (
    "q and k are divided by their lengths, the root of the sum of squares plus 1e-6, and q by the root of key_dim; "
    "S = exp(g) S; S = S + beta k (v - k S), and the output is q S, S [key_dim, value_dim] of each head. "
)

RECURRENCES: Mapping[str, Recurrence] = {
    "gated_sum": Recurrence(
        rule="sum = gate * sum + x, and the output is sum",
        inputs={"x": ("width",), "gate": ("width",)},
        arrays={"sum": ("width",)},
        like="x",
    ),
    "causal_conv": Recurrence(
        rule="the output is bias plus the sum over i of weight[:, i] times the i-th of the last `width` inputs, the "
        "token's own the last of them; before a sequence's first token stand zeros. tail has the last `past` = "
        "width - 1 inputs, the oldest first",
        inputs={"x": ("channels",)},
        weights={"weight": ("channels", "width"), "bias": ("channels",)},
        arrays={"tail": ("past", "channels")},
        like="x",
        narrow=frozenset({"tail"}),
        optional=frozenset({"bias"}),
    ),
    "selective_scan": Recurrence(
        rule="state = exp(dt a) state + dt x b, and the output is state c + d x, for each channel (Gu and Dao, "
        "'Mamba', 2023)",
        inputs={"x": ("channels",), "dt": ("channels",), "b": ("state_dim",), "c": ("state_dim",)},
        weights={"a": ("channels", "state_dim"), "d": ("channels",)},
        arrays={"state": ("channels", "state_dim")},
        like="x",
        wide=frozenset({"dt", "a", "d"}),
    ),
    "ssd": Recurrence(
        rule="state = exp(dt a) state + dt x b^T, and the output is state c + d x, for each head; neighbouring heads "
        "share the b and c of their group (Dao and Gu, 'Transformers are SSMs', 2024)",
        inputs={
            "x": ("heads", "head_dim"),
            "dt": ("heads",),
            "b": ("groups", "state_dim"),
            "c": ("groups", "state_dim"),
        },
        weights={"a": ("heads",), "d": ("heads",)},
        arrays={"state": ("heads", "head_dim", "state_dim")},
        like="x",
        wide=frozenset({"dt", "a", "d"}),
    ),
    "gated_delta": Recurrence(
        rule=_DELTA + "Neighbouring heads share the q and k of their group (Yang et al., 'Gated Delta Networks', 2024)",
        inputs={
            "q": ("groups", "key_dim"),
            "k": ("groups", "key_dim"),
            "v": ("heads", "value_dim"),
            "g": ("heads",),
            "beta": ("heads",),
        },
        arrays=_MATRIX,
        like="v",
        wide=frozenset({"g", "beta"}),
    ),
    "kda": Recurrence(
        rule=_DELTA + "g differs by the rows of S (Moonshot, 'Kimi Linear', 2025)",
        inputs={**_HEAD, "g": ("heads", "key_dim"), "beta": ("heads",)},
        arrays=_MATRIX,
        like="v",
        wide=frozenset({"g", "beta"}),
    ),
    "lightning": Recurrence(
        rule="S = exp(-slope) S + k v^T, and the output is q S, for each head (Qin et al., 'Lightning Attention-2', "
        "2024)",
        inputs=_HEAD,
        weights={"slope": ("heads",)},
        arrays=_MATRIX,
        like="v",
        wide=frozenset({"slope"}),
    ),
    "wkv7": Recurrence(
        rule="S = exp(g) S + a (b S) + k v^T with g by the rows of S and the S before the token, and the output is "
        "q S, for each head (Peng et al., 'RWKV-7', 2025: its w, b, a and r are g, a, b and q here)",
        inputs={**_HEAD, "g": ("heads", "key_dim"), "a": ("heads", "key_dim"), "b": ("heads", "key_dim")},
        arrays=_MATRIX,
        like="v",
        wide=frozenset({"g"}),
    ),
}
"""What a state layer may compute, by name."""
