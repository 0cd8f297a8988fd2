#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#include "kernels.h"

// Only what stands below is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2")
#endif
#define INLINE __attribute__((always_inline))
#define SI static inline INLINE
#include "simd_avx512.h"
#include "kernels.inc.h"

extern const qx_kernels qx_avx512 = QX_TABLE("avx512-vnni");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
