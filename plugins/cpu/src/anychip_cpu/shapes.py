"""Which steps are recorded, and what they are filled up to."""

from __future__ import annotations

from dataclasses import replace

from anychip.plugin_api import ADAPTERS, SCORES, TAPS, ShapeKey, ShapePolicy, StepLimits

_TOKENS = (1, 5, 17, 67)
"""A recording takes as many tokens or fewer, and kernels compute none that a step does not have: a few sizes suffice.
Above the last, Python costs a step a few hundredths of its time. They are primes, of which no size of a model is a
multiple: a call's rows tell whether they follow the tokens."""

MOST_TOKENS = _TOKENS[-1]

_FEW_PAGES = 256
"""A step's block table is copied whole."""


class RecordedShapes(ShapePolicy):
    """Small steps all of whose tokens are sampled from, and those whose attention runs between recorded pieces. Others
    keep their sizes."""

    def __init__(self, limits: StepLimits) -> None:
        smaller = (0, *_TOKENS)
        tokens = [count for count, below in zip(_TOKENS, smaller, strict=False) if below < limits.max_num_tokens]
        self._pieces = tokens[1:]
        longest = max(limits.max_pages, default=1)
        pages = sorted({min(_FEW_PAGES, longest), longest})
        self._keys = [
            ShapeKey(num_tokens=count, num_reqs=count, num_samples=count, max_query_len=0, num_pages=size)
            for count in tokens
            for size in pages
        ]

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        if num_samples == num_tokens and features in ((), (TAPS,), (ADAPTERS,)):
            for key in self._keys:
                if num_tokens <= key.num_tokens and num_pages <= key.num_pages:
                    return replace(key, features=features) if features else key
        if set(features) <= {TAPS, SCORES}:
            num_tokens = next((count for count in self._pieces if count >= num_tokens), num_tokens)
        return super().bucket(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )
