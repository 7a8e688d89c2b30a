"""Single and composite ops, as the platform's table resolves them: overrides where there are any."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from anychip.plugin_api import MAX_BIASES, ActFormat, Communicator, GroupSpec, LinearPart, LinearSpec, QKNorm, Rope
from anychip_conformance.case import kind
from anychip_conformance.choices import DTYPES, CaseDtype, each_dtype
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.rounding import U32, rounded
from anychip_conformance.oracle.vectorised import Bounded

_dtype = st.sampled_from(["any", "narrow"])
_seed = st.integers(0, 2**16)
_tokens = st.sampled_from([1, 2, 3, 7, 16, 33])
_width = st.sampled_from([1, 2, 8, 16, 24, 64, 100, 127, 256])


class OpCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`option` is what the op has besides tensors; `strided` gives it a slice of something wider."""

    tokens: int = 5
    width: int = 64
    dtype: CaseDtype = "any"
    option: str = ""
    magnitude: float = 1.0
    strided: bool = False
    needles: bool = False
    """The last row's last number is as large as all others together."""
    seed: int = 0


def values(device: Device, case: OpCase, *shape: int, salt: int = 0) -> torch.Tensor:
    rng = np.random.default_rng((case.seed, salt))
    wide = case.magnitude * rng.normal(size=(*shape[:-1], shape[-1] + (3 if case.strided else 0)))
    if case.needles:
        wide[-1, shape[-1] - 1] = case.magnitude * shape[-1]
    return device.tensor(wide, case.dtype)[..., : shape[-1]]


def drawn(**options: list[str]) -> st.SearchStrategy[OpCase]:
    return st.builds(
        OpCase,
        tokens=_tokens,
        width=_width,
        dtype=_dtype,
        option=st.sampled_from(options.get("option", [""])),
        magnitude=st.sampled_from([1.0, 0.01, 10.0]),
        strided=st.booleans(),
        seed=_seed,
    )


@kind(
    "op.rms_norm",
    corpus=each_dtype(OpCase(), OpCase(option="offset", width=100), OpCase(width=2048, magnitude=30.0)),
    drawn=drawn(option=["", "offset"]),
)
def rms_norm(device: Device, case: OpCase) -> None:
    """x / rms(x) * weight, the mean of squares in float32; unit_offset adds one to the weight."""
    device.need_dtype(case.dtype)
    x = values(device, case, case.tokens, case.width)
    weight = device.held(1 + 0.3 * np.random.default_rng(case.seed).normal(size=case.width), case.dtype)
    offset = case.option == "offset"
    same = unchanged(device, {"x": x, "weight": weight})
    result = device.ops.ops.rms_norm(x=x, weight=weight, eps=1e-5, unit_offset=offset)
    same()
    assert str(result.dtype) == f"torch.{case.dtype}", f"rms_norm gave {result.dtype}"
    expected = oracle.rms_norm(seen(x), seen(weight), 1e-5, offset, case.dtype)
    device.compare("rms_norm", result, expected, label=f"rms_norm/{case.dtype}")


@kind("op.residual_norm", corpus=each_dtype(OpCase(), OpCase(option="first"), OpCase(option="offset", width=96)),
      drawn=drawn(option=["", "first", "offset"]))  # fmt: skip
def residual_norm(device: Device, case: OpCase) -> None:
    """The norm of x + residual, and that sum as the next residual; x itself where there is none yet."""
    device.need_dtype(case.dtype)
    x = values(device, case, case.tokens, case.width)
    residual = None if case.option == "first" else values(device, case, case.tokens, case.width, salt=1)
    weight = device.held(1 + 0.3 * np.random.default_rng(case.seed).normal(size=case.width), case.dtype)
    wide = seen(x) + (0.0 if residual is None else seen(residual))
    result, total = device.ops.ops.residual_norm_quant(
        x=device.copied(x), residual=None if residual is None else device.copied(residual), weight=weight, eps=1e-5,
        unit_offset=case.option == "offset", out_format=ActFormat(dtype=case.dtype),
    )  # fmt: skip
    error = np.zeros_like(wide) if residual is None else rounded(wide, case.dtype)
    device.compare("the new residual", total, Bounded(wide, error), label=f"residual/{case.dtype}")
    expected = oracle.rms_norm(seen(total), seen(weight), 1e-5, case.option == "offset", case.dtype)
    # A fused kernel norms the sum before it is rounded: both the element and the root move by that rounding.
    scale = np.abs(1 + seen(weight) if case.option == "offset" else seen(weight))
    root = np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    moved = np.sqrt((error * error).mean(-1, keepdims=True)) / root
    bound = expected.bound + scale * error / root + np.abs(expected.value) * moved
    device.compare("the norm", result, Bounded(expected.value, bound), label=f"residual_norm/{case.dtype}")


class RotaryCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    tokens: int = 5
    heads: int = 3
    head_dim: int = 16
    rotary_dim: int = 16
    interleaved: bool = False
    qk_norm: bool = False
    unit_offset: bool = False
    strided: bool = False
    furthest: int = 99
    """The last position of the rotary table, which one of the tokens has."""
    dtype: CaseDtype = "any"
    seed: int = 0

    def positions(self, rng: np.random.Generator) -> np.ndarray:
        """Of the tokens, the last among them."""
        if self.furthest < 100:
            return rng.permutation(100)[: self.tokens]
        return np.concatenate([[self.furthest], self.furthest - rng.integers(0, 300, self.tokens - 1)])


_rotary = st.builds(
    RotaryCase,
    tokens=_tokens,
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 16, 24, 64, 80]),
    rotary_dim=st.sampled_from([2, 4, 8]),
    interleaved=st.booleans(),
    qk_norm=st.booleans(),
    unit_offset=st.booleans(),
    strided=st.booleans(),
    dtype=_dtype,
    seed=_seed,
)


def rope_tables(device: Device, rotary_dim: int, length: int) -> Rope:
    angle = np.arange(length)[:, None] * 50.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim / 2))
    return Rope(
        cos=device.held(np.cos(angle), "float32"), sin=device.held(np.sin(angle), "float32"), rotary_dim=rotary_dim
    )


@kind(
    "op.rotary",
    corpus=each_dtype(
        RotaryCase(), RotaryCase(interleaved=True), RotaryCase(head_dim=32, rotary_dim=8), RotaryCase(strided=True)
    ),
    drawn=_rotary,
)
def rotary(device: Device, case: RotaryCase) -> None:
    """Halves (neox) or neighbours (interleaved) turn by the token's own position; what lies past rotary_dim passes."""
    device.need_dtype(case.dtype)
    rng = np.random.default_rng(case.seed)
    width = case.head_dim * (2 if case.strided else 1)
    x = device.tensor(rng.normal(size=(case.tokens, case.heads, width)), case.dtype)[..., : case.head_dim]
    positions = case.positions(rng)
    rope = rope_tables(device, case.rotary_dim, case.furthest + 1)
    rope.interleaved = case.interleaved
    same = unchanged(device, {"x": x})
    result = device.ops.ops.rotary(x=x, positions=device.tensor(positions, "int32"), rope=rope)
    same()
    expected = oracle.rotary(seen(x), seen(rope.cos), seen(rope.sin), positions, case.interleaved, case.dtype)
    device.compare("rotary", result, expected, label=f"rotary/{case.dtype}")


