// The C interface: which kernels run, on which thread, over which tokens.
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

static const qx_kernels* best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return &qx_avx512;
    if (avx2) return &qx_avx2;
#endif
    return &qx_generic;
}

static std::atomic<const qx_kernels*>& kernels() {
    static std::atomic<const qx_kernels*> table{best()};
    return table;
}

const char* qx_isa(void) { return kernels().load()->name; }

int qx_force_isa(const char* name) {
    const qx_kernels* order[] = {
#if defined(__x86_64__)
        &qx_avx512, &qx_avx2,
#endif
        &qx_generic};
    bool here = false;
    for (const qx_kernels* table : order) {
        here = here || table == best();
        if (here && !strcmp(table->name, name)) {
            kernels() = table;
            return 0;
        }
    }
    return -1;
}

namespace {

int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Memory that grows and is not cleared.
template <class T>
class Buffer {
  public:
    T* at_least(size_t count) {
        if (count > count_) {
            memory_.reset((T*)aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
            if (!memory_) throw std::bad_alloc();
            count_ = count;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { free(p); }
    };
    std::unique_ptr<T[], Free> memory_;
    size_t count_ = 0;
};

}  // namespace

struct qx_context {
    qx_context(int threads, qx_parallel parallel) : pool(threads, parallel) {}
    Pool pool;
    std::mutex busy;  // one call at a time: the buffers are shared
    Buffer<int8_t> q;
    Buffer<float> scale, sum, padded, hidden, qkv, mixed, up, inner;
    std::vector<qx_tile> tiles;

    // Calls task(first, last) over 0..count in pieces of a multiple of `grain`, a few per thread.
    template <class Task>
    void share(int count, int grain, const Task& task) {
        const int piece = round_up((count + 4 * pool.threads() - 1) / (4 * pool.threads()), grain);
        pool.run((count + piece - 1) / piece, [&](int i) {
            task(i * piece, (i + 1) * piece < count ? (i + 1) * piece : count);
        });
    }

    void linear(const qx_linear& L, const float* x, int m, const qx_out& out, bool exact) {
        const qx_kernels& K = *kernels().load();
        if (L.bits == 0) {
            share(L.n, 4, [&](int a, int b) { K.dense(&L, x, m, a, b, &out); });
            return;
        }
        const int blocks = (L.n + 31) / 32, padded_k = round_up(L.k, 32);
        if (exact) {
            const float* from = x;
            if (padded_k != L.k) {
                float* to = padded.at_least((size_t)m * padded_k);
                for (int t = 0; t < m; ++t) {
                    memcpy(to + (size_t)t * padded_k, x + (size_t)t * L.k, sizeof(float) * L.k);
                    memset(to + (size_t)t * padded_k + L.k, 0, sizeof(float) * (padded_k - L.k));
                }
                from = to;
            }
            share(blocks, 1,
                  [&](int a, int b) { K.matmul_exact(&L, from, padded_k, m, a, b, &out); });
            return;
        }
        const int groups = (padded_k + L.act_group - 1) / L.act_group;
        int8_t* to = q.at_least((size_t)m * padded_k);
        float* scales = scale.at_least((size_t)m * groups);
        float* sums = sum.at_least((size_t)m * groups);
        each(m, [&](int t) {
            K.quantize(x + (size_t)t * L.k, L.k, L.act_group, to + (size_t)t * padded_k,
                       scales + (size_t)t * groups, sums + (size_t)t * groups);
        });
        const qx_acts acts = {m, padded_k, groups, to, scales, sums};
        share(blocks, 1, [&](int a, int b) { K.matmul(&L, &acts, a, b, &out); });
    }

    // Calls task(token) for all tokens; few are not worth other threads.
    template <class Task>
    void each(int m, const Task& task) {
        if (m < 4) {
            for (int t = 0; t < m; ++t) task(t);
            return;
        }
        share(m, 1, [&](int a, int b) {
            for (int t = a; t < b; ++t) task(t);
        });
    }

    void linears(const qx_linear* parts, int count, const float* x, int m, float* out, long ld,
                 bool exact) {
        for (int i = 0; i < count; ++i) {
            linear(parts[i], x, m, {out, ld, 0, 0.0f}, exact);
            out += parts[i].n;
        }
    }

