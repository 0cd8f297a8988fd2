#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#include "kernels.h"

// Only what stands below is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define INLINE __attribute__((always_inline))
#define SI static inline INLINE
#include "simd_avx2.h"
#include "kernels.inc.h"

extern const qx_kernels qx_avx2 = QX_TABLE("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
