"""Unit roundoffs and the error model that bounds are derived from.

Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1: n roundings of relative size u multiply a
result by at most 1 + gamma(n), gamma(n) = n u / (1 - n u). Every backend may accumulate in float32, in any order, and
round what passes between kernels once to the working dtype; it may do no worse. There is no tolerance to set.
"""

from __future__ import annotations

import numpy as np

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
"""Below these, results may be flushed to zero."""
FP8_UNIT = 2.0**-4
FP8_SMALLEST_STEP = 2.0**-9
U32 = UNIT_ROUNDOFF["float32"]


def gamma(n: float, u: float = U32) -> float:
    """Growth of n roundings of size u."""
    assert n * u < 1, f"{n} roundings of {u} leave no digit"
    return n * u / (1 - n * u)


def rounded(value: np.ndarray, dtype: str, times: int = 1) -> np.ndarray:
    """Absolute error of rounding a result to a dtype, `times` times."""
    return np.abs(value) * gamma(times, UNIT_ROUNDOFF[dtype]) + SMALLEST[dtype]
