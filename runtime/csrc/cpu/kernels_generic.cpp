#include <math.h>
#include <string.h>

#if !defined(__clang__)
#pragma GCC optimize("O2")  // a third of the compile time
#endif

#include "kernels.h"

// Arrays of lanes: what to unroll is left to the compiler.
#define INLINE
#define SI static inline
#include "simd_generic.h"
#include "kernels.inc.h"

extern const qx_kernels qx_generic = QX_TABLE("generic");
