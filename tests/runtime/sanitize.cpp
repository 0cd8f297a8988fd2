// Drives every kernel over odd shapes; test_sanitizers.py compiles it with ASan and UBSan.
// Buffers have exactly the sizes that the interface asks for, so that a byte too far is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "qexport_cpu.h"

static unsigned state = 1;
static unsigned draw() { return (state = state * 1664525u + 1013904223u) >> 8; }
static float uniform() { return (float)(draw() % 20001) / 10000.0f - 1.0f; }

// Memory without room to spare on either side.
template <class T>
struct Exact {
    explicit Exact(size_t count) : p((T*)malloc(count * sizeof(T) + !count)), count(count) {
        memset((void*)p, 0, count * sizeof(T));
    }
    ~Exact() { free(p); }
    Exact(const Exact&) = delete;
    T& operator[](size_t i) { return p[i]; }
    T* p;
    size_t count;
};

struct Layer {
    Layer(int bits, int n, int k, int group, bool zeros, bool half, bool biased)
        : n(n), k(k), padded((k + 31) / 32 * 32), blocks((n + 31) / 32),
          group(group ? group : (padded + 127) / 128 * 128), groups((padded + this->group - 1) / this->group),
          codes((size_t)n * k), packed(qx_packed_bytes(bits, n, k)), scales((size_t)blocks * groups * 32 * 4),
          zero((size_t)blocks * groups * 32), bias(n) {
        for (size_t i = 0; i < codes.count; ++i) codes[i] = (uint8_t)(draw() % (1u << bits));
        qx_pack(codes.p, bits, n, k, packed.p);
        for (size_t i = 0; i < zero.count; ++i) {
            const float scale = 0.25f * (float)(1 + draw() % 4);
            const uint16_t as_half = (uint16_t)(scale == 0.25f ? 0x3400 : scale == 0.5f ? 0x3800
                                                : scale == 0.75f ? 0x3a00 : 0x3c00);
            if (half) memcpy(scales.p + 2 * i, &as_half, 2);
            else memcpy(scales.p + 4 * i, &scale, 4);
            zero[i] = (uint8_t)(draw() % (1u << bits));
        }
        for (int i = 0; i < n; ++i) bias[i] = uniform();
        const int act = group == 0 ? 128 : group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
        linear = {bits, half ? QX_F16 : QX_F32, n, k, this->group, act, 1.5f, packed.p, scales.p,
                  zeros ? zero.p : nullptr, biased ? bias.p : nullptr};
        this->half = half;
    }
    float scale(int row, int g) {
        const size_t at = ((size_t)(row / 32) * groups + g) * 32 + row % 32;
        if (!half) {
            float value;
            memcpy(&value, scales.p + 4 * at, 4);
            return value;
        }
        uint16_t h;
        memcpy(&h, scales.p + 2 * at, 2);
        return h == 0x3400 ? 0.25f : h == 0x3800 ? 0.5f : h == 0x3a00 ? 0.75f : 1.0f;
    }
    double want(const float* x, int row) {
        double sum = linear.bias ? bias[row] : 0.0;
        for (int i = 0; i < k; ++i) {
            const size_t at = ((size_t)(row / 32) * groups + i / group) * 32 + row % 32;
            const double z = linear.zeros ? zero[at] : 1.5;
            sum += (double)scale(row, i / group) * (codes[(size_t)row * k + i] - z) * x[i];
        }
        return sum;
    }
    int n, k, padded, blocks, group, groups;
    bool half;
    Exact<uint8_t> codes, packed, scales, zero;
    Exact<float> bias;
    qx_linear linear;
};

static void check(bool holds, const char* what) {
    if (!holds) {
        fprintf(stderr, "wrong: %s (%s)\n", what, qx_isa());
        exit(1);
    }
}

static void linears(qx_context* context) {
    const int shapes[][3] = {{16, 32, 32}, {33, 160, 32}, {17, 100, 0}, {5, 256, 64}, {48, 384, 128}};
    for (int bits : {1, 2, 3, 4, 8})
        for (auto& s : shapes)
            for (int variant = 0; variant < 4; ++variant) {
                Layer layer(bits, s[0], s[1], s[2], variant & 1, variant & 2, variant == 3);
                for (int m : {1, 2, 3, 4, 5, 9, 130}) {
                    Exact<float> x((size_t)m * s[1]), out((size_t)m * s[0]);
                    for (size_t i = 0; i < x.count; ++i) x[i] = uniform();
                    for (int exact : {0, 1}) {
                        qx_linear_forward(context, &layer.linear, x.p, m, out.p, s[0], exact, 0, 1.0f);
                        const double most = exact ? 1e-2 : (double)s[1] * (1 << bits) / 250.0 + 0.01;
                        for (int t = 0; t < m; t += 3)
                            for (int row = 0; row < s[0]; ++row) {
                                const double want = layer.want(x.p + (size_t)t * s[1], row);
                                check(fabs(out[(size_t)t * s[0] + row] - want) <= most, "linear");
                            }
                        qx_linear_forward(context, &layer.linear, x.p, m, out.p, s[0], exact, 1, 0.5f);
                    }
                }
            }
}

