"""The static side of ragged paged attention: shapes, the layout of pages, tiles, and what they need of a core.

A page of one layer is [num_kv_heads, parts, page_size, lanes]. Keys and values of a head are two parts if a head fills
the lanes. Heads of 64 elements or fewer share one row of 128 lanes: the key in the first half, the value in the second,
so that no memory is spent on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from anychip.plugin_api import Unsupported
from anychip_tpu.pallas.budget import LANES, Buffer, check_smem, check_vmem, round_up, sublane_rows
from anychip_tpu.pallas.generations import Generation

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_KEYS_PER_BLOCK = 512  # keys that one step of the loop over keys takes: long transfers, a small softmax
_TILE_ROWS = 128  # rows of the left side of a product: what the systolic array takes at once
_ROWS_PER_STEP = 8  # decode rows of one grid step
_WRITE_BYTES = 2**22  # VMEM for pages that are being written


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention at one shape of a step, on one device. Two equal specs compile to the same kernel."""

    num_tokens: int  # padded
    num_rows: int  # padded
    pages_per_row: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str  # of queries, keys, values and pages: "bfloat16" or "float32"
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    decode_only: bool = False  # every row has one token at most
    writes: bool = True  # False where another layer's keys and values are read

    @property
    def share(self) -> int:
        """Heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_share(self) -> int:
        return round_up(self.share, sublane_rows(self.item_bytes))

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def joined(self) -> bool:
        """Whether a head's key and value share a row of lanes."""
        return self.head_dim <= LANES // 2

    @property
    def parts(self) -> int:
        return 1 if self.joined else 2

    @property
    def lanes(self) -> int:
        return round_up(self.head_dim, LANES)

    @property
    def value_lane(self) -> int:
        """The first lane of a head's value in the last part, and of its output."""
        return LANES // 2 if self.joined else 0

    @property
    def chunk(self) -> int:
        """Keys of one tile in memory: the least that can be written at once."""
        return sublane_rows(self.item_bytes)

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        return self.num_kv_heads, self.parts, self.page_size, self.lanes

    @property
    def row_steps(self) -> int:
        """Grid steps for decode rows."""
        return -(-self.num_rows // _ROWS_PER_STEP)

    @property
    def rows_per_step(self) -> int:
        return _ROWS_PER_STEP

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile of queries, so that a tile has about as many rows as the systolic array."""
        wanted = round_up(max(1, _TILE_ROWS // self.share), self.chunk)
        return min(wanted, round_up(self.num_tokens, self.chunk))

    @property
    def num_tiles(self) -> int:
        return 0 if self.decode_only else -(-self.num_tokens // self.tile_tokens)

    @property
    def max_visits(self) -> int:
        """Pairs of a row and a grid step with tokens of it: each row once, and once more where a tile ends in it."""
        return self.num_rows + self.num_tiles

    def reasons(self) -> list[str]:
        """Why no kernel can serve this spec."""
        found = []
        if self.dtype not in ITEM_BYTES:
            return [f"dtype {self.dtype} is none of {', '.join(ITEM_BYTES)}"]
        if self.num_heads % self.num_kv_heads:
            found.append(f"{self.num_heads} heads are no multiple of {self.num_kv_heads} KV heads")
        if self.page_size % self.chunk:
            found.append(
                f"pages of {self.page_size} tokens are not whole tiles of {self.chunk} rows of {self.dtype}; "
                "16 and 128 are"
            )
        return found


@dataclass(frozen=True, slots=True)
class Tiling:
    """What was chosen for a chip."""

    pages_per_block: int
    writes_at_once: int
    vmem_limit: int  # bytes


def choose_tiling(spec: AttentionSpec, chip: Generation) -> Tiling:
    """The largest blocks of keys that fit, up to 512 keys. Raises Unsupported with every reason and its numbers."""
    if reasons := spec.reasons():
        raise Unsupported("anychip-tpu attention", reasons)
    page_bytes = Buffer("page", spec.page_shape, spec.item_bytes).num_bytes
    chunk_bytes = page_bytes * 3 * spec.chunk // spec.page_size  # the old rows, and twice as many new ones
    writes = min(max(1, _WRITE_BYTES // chunk_bytes), 32, spec.num_tokens) if spec.writes else 0
    remedy = "shard the heads over more chips, or take smaller pages"
    check_smem("attention", _num_words(spec), chip, "take larger pages, fewer rows or a shorter --max-model-len")
    pages = min(spec.pages_per_row, max(1, _KEYS_PER_BLOCK // spec.page_size))
    while True:
        try:
            limit = check_vmem("attention", _buffers(spec, pages, writes), chip, remedy)
            return Tiling(pages, writes, limit)
        except Unsupported:
            if pages == 1:
                raise
            pages //= 2


def _num_words(spec: AttentionSpec) -> int:
    visits = 4 * spec.max_visits + spec.row_steps + spec.num_tiles + 1
    rows = spec.num_rows * (spec.pages_per_row + 3)
    return visits + rows + (3 * spec.num_tokens if spec.writes else 0)


def _buffers(spec: AttentionSpec, pages: int, writes: int) -> list[Buffer]:
    size, kv_heads, lanes = spec.item_bytes, spec.num_kv_heads, spec.lanes
    rows = max(spec.padded_share, spec.share * spec.tile_tokens if spec.num_tiles else 0)
    keys = pages * spec.page_size
    row_block = (spec.rows_per_step, kv_heads, spec.padded_share, lanes)
    tile_block = (kv_heads, spec.share, spec.tile_tokens, lanes)
    found = [
        Buffer("pages", (pages, *spec.page_shape), size, copies=2),
        Buffer("maxima", (kv_heads, rows, LANES), 4),
        Buffer("sums", (kv_heads, rows, LANES), 4),
        Buffer("accumulator", (kv_heads, rows, lanes), 4),
        Buffer("scores", (rows, keys), 4, copies=3),
        Buffer("queries and outputs of rows", row_block, size, copies=4),
        Buffer("sinks", (kv_heads, spec.padded_share, LANES), 4, copies=2),
    ]
    if spec.num_tiles:
        found.append(Buffer("queries and outputs of tiles", tile_block, size, copies=4))
    if writes:
        chunk = (writes, kv_heads, spec.parts, spec.chunk, lanes)
        found.append(Buffer("rows to write", chunk, size, copies=3))
    return found