@kind(
    "op.qkv_norm_rope",
    corpus=each_dtype(
        RotaryCase(qk_norm=True), RotaryCase(qk_norm=True, unit_offset=True, interleaved=True), RotaryCase()
    ),
    drawn=_rotary,
)
def qkv_norm_rope(device: Device, case: RotaryCase) -> None:
    """Queries and keys, each with its own norm over head_dim, then rotary; keys may be absent."""
    device.need_dtype(case.dtype)
    rng = np.random.default_rng(case.seed)
    q = device.tensor(rng.normal(size=(case.tokens, 2 * case.heads, case.head_dim)), case.dtype)
    k = device.tensor(rng.normal(size=(case.tokens, case.heads, case.head_dim)), case.dtype)
    weights = [device.held(1 + 0.3 * rng.normal(size=case.head_dim), case.dtype) for _ in range(2)]
    norm = QKNorm(q_weight=weights[0], k_weight=weights[1], eps=1e-5, unit_offset=case.unit_offset)
    positions = case.positions(rng)
    rope = rope_tables(device, case.rotary_dim, case.furthest + 1)
    rope.interleaved = case.interleaved
    given = norm if case.qk_norm else None
    at = device.tensor(positions, "int32")
    results = device.ops.ops.qkv_norm_rope(
        q=device.copied(q), k=device.copied(k), positions=at, rope=rope, qk_norm=given
    )
    for name, x, weight, result in (("q", q, weights[0], results[0]), ("k", k, weights[1], results[1])):
        normed = Bounded(seen(x), np.zeros(tuple(x.shape)))
        if case.qk_norm:
            normed = oracle.rms_norm(seen(x), seen(weight), 1e-5, case.unit_offset, case.dtype)
        tables = (seen(rope.cos), seen(rope.sin), positions, case.interleaved, case.dtype)
        turned = oracle.rotary(normed.value, *tables)
        carried = 2 * normed.bound.max(-1, keepdims=True)  # a rotation mixes two coordinates
        device.compare(name, result, Bounded(turned.value, turned.bound + carried), label=f"qkv_norm_rope/{case.dtype}")
    alone, none = device.ops.ops.qkv_norm_rope(q=device.copied(q), k=None, positions=at, rope=rope, qk_norm=given)
    assert none is None, "keys came back where none were given"
    device.same_bits("q without keys", alone.contiguous(), results[0].contiguous())


ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_clamped"]


@kind(
    "op.gated_activation",
    corpus=each_dtype(*[OpCase(option=name, magnitude=magnitude) for name in ACTIVATIONS for magnitude in (1.0, 12.0)]),
    drawn=drawn(option=ACTIVATIONS),
)
def gated_activation(device: Device, case: OpCase) -> None:
    """act(gate) * up, the gate in the first half."""
    device.need_dtype(case.dtype)
    gate_up = values(device, case, case.tokens, 2 * case.width)
    same = unchanged(device, {"gate_up": gate_up})
    result = device.ops.ops.gated_activation(gate_up=gate_up, activation=case.option)
    same()
    _judge_activation(device, case, gate_up, result)


@kind(
    "op.gate_up_act", corpus=each_dtype(*[OpCase(option=name) for name in ACTIVATIONS]), drawn=drawn(option=ACTIVATIONS)
)
def gate_up_act(device: Device, case: OpCase) -> None:
    """The composite form, in the plain format that a dense product takes."""
    device.need_dtype(case.dtype)
    gate_up = values(device, case, case.tokens, 2 * case.width)
    result = device.ops.ops.gate_up_act_quant(
        gate_up=device.copied(gate_up), activation=case.option, out_format=ActFormat(dtype=case.dtype)
    )
    _judge_activation(device, case, gate_up, result)


def _judge_activation(device: Device, case: OpCase, gate_up: torch.Tensor, result: torch.Tensor) -> None:
    gate, up = np.split(seen(gate_up), 2, axis=-1)
    expected = oracle.gated_activation(gate, up, case.option, case.dtype)
    device.compare(case.option, result, expected, label=f"gated_activation {case.option}/{case.dtype}")


@kind(
    "op.softcap",
    corpus=each_dtype(OpCase(option="5", magnitude=20.0), OpCase(option="30")),
    drawn=drawn(option=["0.5", "5", "50"]),
)
def softcap(device: Device, case: OpCase) -> None:
    """cap tanh(x / cap): bent towards the cap, not cut off at it."""
    device.need_dtype(case.dtype)
    x = values(device, case, case.tokens, case.width)
    result = device.ops.ops.softcap(x=x, cap=float(case.option))
    device.compare(
        "softcap", result, oracle.softcap(seen(x), float(case.option), case.dtype), label=f"softcap/{case.dtype}"
    )


class EmbeddingCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    rows: int = 20
    first: int = 0
    vocab: int = 40
    width: int = 24
    tokens: int = 9
    dtype: CaseDtype = "any"
    seed: int = 0


@kind(
    "op.embedding",
    corpus=[
        EmbeddingCase(rows=rows, first=first, dtype=dtype)  # type: ignore[arg-type]
        for rows, first in ((40, 0), (20, 0), (20, 20), (7, 13))
        for dtype in DTYPES
    ],
    drawn=st.builds(
        EmbeddingCase, rows=st.integers(1, 20), first=st.integers(0, 20), tokens=_tokens, dtype=_dtype, seed=_seed
    ),
)
def embedding(device: Device, case: EmbeddingCase) -> None:
    """Rows of this rank's share of the vocabulary; ids that others hold give zeros, exactly."""
    device.need_dtype(case.dtype)
    rng = np.random.default_rng(case.seed)
    weight = device.held(rng.normal(size=(case.rows, case.width)), case.dtype)
    # Both ends of the share, and their outer neighbours, are always among the ids.
    edges = [case.first - 1, case.first, case.first + case.rows - 1, case.first + case.rows]
    ids = np.asarray([id for id in edges if 0 <= id < case.vocab] + rng.integers(0, case.vocab, case.tokens).tolist())
    result = device.ops.ops.embedding(ids=device.tensor(ids, "int32"), weight=weight, first=case.first)
    held = (ids >= case.first) & (ids < case.first + case.rows)
    picked = seen(weight)[np.where(held, ids - case.first, 0)]
    expected = np.where(held[:, None], picked, 0.0)
    device.compare("embedding", result, Bounded(expected, np.zeros_like(expected)))