static void model(qx_context* context, int dim, int heads, int kv, int cache, int window) {
    const int hidden = 48, inter = 80, slots = 2, place = 32, wide = (dim + 15) / 16 * 16;
    const int size = cache == QX_F32 ? 4 : cache == QX_I8 ? 1 : 2;
    Layer qkv(2, (heads + 2 * kv) * dim, hidden, 0, false, true, true);
    Layer o(3, hidden, heads * dim, 0, false, true, false);
    Layer up(4, 2 * inter, hidden, 0, true, true, false), down(8, hidden, inter, 0, false, true, false);
    Exact<float> norm(hidden), head_norm(dim);
    for (int i = 0; i < hidden; ++i) norm[i] = 0.01f;
    for (int i = 0; i < dim; ++i) head_norm[i] = 1.0f;
    const size_t lines = (size_t)slots * kv * place;
    Exact<uint8_t> keys(lines * dim * size), values(lines * wide * size);
    Exact<float> key_scales(lines), value_scales(lines);
    qx_layer layer = {};
    layer.norm1 = layer.norm2 = norm.p;
    layer.q_norm = layer.k_norm = window ? head_norm.p : nullptr;
    layer.n_qkv = layer.n_up = 1;
    layer.window = window;
    layer.rope = 1;
    layer.qkv[0] = qkv.linear;
    layer.o = o.linear;
    layer.up[0] = up.linear;
    layer.down = down.linear;
    layer.keys = keys.p;
    layer.values = values.p;
    layer.key_scales = key_scales.p;
    layer.value_scales = value_scales.p;
    const qx_layer layers[] = {layer, layer};
    const qx_model whole = {hidden, inter, heads, kv,    dim,  dim, place,
                            cache,  0,     2,     1e-5f, 0.5f, 0.2f, layers};
    for (int begin : {0, 13, 31}) {
        const int n = begin == 0 ? 13 : begin == 13 ? 18 : 1, rows = 2 * n;
        Exact<float> x((size_t)rows * hidden), cos((size_t)rows * (dim / 2)), sin((size_t)rows * (dim / 2));
        Exact<int32_t> slot(rows), position(rows);
        for (size_t i = 0; i < x.count; ++i) x[i] = uniform();
        for (size_t i = 0; i < cos.count; ++i) cos[i] = 0.8f, sin[i] = 0.6f;
        for (int t = 0; t < rows; ++t) slot[t] = t / n, position[t] = begin + t % n;
        const qx_step step = {rows, slot.p, position.p, cos.p, sin.p};
        qx_model_forward(context, &whole, &step, x.p);
        for (size_t i = 0; i < x.count; ++i) check(std::isfinite(x[i]), "model");
    }
}

int main() {
    int sets = 0;
    for (const char* isa : {"avx512-vnni", "avx2", "generic"}) {
        if (qx_force_isa(isa)) continue;
        ++sets;
        for (int threads : {1, 3}) {
            qx_context* context = qx_context_new(threads, nullptr);
            if (threads == 1) linears(context);
            for (int cache : {QX_F32, QX_BF16, QX_F16, QX_I8}) {
                model(context, 16, 6, 2, cache, 0);
                model(context, 40, 3, 1, cache, 9);
                model(context, 6, 4, 4, cache, 0);
            }
            for (int dtype : {QX_F32, QX_BF16, QX_F16}) {
                const int n = 19, k = 37, m = 5;
                Exact<uint8_t> rows((size_t)n * k * (dtype == QX_F32 ? 4 : 2));
                Exact<float> x(m * k), out(m * n);
                Exact<int32_t> asked(2);
                asked[1] = n - 1;
                const qx_linear dense = {0, dtype, n, k, k, k, 0.0f, rows.p, nullptr, nullptr, nullptr};
                qx_linear_forward(context, &dense, x.p, m, out.p, n, 1, 0, 1.0f);
                qx_embed(rows.p, dtype, asked.p, 2, k, 2.0f, x.p);
                qx_rms_norm(context, x.p, x.p, 1e-5f, m, 32, x.p);
            }
            qx_context_free(context);
        }
    }
    printf("%d instruction sets\n", sets);
    return sets ? 0 : 1;
}