    void layer(const qx_model& M, const qx_layer& L, const qx_step& S, float* x);
};

static void make_tiles(const qx_model& M, const qx_step& S, std::vector<qx_tile>& tiles) {
    const int share = M.heads / M.kv_heads;
    const int most = QX_ROWS / share < QX_TILE ? QX_ROWS / share : QX_TILE;
    tiles.clear();
    for (int t = 0; t < S.n; ++t) {
        qx_tile* last = tiles.empty() ? nullptr : &tiles.back();
        if (last && last->slot == S.slot[t] && last->count < most &&
            last->position + last->count == S.position[t])
            ++last->count;
        else
            tiles.push_back({S.slot[t], t, 1, S.position[t]});
    }
}

void qx_context::layer(const qx_model& M, const qx_layer& L, const qx_step& S, float* x) {
    const qx_kernels& K = *kernels().load();
    const int n = S.n, half = M.rotary_dim / 2;
    const long width = (long)(M.heads + 2 * M.kv_heads) * M.head_dim;
    const long attended = (long)M.heads * M.head_dim;
    float* h = hidden.at_least((size_t)n * M.hidden);
    float* rows = qkv.at_least((size_t)n * width);
    float* att = mixed.at_least((size_t)n * attended);
    float* gate_up = up.at_least((size_t)n * 2 * M.inter);
    float* act = inner.at_least((size_t)n * M.inter);
    auto normed = [&](const float* weight) {
        each(n, [&](int t) {
            K.norm(x + (size_t)t * M.hidden, weight, M.eps, M.hidden, h + (size_t)t * M.hidden);
        });
    };
    normed(L.norm1);
    linears(L.qkv, L.n_qkv, h, n, rows, width, M.exact);
    each(n, [&](int t) {
        K.rotate_store(&M, &L, rows + t * width, S.slot[t], S.position[t],
                       S.cos + (size_t)t * half, S.sin + (size_t)t * half);
    });
    const int heads = M.kv_heads;
    pool.run((int)tiles.size() * heads, [&](int i) {
        K.attend(&M, &L, &tiles[i / heads], i % heads, rows, att);
    });
    linear(L.o, att, n, {x, M.hidden, 1, M.residual_scale}, M.exact);
    normed(L.norm2);
    linears(L.up, L.n_up, h, n, gate_up, 2 * M.inter, M.exact);
    each(n, [&](int t) {
        K.silu_mul(gate_up + (size_t)t * 2 * M.inter, M.inter, act + (size_t)t * M.inter);
    });
    linear(L.down, act, n, {x, M.hidden, 1, M.residual_scale}, M.exact);
}

qx_context* qx_context_new(int threads, qx_parallel parallel) {
    try {
        return new qx_context(threads, parallel);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void qx_context_free(qx_context* context) { delete context; }

void qx_linear_forward(qx_context* C, const qx_linear* L, const float* x, int m, float* out,
                       long ldo, int exact, int add, float alpha) {
    std::lock_guard<std::mutex> lock(C->busy);
    C->linear(*L, x, m, {out, ldo, add, alpha}, exact);
}

void qx_embed(const void* table, int dtype, const int32_t* rows, int m, int k, float scale,
              float* out) {
    for (int t = 0; t < m; ++t)
        kernels().load()->embed(table, dtype, rows[t], k, scale, out + (size_t)t * k);
}

void qx_rms_norm(qx_context* C, const float* x, const float* weight, float eps, int m, int k,
                 float* out) {
    std::lock_guard<std::mutex> lock(C->busy);
    C->each(m, [&](int t) {
        kernels().load()->norm(x + (size_t)t * k, weight, eps, k, out + (size_t)t * k);
    });
}

void qx_model_forward(qx_context* C, const qx_model* M, const qx_step* S, float* x) {
    std::lock_guard<std::mutex> lock(C->busy);
    make_tiles(*M, *S, C->tiles);
    for (int i = 0; i < M->n_layers; ++i) C->layer(*M, M->layers[i], *S, x);
}

uint64_t qx_read(qx_context* C, const uint64_t* words, size_t count) {
    std::lock_guard<std::mutex> lock(C->busy);
    std::atomic<uint64_t> total{0};
    const size_t piece = 1 << 15;
    C->pool.run((int)((count + piece - 1) / piece), [&](int i) {
        uint64_t sums[8] = {0};
        const size_t end = (i + 1) * piece < count ? (i + 1) * piece : count;
        for (size_t w = i * piece; w + 8 <= end; w += 8)
            for (int j = 0; j < 8; ++j) sums[j] += words[w + j];
        for (uint64_t sum : sums) total += sum;
    });
    return total;
}
