// The instructions that kernels use, one function each; tests have the same functions for the host.
#pragma once

#include "decode.cuh"

#if defined(__CUDA_ARCH__)

namespace qx {

struct alignas(16) Words4 {
    u32 word[4];
};

QX_FN int thread() { return threadIdx.x; }
QX_FN int block_x() { return blockIdx.x; }
QX_FN int block_y() { return blockIdx.y; }
QX_FN int block_z() { return blockIdx.z; }
QX_FN int blocks_x() { return gridDim.x; }
QX_FN int blocks_z() { return gridDim.z; }

// The same number in all lanes of a warp, which the compiler then knows.
QX_FN int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

extern __shared__ __align__(1024) unsigned char shared_bytes[];

QX_FN unsigned char* shared_memory() { return shared_bytes; }

// Addresses in shared memory, as instructions take them.
QX_FN u32 shared_address() { return (u32)__cvta_generic_to_shared(shared_bytes); }

// Weights are read once: they are to be the first that leave the L2 cache.
QX_FN unsigned long long read_once() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

QX_FN Words4 load_stream(const Words4* from, unsigned long long policy) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(from), "l"(policy));
    return v;
}

// 16 bytes from global to shared memory, zeros where there is nothing to read.
QX_FN void copy_async(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

QX_FN void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
QX_FN void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

QX_FN void warp_sync() { __syncwarp(); }

// All of `threads` consecutive threads, a multiple of 32; `id` tells such groups apart.
QX_FN void group_sync(int id, int threads) {
    if (threads == 32)
        warp_sync();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(id + 1), "r"(threads) : "memory");
}

QX_FN void block_sync() { __syncthreads(); }

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
QX_FN void load_matrices(u32* to, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// d = a b + c for 16x16 a, 16x8 b and float32 c, d.
template <class F>
QX_FN void mma(float* d, const u32* a, const u32* b, const float* c) {
    if constexpr (F::mantissa == 10)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
              "f"(c[1]), "f"(c[2]), "f"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
              "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

QX_FN float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

QX_FN unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

QX_FN float from_bits(u32 bits) { return __uint_as_float(bits); }

QX_FN unsigned short to_bfloat16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Counts a block in and tells how many were before it; what they all wrote can be read then.
QX_FN u32 arrive(u32* counter) { return atomicAdd(counter, 1u); }

QX_FN void fence() { __threadfence(); }

// A constant that stays in its register: the compiler would load one anew where it is next wanted,
// and give its register away meanwhile, while wgmma still reads it.
template <u32 VALUE>
QX_FN u32 in_register() {
    u32 value;
    asm volatile("mov.b32 %0, %1;" : "=r"(value) : "n"(VALUE));
    return value;
}

// Another block's result: not from this multiprocessor's own cache.
QX_FN float load_fresh(const float* from) { return __ldcg(from); }

}  // namespace qx

#else
#include "host_ptx.h"
#endif
