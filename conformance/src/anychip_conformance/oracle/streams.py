"""How far two evaluations of a model may lie apart, relative to the size of its residual stream."""

from __future__ import annotations

from anychip_conformance.oracle.rounding import UNIT_ROUNDOFF


def stream_bound(num_layers: int, hidden_size: int, dtype: str) -> float:
    """After so many layers. In float32 each of a layer's sums over the width rounds, in both evaluations; in a narrower
    dtype a layer's few results round, and their errors add as independent ones do."""
    u = UNIT_ROUNDOFF[dtype]
    return 4 * num_layers * hidden_size * u if dtype == "float32" else 8 * num_layers**0.5 * u
