"""The few shapes of steps that are compiled: a number of tokens for steps in which every row computes one, and for
steps with prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anychip.plugin_api import ShapeKey, ShapePolicy, StepLimits, Unsupported, forward_features

GROWTH = 2
"""From one bucket to the next the size grows by so many times. Under the chat mix of `anychip bench` 23% of tokens are
then padding, and 41% with 4 (benchmarks/tpu/padding.py)."""
_LEAST_ROWS, _LEAST_TOKENS = 8, 16
PAGES_STEP = 8
"""Tables of pages come in this many times the last one's width: a short context need not gather a long one's pages."""
_LEAST_PAGES = 32


class BucketedShapes(ShapePolicy):
    def __init__(self, limits: StepLimits, *, bucket_pages: bool, growth: float = GROWTH) -> None:
        """`bucket_pages` False: tables are always as wide as the longest request, for kernels that read no more of
        them than they need."""
        self._rows = sizes(_LEAST_ROWS, limits.max_num_reqs, growth)
        self._tokens = sizes(_LEAST_TOKENS, limits.max_num_tokens, growth)
        most = max(limits.max_pages)
        self._pages = sizes(_LEAST_PAGES, most, PAGES_STEP) if bucket_pages else [most]
        self._drafts = limits.max_drafts > 0
        self._max_rows = self._rows[-1]
        self._most_samples = self._tokens[-1] if self._drafts else self._max_rows

    def keys(self) -> Sequence[ShapeKey]:
        found = [self._key(rows, rows, rows, pages) for rows in self._rows for pages in self._pages]
        for tokens in self._tokens:
            rows = min(tokens, self._max_rows)
            samples = {rows, tokens} if self._drafts else {rows}
            found += [self._key(tokens, rows, count, pages) for count in sorted(samples) for pages in self._pages]
        return list(dict.fromkeys(found))

    def with_features(self, limits: StepLimits) -> list[ShapeKey]:
        """The shapes of steps with features of forward_features: they are rare, so each has the largest alone."""
        largest = self._key(self._tokens[-1], self._max_rows, self._most_samples, self._pages[-1])
        return [replace(largest, features=features) for features in forward_features(limits) if features]

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
        if features and num_tokens <= self._tokens[-1] and num_reqs <= self._max_rows:
            return replace(
                self._key(self._tokens[-1], self._max_rows, self._most_samples, self._pages[-1]), features=features
            )
        wide = next((pages for pages in self._pages if num_pages <= pages), None)
        if wide is not None:
            if max_query_len <= 1 and num_samples <= num_reqs:
                for rows in self._rows:
                    if max(num_tokens, num_reqs) <= rows:
                        return replace(self._key(rows, rows, rows, wide), features=features)
            for tokens in self._tokens:
                rows = min(tokens, self._max_rows)
                if num_tokens <= tokens and num_reqs <= rows:
                    samples = rows if num_samples <= rows else tokens
                    return replace(self._key(tokens, rows, samples, wide), features=features)
        raise Unsupported(
            "anychip-tpu",
            [
                f"a step of {num_tokens} tokens in {num_reqs} rows over {num_pages} pages is larger than any that is "
                f"compiled: {self._tokens[-1]} tokens, {self._max_rows} rows, {self._pages[-1]} pages"
            ],
        )

    def _key(self, tokens: int, rows: int, samples: int, pages: int) -> ShapeKey:
        return ShapeKey(num_tokens=tokens, num_reqs=rows, num_samples=samples, max_query_len=tokens, num_pages=pages)


def sizes(least: int, most: int, factor: float) -> list[int]:
    """From `least` on, each `factor` times the last, up to `most`, which is the last; in multiples of 8, as a TPU's
    registers hold them."""
    most = -(-most // 8) * 8
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(-(-int(found[-1] * factor) // 8) * 8, most))
    return found
