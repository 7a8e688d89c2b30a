// The vector type that the compiler's flags ask for. Each variant is a library of its own: code that two of them share
// by name must not be taken from the other one.
#pragma once

#if defined(__AVX512F__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#else
#include "simd/generic.h"
#endif

namespace anychip {

#if defined(__AMX_BF16__) || defined(ANYCHIP_EMULATE_AMX)
using Vector = Avx512Amx;
#elif defined(__AVX512BF16__)
using Vector = Avx512<true>;
#elif defined(__AVX512F__)
using Vector = Avx512<false>;
#elif defined(__AVX2__)
using Vector = Avx2;
#else
using Vector = Generic;
#endif

}  // namespace anychip
