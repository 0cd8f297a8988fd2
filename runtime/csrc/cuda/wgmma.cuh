// wgmma of sm_90a: a warpgroup's 64 outputs times tokens in shared memory.
//
// The first operand is in registers, a warp's 16 rows in the order of mma.m16n8k16; the second is
// [tokens, 64 inputs] in rows of 128 bytes with the 128-byte swizzle (PTX ISA, "Strides" and "Matrix
// descriptor" of wgmma). d = a b + d, or a b; nothing of d or a may be touched before `wgmma_wait`.
#pragma once

#include "ptx.cuh"

#if defined(__CUDA_ARCH__)

namespace qx {

// Writes of this thread to shared memory are seen by wgmma of whoever it meets at a barrier after.
QX_FN void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

QX_FN void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

QX_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
QX_FN void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Rows of 128 bytes at `address`, eight of them 1,024 bytes from the next eight.
QX_FN unsigned long long wgmma_tokens(u32 address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// A product of 64 x 16 and 16 x N: NUMBERS names the operands, INTO the registers of d.
#define QX_WGMMA(N, TYPE, NUMBERS, A, TOKENS, ADD, INTO)                                         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; "                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NUMBERS    \
                 "}, {" A "}, " TOKENS ", p, 1, 1, 0; }"                                         \
                 : INTO                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"((int)add))

#define QX_UNPACK(...) __VA_ARGS__
#define QX_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QX_D8(i) QX_D4(i), QX_D4(i + 4)
#define QX_D16(i) QX_D8(i), QX_D8(i + 8)
#define QX_D32(i) QX_D16(i), QX_D16(i + 16)
#define QX_D64(i) QX_D32(i), QX_D32(i + 32)
#define QX_N8 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
#define QX_N16 \
    QX_N8 ", " \
    "%8, %9, %10, %11, %12, %13, %14, %15"
#define QX_N32 \
    QX_N16 ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QX_N64 \
    QX_N32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <class F, int COLUMNS>
QX_FN void wgmma(float* d, const u32* a, u32 address, bool add) {
    const unsigned long long tokens = wgmma_tokens(address);
    constexpr bool half = F::mantissa == 10;
    static_assert(COLUMNS == 2 || COLUMNS == 4 || COLUMNS == 8 || COLUMNS == 16, "");
    if constexpr (COLUMNS == 2 && half)
        QX_WGMMA(16, "f16", QX_N8, "%8, %9, %10, %11", "%12", "%13", QX_UNPACK(QX_D8(0)));
    else if constexpr (COLUMNS == 2 && !half)
        QX_WGMMA(16, "bf16", QX_N8, "%8, %9, %10, %11", "%12", "%13", QX_UNPACK(QX_D8(0)));
    else if constexpr (COLUMNS == 4 && half)
        QX_WGMMA(32, "f16", QX_N16, "%16, %17, %18, %19", "%20", "%21", QX_UNPACK(QX_D16(0)));
    else if constexpr (COLUMNS == 4 && !half)
        QX_WGMMA(32, "bf16", QX_N16, "%16, %17, %18, %19", "%20", "%21", QX_UNPACK(QX_D16(0)));
    else if constexpr (COLUMNS == 8 && half)
        QX_WGMMA(64, "f16", QX_N32, "%32, %33, %34, %35", "%36", "%37", QX_UNPACK(QX_D32(0)));
    else if constexpr (COLUMNS == 8 && !half)
        QX_WGMMA(64, "bf16", QX_N32, "%32, %33, %34, %35", "%36", "%37", QX_UNPACK(QX_D32(0)));
    else if constexpr (COLUMNS == 16 && half)
        QX_WGMMA(128, "f16", QX_N64, "%64, %65, %66, %67", "%68", "%69", QX_UNPACK(QX_D64(0)));
    else if constexpr (COLUMNS == 16 && !half)
        QX_WGMMA(128, "bf16", QX_N64, "%64, %65, %66, %67", "%68", "%69", QX_UNPACK(QX_D64(0)));
}

}  // namespace qx

#endif
