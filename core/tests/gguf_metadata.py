"""Writes GGUF files: any metadata and tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anychip.gguf.block_types import BY_NAME

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32

Stored = tuple[str | int, Sequence[int], bytes]
"""A tensor: its type's name, or an unknown one's number, its shape with the outermost extent first, its bytes."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def setting(value: Any) -> bytes:
    """A value behind its type, as gguf-py would choose it."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    items = [setting(each) for each in value]
    kind = items[0][:4] if items else struct.pack("<I", STRING)
    return struct.pack("<I", ARRAY) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], *, version: int = 3) -> bytes:
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    head += [text(key) + setting(value) for key, value in metadata.items()]
    data = b""
    for name, (kind, shape, held) in tensors.items():
        head.append(text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        head.append(struct.pack("<IQ", kind if isinstance(kind, int) else BY_NAME[kind].number, len(data)))
        data += held + bytes(-len(held) % ALIGNMENT)
    header = b"".join(head)
    return header + bytes(-len(header) % ALIGNMENT) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], **options: Any) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


VALUES = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 8, "llama.embedding_length": 4,
    "llama.feed_forward_length": 4, "llama.attention.head_count": 1,
}  # fmt: skip
"""The least that a configuration needs."""