@kind("op.token_masks", corpus=[OpCase(width=width) for width in (1, 31, 32, 33, 100)], drawn=drawn())
def token_masks(device: Device, case: OpCase) -> None:
    """Bit i of word i // 32 allows token i; others become minus infinity, and allowed ones keep their bits."""
    rng = np.random.default_rng(case.seed)
    logits = device.tensor(rng.normal(size=(case.tokens, case.width)), "float32")
    allowed = rng.random((case.tokens, case.width)) < 0.5
    words = -(-case.width // 32)
    packed = np.zeros((case.tokens, words * 32), dtype=np.uint64)
    packed[:, : case.width] = allowed
    masks = (packed.reshape(case.tokens, words, 32) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    result = device.ops.ops.apply_token_masks(
        logits=device.copied(logits), masks=device.tensor(masks.view(np.int32), "int32")
    )
    expected = np.where(allowed, seen(logits), -np.inf)
    device.compare("masked logits", result, Bounded(expected, np.zeros_like(expected)))


@kind("op.edit_logits", corpus=[OpCase(width=width) for width in (1, 2, 33, 100)], drawn=drawn())
def edit_logits(device: Device, case: OpCase) -> None:
    """Counted tokens are divided by the repetition penalty where positive and multiplied where negative; those of the
    output lose the presence penalty, and the frequency penalty for each time; then the slot's biases are added, as many
    as the row has. A row without any keeps its bits, whatever its slot holds, and so does the argument."""
    rng = np.random.default_rng(case.seed)
    rows, vocab, spare = case.tokens, case.width, 2
    logits = device.tensor(rng.normal(size=(rows, vocab)), "float32")
    slots = rng.permutation(rows + spare)[:rows]
    often = int(case.option or 7)  # times that a token was drawn
    counts = rng.integers(0, 2, (rows + spare, vocab)) + 2 * rng.choice([0, 0, 1, often], (rows + spare, vocab))
    penalties = {
        "repetition_penalty": rng.choice([0.5, 1.3, 2.0], rows),
        "presence_penalty": rng.choice([0.0, -1.5, 0.25], rows),
        "frequency_penalty": rng.choice([0.0, 0.5, -0.3], rows),
    }
    # The ids behind a row's own biases are those of an earlier owner of its slot.
    bias_ids = np.stack([rng.permutation(MAX_BIASES) % vocab for _ in range(rows + spare)])
    biases = rng.choice([-1.5, 0.25, 100.0], bias_ids.shape)
    num_biases = rng.integers(0, min(vocab, MAX_BIASES) + 1, rows)
    for slot in range(rows + spare):
        bias_ids[slot, :vocab] = rng.permutation(vocab)[:MAX_BIASES]
    plain = rng.integers(0, rows)
    penalties["repetition_penalty"][plain] = 1
    penalties["presence_penalty"][plain] = penalties["frequency_penalty"][plain] = num_biases[plain] = 0
    before = logits.clone()
    result = device.ops.ops.edit_logits(
        logits=logits,
        slots=device.tensor(slots, "int32"),
        counts=device.held(counts, "int32"),
        bias_ids=device.held(bias_ids, "int32"),
        biases=device.held(biases, "float32"),
        num_biases=device.tensor(num_biases, "int32"),
        **{name: device.tensor(values, "float32") for name, values in penalties.items()},
    )
    device.same_bits("input logits", logits, before)
    device.same_bits("logits of a row without edits", result[plain], before[plain])
    old, count = seen(before), counts[slots]
    factor, once, each = (values.astype(np.float32).astype(np.float64)[:, None] for values in penalties.values())
    repeated = np.where(count > 0, np.where(old > 0, old / factor, old * factor), old)
    taken = each * (count // 2) + once * (count > 1)
    added = np.zeros_like(old)
    for row, slot in enumerate(slots):
        added[row, bias_ids[slot, : num_biases[row]]] = biases[slot, : num_biases[row]]
    bound = 4 * U32 * (np.abs(repeated) + np.abs(each) * (count // 2) + np.abs(once) + np.abs(added))
    bound[plain] = 0
    device.compare("edited logits", result, Bounded(repeated - taken + added, bound))


@kind("op.count_tokens", corpus=[OpCase(width=width) for width in (1, 33, 100)], drawn=drawn())
def count_tokens(device: Device, case: OpCase) -> None:
    """Each pair of slot and id adds two to its count, a pair that is there twice adds twice, and no other changes."""
    rng = np.random.default_rng(case.seed)
    counts = rng.integers(0, 9, (case.tokens + 1, case.width)) + 2 * int(case.option or 0)
    slots = rng.integers(0, case.tokens + 1, case.tokens)
    ids = rng.integers(0, case.width, case.tokens)
    if case.width > 100:
        ids[:2] = (case.width - 1, case.width // 2)[: case.tokens]
    slots[-1], ids[-1] = slots[0], ids[0]
    result = device.ops.ops.count_tokens(
        counts=device.held(counts, "int32"), slots=device.tensor(slots, "int32"), ids=device.tensor(ids, "int32")
    )
    np.add.at(counts, (slots, ids), 2)
    device.compare("counts", result, Bounded(counts.astype(np.float64), np.zeros(counts.shape)))


@kind("op.matmul_reduce", corpus=each_dtype(OpCase(width=32), OpCase(width=48, tokens=1)), drawn=drawn(), examples=15)
def matmul_reduce(device: Device, case: OpCase) -> None:
    """The product, then the sum over ranks: of one rank here, it is the product."""
    device.need_dtype(case.dtype)
    spec = LinearSpec(
        in_features=case.width, out_features=24, parts=(LinearPart(name="o", offset=0, rows=24),), dtype=case.dtype
    )
    kernel = device.platform.linear(spec)
    packed = kernel.begin()
    weight = device.held(np.random.default_rng(case.seed).normal(size=(24, case.width)), case.dtype)
    kernel.load(packed, "o", weight)
    packed = kernel.finish(packed)
    x = values(device, case, case.tokens, case.width)
    group = GroupSpec(ranks=(0,), rank=0, purpose="tp", max_message_bytes=2**16, store="", timeout_s=1.0)
    result = device.ops.ops.matmul_reduce(x=x, kernel=kernel, packed=packed, communicator=Communicator(group))
    expected = oracle.linear(seen(x), seen(weight), None, case.dtype)
    device.compare("matmul_reduce", result, expected, label=f"matmul_reduce/{case.dtype}")
