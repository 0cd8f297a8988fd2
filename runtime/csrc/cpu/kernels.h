// One table of kernels for each instruction set, and what they share.
#pragma once
#include "qexport_cpu.h"

// Activations of `m` tokens as int8: x = scale * q in each group of inputs.
struct qx_acts {
    int m;
    long ld;               // bytes of a row of q: k rounded up to 32, zeros after k
    int groups;
    const int8_t* q;       // [m, ld]
    const float* scale;    // [m, groups]
    const float* sum;      // [m, groups]: of q
};

struct qx_out {
    float* out;
    long ld;
    int add;      // out += alpha * y, else out = y
    float alpha;
};

// Consecutive tokens of one slot: rows `first .. first+count-1`, the first at `position`.
struct qx_tile {
    int slot, first, count, position;
};

static const int QX_TILE = 4;   // tokens in a tile
static const int QX_ROWS = 64;  // query heads of a tile times its tokens, at most

struct qx_kernels {
    const char* name;
    void (*quantize)(const float* x, int k, int group, int8_t* q, float* scale, float* sum);
    // Blocks of 32 outputs [first, last) for all tokens.
    void (*matmul)(const qx_linear*, const qx_acts*, int first, int last, const qx_out*);
    void (*matmul_exact)(const qx_linear*, const float* x, long ldx, int m, int first, int last,
                         const qx_out*);
    void (*dense)(const qx_linear*, const float* x, int m, int first, int last, const qx_out*);
    void (*embed)(const void* table, int dtype, int row, int k, float scale, float* out);
    void (*norm)(const float* x, const float* weight, float eps, int k, float* out);
    void (*silu_mul)(const float* gate_up, int inter, float* out);
    // Rotates q and k of a token's row [q, k, v] and puts k and v into the cache.
    void (*rotate_store)(const qx_model*, const qx_layer*, float* qkv, int slot, int position,
                         const float* cos, const float* sin);
    void (*attend)(const qx_model*, const qx_layer*, const qx_tile*, int kv_head, const float* qkv,
                   float* out);
};

extern const qx_kernels qx_generic;
#if defined(__x86_64__)
extern const qx_kernels qx_avx2;
extern const qx_kernels qx_avx512;
#endif
