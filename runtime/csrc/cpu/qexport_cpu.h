// The C interface of qexport's CPU kernels. Nothing here knows Python or PyTorch.
//
// Weights of a quantized linear layer [n, k] are stored in blocks of 32 rows ("packed"): see
// layout.cpp. All activations are float32, rows one after the other; codes, scales and zero points
// are never changed, so that a layer computes with the values that were trained.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum { QX_F32 = 0, QX_BF16 = 1, QX_F16 = 2, QX_I8 = 3 };

// A linear layer, out = x @ weight.T + bias.
typedef struct {
    int32_t bits;         // of a code: 1, 2, 3, 4 or 8; 0: dense rows [n, k] of `dtype`
    int32_t dtype;        // of a dense weight, or of scales: QX_F32, QX_F16 (dense: QX_BF16 too)
    int32_t n, k;         // outputs and inputs
    int32_t group;        // inputs that share a scale; k rounded up to 32 where all do
    int32_t act_group;    // inputs whose activations share a scale; it divides `group`
    float zero;           // zero point, where `zeros` is null
    const void* weight;   // packed codes, or dense rows
    const void* scales;   // [ceil(n/32), groups, 32]
    const uint8_t* zeros; // [ceil(n/32), groups, 32], or null
    const float* bias;    // [n], or null
} qx_linear;

// One decoder layer of the Llama family and its part of the cache.
typedef struct {
    const float *norm1, *norm2;    // [hidden]
    const float *q_norm, *k_norm;  // [head_dim], or null
    int32_t n_qkv, n_up;           // layers that q, k, v (gate, up) are made of, in this order
    int32_t window;                // of sliding attention; 0: none
    int32_t rope;                  // 0: positions are not rotated in this layer
    qx_linear qkv[3], o, up[2], down;
    void *keys;                    // [slots, kv_heads, context/16, head_dim, 16]
    void *values;                  // [slots, kv_heads, context, head_dim rounded up to 16]
    float *key_scales, *value_scales;  // int8 cache: [slots, kv_heads, context]
} qx_layer;

typedef struct {
    int32_t hidden, inter, heads, kv_heads, head_dim, rotary_dim;
    int32_t context, cache_dtype;  // context: of a slot, a multiple of 16
    int32_t exact;                 // activations stay float32
    int32_t n_layers;
    float eps, residual_scale, attention_scale;
    const qx_layer* layers;
} qx_model;

// Tokens of one step, whatever sequences they belong to. Consecutive tokens of a slot with
// consecutive positions are attended together.
typedef struct {
    int32_t n;
    const int32_t *slot, *position;  // [n]
    const float *cos, *sin;          // [n, rotary_dim / 2]
} qx_step;

typedef struct qx_context qx_context;

// Runs a function on so many threads and waits for all: OpenMP's GOMP_parallel.
typedef void (*qx_parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);

// Threads include the caller's; they are the context's own where `parallel` is null. Null where the
// system has no more threads or memory.
qx_context* qx_context_new(int threads, qx_parallel parallel);
void qx_context_free(qx_context*);

// "avx512-vnni", "avx2" or "generic": the best that this machine has, or the one that was forced.
const char* qx_isa(void);
// 0; -1 where this machine lacks it (nothing is changed).
int qx_force_isa(const char* name);

// Bytes of packed codes, a multiple of 64; and packing of codes uint8 [n, k].
size_t qx_packed_bytes(int bits, int n, int k);
void qx_pack(const uint8_t* codes, int bits, int n, int k, uint8_t* out);

// out[m, n] (leading dimension ldo) = x[m, k] @ weight.T + bias, or with `add`,
// out += alpha * that. Not `exact`: x is quantized to int8 in groups of act_group.
void qx_linear_forward(qx_context*, const qx_linear*, const float* x, int m, float* out, long ldo,
                       int exact, int add, float alpha);
// Rows of a dense table [*, k] of `dtype`, times `scale`, as float32.
void qx_embed(const void* table, int dtype, const int32_t* rows, int m, int k, float scale,
              float* out);
void qx_rms_norm(qx_context*, const float* x, const float* weight, float eps, int m, int k,
                 float* out);
// x [n, hidden] goes through all layers, in place; the cache takes keys and values.
void qx_model_forward(qx_context*, const qx_model*, const qx_step*, float* x);
// Sum of a buffer of 8-byte words read by all threads: what the memory gives.
uint64_t qx_read(qx_context*, const uint64_t* words, size_t count);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
