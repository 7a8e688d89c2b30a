"""Which of a call's copies of blocks count."""

from __future__ import annotations

from collections.abc import Sequence


def last_copies(src: Sequence[int], dst: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sources and destinations of CacheBackend.copy_blocks, each destination once: of copies into one block the last
    counts. Where an index names a row twice, a device with many threads writes one of the two, and another next time.
    """
    last = dict(zip(dst, src, strict=True))
    return list(last.values()), list(last)
