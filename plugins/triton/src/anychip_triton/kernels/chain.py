"""Kernels that are launched while the one before them ends: what CUDA calls programmatic dependent launch.

CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization". A kernel that takes CHAINED is launched
so on targets that can. Whatever it reads or writes of an earlier kernel comes after `after_earlier`, in every program
of it: that is why it is the first statement.
"""

import triton
from triton.language.extra.cuda import gdc_wait


@triton.jit
def after_earlier():
    """Waits until all that was launched before this kernel has ended."""
    gdc_wait()
