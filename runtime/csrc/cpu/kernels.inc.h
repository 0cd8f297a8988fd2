// Every kernel, written once over the sixteen lanes of simd_*.h and compiled for each of them.
//
// What a token's result is does not depend on the tokens beside it: sums run in the same order in
// every path, integer sums are exact, and tiles only share loads.
#include <math.h>
#include <string.h>

namespace {

// ---------------------------------------------------------------- codes in place

static const int ROWS = 32;          // outputs of a block
static const int HALVES = ROWS / 16;  // one after the other in each chunk

// Half a chunk holds the codes of 16 rows: vectors of 64 bytes, four neighbouring inputs of a row
// in each lane. Field f is the codes of inputs 4f .. 4f+3 (layout.cpp).
template <int B>
struct Chunk {
    static constexpr int vectors = B == 3 ? 3 : 1;
    static constexpr int fields = B == 3 ? 8 : 8 / B;
    static constexpr int inputs = 4 * fields;
    static constexpr int places = B == 3 ? 3 : 8 / B;  // bits at which a field can begin
    static constexpr int mask = (1 << B) - 1;
    static constexpr int shift(int place) { return B == 3 ? (place < 2 ? 3 * place : 5) : B * place; }
    static constexpr int place(int field) { return B == 3 ? (field < 6 ? field % 2 : 2) : field; }
    static constexpr int top = shift(places - 1);
};

template <int B, int F>
SI vi raw_field(const vi* v) {
    if constexpr (B != 3) return v[0];
    else if constexpr (F < 6) return v[F / 2];
    else return i_or(i_and_bytes(v[F - 6], 0xc0), i_and_bytes(i_shr<F - 5>(v[2]), 0x20));
}

// Codes of field F, in the low bits of each byte.
template <int B, int F>
SI vi field(const vi* v) {
    constexpr int shift = Chunk<B>::shift(Chunk<B>::place(F));
    const vi raw = raw_field<B, F>(v);
    if constexpr (B == 8) return raw;
    else if constexpr (shift == 0) return i_and_bytes(raw, Chunk<B>::mask);
    else return i_and_bytes(i_shr<shift>(raw), Chunk<B>::mask);
}

// The same, multiplied by 2**shift.
template <int B, int F>
SI vi field_in_place(const vi* v) {
    constexpr int shift = Chunk<B>::shift(Chunk<B>::place(F));
    const vi raw = raw_field<B, F>(v);
    if constexpr (B == 8 || (B == 3 && F >= 6)) return raw;
    else return i_and_bytes(raw, Chunk<B>::mask << shift);
}

template <int N, int I = 0, class Fn>
SI void unroll(Fn&& fn) {
    if constexpr (I < N) {
        fn.template operator()<I>();
        unroll<N, I + 1>(fn);
    }
}

SI int32_t load4(const int8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

// Sums of code times activation over one group. Where codes are multiplied in place there is one
// accumulator for each place of a field, else one for codes that are shifted down first.
template <int B, bool InPlace>
struct Sums {
    static constexpr int count = InPlace ? Chunk<B>::places : B == 8 && !kInPlace ? 2 : 1;
    static constexpr int top = InPlace ? Chunk<B>::top : 0;
    vi acc[count];

    SI void clear(Sums& s) {
        for (int i = 0; i < count; ++i) s.acc[i] = i_zero();
    }
    template <int F>
    SI vi code(const vi* v) {
        if constexpr (InPlace) return field_in_place<B, F>(v);
        else return field<B, F>(v);
    }
    template <int F>
    SI void add(Sums& s, vi code, int32_t x) {
        if constexpr (InPlace) {
            vi& acc = s.acc[Chunk<B>::place(F)];
            acc = i_dot4(acc, code, x);
        } else if constexpr (count == 2) {  // nibbles, so that pairs fit 16 bits
            s.acc[0] = i_dot4(s.acc[0], i_and_bytes(code, 15), x);
            s.acc[1] = i_dot4(s.acc[1], i_and_bytes(i_shr<4>(code), 15), x);
        } else {
            s.acc[0] = i_dot4(s.acc[0], code, x);
        }
    }
    // 2**top times the sum.
    SI vi total(const Sums& s) {
        if constexpr (!InPlace && count == 2) return i_add(s.acc[0], i_shl<4>(s.acc[1]));
        else return joined<1>(s, s.acc[0]);
    }
    template <int I>
    SI vi joined(const Sums& s, vi sum) {
        if constexpr (I >= count) return sum;
        else
            return joined<I + 1>(
                s, i_add(i_shl<Chunk<B>::shift(I) - Chunk<B>::shift(I - 1)>(sum), s.acc[I]));
    }
};

SI int round_up(int x, int to) { return (x + to - 1) / to * to; }

SI vf load_scale(const uint8_t* p, int size) {
    return size == 2 ? f_load_f16((const uint16_t*)p) : f_load((const float*)p);
}

SI vf load_scale(const qx_linear& L, long at) {
    const int size = L.dtype == QX_F16 ? 2 : 4;
    return load_scale((const uint8_t*)L.scales + at * size, size);
}

SI vf load_zero(const qx_linear& L, long at) {
    return L.zeros ? f_load_u8(L.zeros + at) : f_set(L.zero);
}

// y of 16 outputs from n on goes to its place for token m.
SI void put(const qx_linear& L, const qx_out& o, int n, int m, vf y) {
    float* out = o.out + m * o.ld + n;
    if (n + 16 <= L.n) {
        if (L.bias) y = f_add(y, f_load(L.bias + n));
        if (o.add) y = f_fma(y, f_set(o.alpha), f_load(out));
        f_store(out, y);
        return;
    }
    float lanes[16];
    f_store(lanes, y);
    for (int i = 0; n + i < L.n; ++i) {
        const float v = lanes[i] + (L.bias ? L.bias[n + i] : 0.0f);
        out[i] = o.add ? out[i] + o.alpha * v : v;
    }
}

// y += scale_w * scale_x * (total / 2**top - zero * sum); all but the last product is exact.
SI vf take_group(vf y, vi total, int top, vf scale, vf zero, float x_scale, float x_sum) {
    const float up = (float)(1 << top);
    const vf t = f_fma(zero, f_set(-x_sum * up), f_from_i(total));
    return f_fma(f_mul(t, f_set(x_scale / up)), scale, y);
}

// ---------------------------------------------------------------- int8 activations, few tokens

static const long FAR = 4096;  // bytes to read ahead

// A block of outputs for T tokens. Codes are read once, and as one stream: memory gives a processor
// more of one than of two.
template <int B, int T>
SI void stream_block(const qx_linear& L, const qx_acts& A, int block, int m, const qx_out& o) {
    using C = Chunk<B>;
    using S = Sums<B, kInPlace && HALVES * T * C::places <= 16>;  // of 32 registers
    const int padded = round_up(L.k, 32), groups = round_up(padded, L.group) / L.group;
    const int per_group = L.group / L.act_group;
    const int scale_size = L.dtype == QX_F16 ? 2 : 4;
    const uint8_t* w = (const uint8_t*)L.weight + (long)block * padded * ROWS / 8 * B;
    const uint8_t* scales = (const uint8_t*)L.scales + (long)block * groups * ROWS * scale_size;
    const uint8_t* zeros = L.zeros ? L.zeros + (long)block * groups * ROWS : nullptr;
    vf y[HALVES][T];
    for (int r = 0; r < HALVES; ++r)
        for (int t = 0; t < T; ++t) y[r][t] = f_zero();
    for (int a = 0, shared = 0; a < A.groups; ++a) {
        S sums[HALVES][T];
        for (int r = 0; r < HALVES; ++r)
            for (int t = 0; t < T; ++t) S::clear(sums[r][t]);
        const int begin = a * L.act_group;
        const int end = begin + L.act_group < padded ? begin + L.act_group : padded;
        for (int k = begin; k < end; k += C::inputs) {
            vi v[HALVES][C::vectors];
            for (int r = 0; r < HALVES; ++r)
                for (int i = 0; i < C::vectors; ++i, w += 64) {
                    v[r][i] = i_load(w);
                    __builtin_prefetch(w + FAR);
                }
            unroll<C::fields>([&]<int F>() INLINE {
                vi code[HALVES];
                for (int r = 0; r < HALVES; ++r) code[r] = S::template code<F>(v[r]);
                for (int t = 0; t < T; ++t) {
                    const int32_t x = load4(A.q + (m + t) * A.ld + k + 4 * F);
                    for (int r = 0; r < HALVES; ++r) S::template add<F>(sums[r][t], code[r], x);
                }
            });
        }
        __builtin_prefetch(scales + FAR / 8);
        for (int r = 0; r < HALVES; ++r) {
            const vf scale = load_scale(scales + r * 16 * scale_size, scale_size);
            const vf zero = zeros ? f_load_u8(zeros + r * 16) : f_set(L.zero);
            for (int t = 0; t < T; ++t) {
                const long g = (long)(m + t) * A.groups + a;
                y[r][t] = take_group(y[r][t], S::total(sums[r][t]), S::top, scale, zero,
                                     A.scale[g], A.sum[g]);
            }
        }
        if (++shared == per_group) {  // the next weight group's
            shared = 0;
            scales += ROWS * scale_size;
            zeros += zeros ? ROWS : 0;
        }
    }
    for (int r = 0; r < HALVES; ++r)
        for (int t = 0; t < T; ++t) put(L, o, block * ROWS + r * 16, m + t, y[r][t]);
}

template <int B, int T>
void stream(const qx_linear& L, const qx_acts& A, int first, int last, int m, const qx_out& o) {
    for (int block = first; block < last; ++block) stream_block<B, T>(L, A, block, m, o);
}

// ---------------------------------------------------------------- int8 activations, many tokens

static const int TOKENS = 128;         // for which a group is unpacked once
static const int LARGEST_GROUP = 128;  // of activations

// Codes of one activation group, one a byte: [inputs / 4][HALVES][64].
template <int B>
SI void unpack_group(const uint8_t* w, int inputs, uint8_t* out) {
    using C = Chunk<B>;
    for (int k = 0; k < inputs; k += C::inputs, out += C::inputs / 4 * HALVES * 64) {
        for (int r = 0; r < HALVES; ++r) {
            vi v[C::vectors];
            for (int i = 0; i < C::vectors; ++i, w += 64) {
                v[i] = i_load(w);
                __builtin_prefetch(w + FAR);
            }
            unroll<C::fields>([&]<int F>() INLINE {
                i_store(out + (F * HALVES + r) * 64, field<B, F>(v));
            });
        }
    }
}

SI vi dot_code(vi acc, vi w, int32_t x, bool wide) {
    if (kInPlace || !wide) return i_dot4(acc, w, x);
    acc = i_dot4(acc, i_and_bytes(w, 15), x);  // 8-bit codes where pairs would not fit 16 bits
    const vi high = i_dot4(i_zero(), i_and_bytes(i_shr<4>(w), 15), x);
    return i_add(acc, i_shl<4>(high));
}

template <int B, int T>
SI void tile_group(const uint8_t* codes, int inputs, const qx_acts& A, int a, int begin, int m,
                   const vf* scale, const vf* zero, float* y) {
    vi acc[HALVES][T];
    for (int r = 0; r < HALVES; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = i_zero();
    const int8_t* x[T];
    for (int t = 0; t < T; ++t) x[t] = A.q + (m + t) * A.ld + begin;
    for (int k = 0; k < inputs; k += 4, codes += HALVES * 64) {
        vi w[HALVES];
        for (int r = 0; r < HALVES; ++r) w[r] = i_load(codes + r * 64);
        for (int t = 0; t < T; ++t) {
            const int32_t four = load4(x[t] + k);
            for (int r = 0; r < HALVES; ++r) acc[r][t] = dot_code(acc[r][t], w[r], four, B == 8);
        }
    }
    for (int t = 0; t < T; ++t) {
        const long g = (long)(m + t) * A.groups + a;
        for (int r = 0; r < HALVES; ++r) {
            float* at = y + t * ROWS + r * 16;
            f_store(at, take_group(f_load(at), acc[r][t], 0, scale[r], zero[r], A.scale[g],
                                   A.sum[g]));
        }
    }
}

// A block of outputs for up to TOKENS tokens: codes are unpacked once for all of them.
template <int B>
void tile_block(const qx_linear& L, const qx_acts& A, int block, int m0, int m1, const qx_out& o) {
    alignas(64) uint8_t codes[LARGEST_GROUP * ROWS];
    alignas(64) float y[TOKENS * ROWS];
    const int padded = round_up(L.k, 32), groups = round_up(padded, L.group) / L.group;
    const int per_group = L.group / L.act_group, count = m1 - m0;
    const uint8_t* w = (const uint8_t*)L.weight + (long)block * padded * ROWS / 8 * B;
    memset(y, 0, sizeof(float) * count * ROWS);
    for (int a = 0; a < A.groups; ++a) {
        const int begin = a * L.act_group;
        const int inputs = (begin + L.act_group < padded ? L.act_group : padded - begin);
        unpack_group<B>(w + (long)begin * ROWS / 8 * B, inputs, codes);
        const long at = ((long)block * groups + a / per_group) * ROWS;
        vf scale[HALVES], zero[HALVES];
        for (int r = 0; r < HALVES; ++r) {
            scale[r] = load_scale(L, at + r * 16);
            zero[r] = load_zero(L, at + r * 16);
        }
        int t = 0;
        for (; t + 8 <= count; t += 8)
            tile_group<B, 8>(codes, inputs, A, a, begin, m0 + t, scale, zero, y + t * ROWS);
        for (; t + 4 <= count; t += 4)
            tile_group<B, 4>(codes, inputs, A, a, begin, m0 + t, scale, zero, y + t * ROWS);
        for (; t < count; ++t)
            tile_group<B, 1>(codes, inputs, A, a, begin, m0 + t, scale, zero, y + t * ROWS);
    }
    for (int t = 0; t < count; ++t)
        for (int r = 0; r < HALVES; ++r)
            put(L, o, block * ROWS + r * 16, m0 + t, f_load(y + t * ROWS + r * 16));
}

template <int B>
void matmul_bits(const qx_linear& L, const qx_acts& A, int first, int last, const qx_out& o) {
    switch (A.m) {
        case 1: return stream<B, 1>(L, A, first, last, 0, o);
        case 2: return stream<B, 2>(L, A, first, last, 0, o);
        case 3: return stream<B, 3>(L, A, first, last, 0, o);
        case 4: return stream<B, 4>(L, A, first, last, 0, o);
    }
    for (int m = 0; m < A.m; m += TOKENS) {
        const int end = m + TOKENS < A.m ? m + TOKENS : A.m;
        for (int block = first; block < last; ++block) tile_block<B>(L, A, block, m, end, o);
    }
}

void matmul(const qx_linear* L, const qx_acts* A, int first, int last, const qx_out* o) {
    switch (L->bits) {
        case 1: return matmul_bits<1>(*L, *A, first, last, *o);
        case 2: return matmul_bits<2>(*L, *A, first, last, *o);
        case 3: return matmul_bits<3>(*L, *A, first, last, *o);
        case 4: return matmul_bits<4>(*L, *A, first, last, *o);
        default: return matmul_bits<8>(*L, *A, first, last, *o);
    }
}

// x = scale * q, q within -127 .. 127. What is no number makes the scale none either.
void quantize(const float* x, int k, int group, int8_t* q, float* scale, float* sum) {
    const int padded = round_up(k, 32);
    for (int begin = 0, g = 0; begin < padded; begin += group, ++g) {
        const int end = begin + group < padded ? begin + group : padded;
        alignas(64) float tail[LARGEST_GROUP];
        const float* from = x + begin;
        if (end > k) {
            memset(tail, 0, sizeof tail);
            if (k > begin) memcpy(tail, from, sizeof(float) * (k - begin));
            from = tail;
        }
        vf largest = f_zero(), poison = f_zero();
        for (int i = 0; i < end - begin; i += 16) {
            const vf v = f_load(from + i);
            largest = f_max(largest, f_abs(v));
            poison = f_fma(v, f_zero(), poison);
        }
        const float most = f_max_all(largest);
        const vf inverse = f_set(most > 1e-30f ? 127.0f / most : 0.0f);
        vi total = i_zero();
        for (int i = 0; i < end - begin; i += 16) {
            const vi v = f_round(f_mul(f_load(from + i), inverse));
            i_store_i8(q + begin + i, v);
            total = i_add(total, v);
        }
        scale[g] = most / 127.0f + f_sum_all(poison);
        sum[g] = (float)i_sum_all(total);
    }
}

// ---------------------------------------------------------------- float32 activations

template <int B, int T>
void exact_blocks(const qx_linear& L, const float* x, long ldx, int m, int first, int last,
                  const qx_out& o) {
    using C = Chunk<B>;
    const int padded = round_up(L.k, 32), groups = round_up(padded, L.group) / L.group;
    for (int half = first * HALVES; half < last * HALVES; ++half) {
        const long block = half / HALVES, row = half % HALVES * 16;
        const uint8_t* w = (const uint8_t*)L.weight + block * padded * ROWS / 8 * B +
                           row / 16 * C::vectors * 64;
        vf y[T];
        for (int t = 0; t < T; ++t) y[t] = f_zero();
        for (int g = 0; g < groups; ++g) {
            const long at = (block * groups + g) * ROWS + row;
            const vf scale = load_scale(L, at), zero = load_zero(L, at);
            vf acc[T];
            for (int t = 0; t < T; ++t) acc[t] = f_zero();
            const int end = (g + 1) * L.group < padded ? (g + 1) * L.group : padded;
            for (int k = g * L.group; k < end; k += C::inputs, w += HALVES * C::vectors * 64) {
                vi v[C::vectors];
                for (int i = 0; i < C::vectors; ++i) v[i] = i_load(w + 64 * i);
                unroll<C::fields>([&]<int F>() INLINE {
                    const vi codes = field<B, F>(v);
                    unroll<4>([&]<int J>() INLINE {
                        const vf value = f_sub(f_from_i(i_low_byte(i_shr<8 * J>(codes))), zero);
                        for (int t = 0; t < T; ++t)
                            acc[t] = f_fma(value, f_set(x[(m + t) * ldx + k + 4 * F + J]), acc[t]);
                    });
                });
            }
            for (int t = 0; t < T; ++t) y[t] = f_fma(acc[t], scale, y[t]);
        }
        for (int t = 0; t < T; ++t) put(L, o, (int)(block * ROWS + row), m + t, y[t]);
    }
}

template <int B>
void exact_bits(const qx_linear& L, const float* x, long ldx, int m, int first, int last,
                const qx_out& o) {
    int t = 0;
    for (; t + 4 <= m; t += 4) exact_blocks<B, 4>(L, x, ldx, t, first, last, o);
    for (; t < m; ++t) exact_blocks<B, 1>(L, x, ldx, t, first, last, o);
}

void matmul_exact(const qx_linear* L, const float* x, long ldx, int m, int first, int last,
                  const qx_out* o) {
    switch (L->bits) {
        case 1: return exact_bits<1>(*L, x, ldx, m, first, last, *o);
        case 2: return exact_bits<2>(*L, x, ldx, m, first, last, *o);
        case 3: return exact_bits<3>(*L, x, ldx, m, first, last, *o);
        case 4: return exact_bits<4>(*L, x, ldx, m, first, last, *o);
        default: return exact_bits<8>(*L, x, ldx, m, first, last, *o);
    }
}

// ---------------------------------------------------------------- dense rows

template <int D>
SI vf load_row(const void* row, long at) {
    if constexpr (D == QX_F32) return f_load((const float*)row + at);
    else if constexpr (D == QX_BF16) return f_load_bf16((const uint16_t*)row + at);
    else return f_load_f16((const uint16_t*)row + at);
}

// The last inputs of a row, with zeros after them.
template <int D>
SI vf load_tail(const void* row, long at, int count) {
    constexpr int size = D == QX_F32 ? 4 : 2;
    alignas(64) uint8_t lanes[64] = {0};
    memcpy(lanes, (const uint8_t*)row + at * size, (size_t)count * size);
    return load_row<D>(lanes, 0);
}

template <int D, int R, int T>
SI void dense_rows(const qx_linear& L, const float* x, int row, int m, const qx_out& o) {
    constexpr int size = D == QX_F32 ? 4 : 2;
    const uint8_t* w = (const uint8_t*)L.weight + (long)row * L.k * size;
    const long stride = (long)L.k * size;
    vf acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = f_zero();
    const long ahead = R * stride < 4 * FAR ? R * stride : FAR;
    int k = 0;
    for (; k + 16 <= L.k; k += 16) {
        vf v[T];
        for (int t = 0; t < T; ++t) v[t] = f_load(x + (long)(m + t) * L.k + k);
        for (int r = 0; r < R; ++r) {
            if (T == 1) __builtin_prefetch(w + r * stride + (long)k * size + ahead);
            const vf values = load_row<D>(w + r * stride, k);
            for (int t = 0; t < T; ++t) acc[r][t] = f_fma(values, v[t], acc[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            if (k < L.k)
                acc[r][t] = f_fma(load_tail<D>(w + r * stride, k, L.k - k),
                                  load_tail<QX_F32>(x + (long)(m + t) * L.k, k, L.k - k), acc[r][t]);
            const float y = f_sum_all(acc[r][t]) + (L.bias ? L.bias[row + r] : 0.0f);
            float* out = o.out + (m + t) * o.ld + row + r;
            *out = o.add ? *out + o.alpha * y : y;
        }
    }
}

template <int D>
void dense_dtype(const qx_linear& L, const float* x, int m, int first, int last, const qx_out& o) {
    for (int row = first; row < last;) {
        const bool four = row + 4 <= last;
        int t = 0;
        for (; four && t + 4 <= m; t += 4) dense_rows<D, 4, 4>(L, x, row, t, o);
        for (; t < m; ++t) {
            for (int r = 0; r < (four ? 4 : 1); ++r) dense_rows<D, 1, 1>(L, x, row + r, t, o);
        }
        row += four ? 4 : 1;
    }
}

void dense(const qx_linear* L, const float* x, int m, int first, int last, const qx_out* o) {
    switch (L->dtype) {
        case QX_F32: return dense_dtype<QX_F32>(*L, x, m, first, last, *o);
        case QX_BF16: return dense_dtype<QX_BF16>(*L, x, m, first, last, *o);
        default: return dense_dtype<QX_F16>(*L, x, m, first, last, *o);
    }
}

// ---------------------------------------------------------------- between the matmuls

template <int D>
void embed_dtype(const void* table, int row, int k, float scale, float* out) {
    const uint8_t* from = (const uint8_t*)table + (long)row * k * (D == QX_F32 ? 4 : 2);
    int i = 0;
    for (; i + 16 <= k; i += 16) f_store(out + i, f_mul(load_row<D>(from, i), f_set(scale)));
    if (i < k) {
        float lanes[16];
        f_store(lanes, f_mul(load_tail<D>(from, i, k - i), f_set(scale)));
        memcpy(out + i, lanes, sizeof(float) * (k - i));
    }
}

void embed(const void* table, int dtype, int row, int k, float scale, float* out) {
    switch (dtype) {
        case QX_F32: return embed_dtype<QX_F32>(table, row, k, scale, out);
        case QX_BF16: return embed_dtype<QX_BF16>(table, row, k, scale, out);
        default: return embed_dtype<QX_F16>(table, row, k, scale, out);
    }
}

SI float sum_of_squares(const float* x, int k) {
    vf acc = f_zero();
    int i = 0;
    for (; i + 16 <= k; i += 16) acc = f_fma(f_load(x + i), f_load(x + i), acc);
    float sum = f_sum_all(acc);
    for (; i < k; ++i) sum += x[i] * x[i];
    return sum;
}

void norm(const float* x, const float* weight, float eps, int k, float* out) {
    const float scale = 1.0f / sqrtf(sum_of_squares(x, k) / (float)k + eps);
    const vf s = f_set(scale);
    int i = 0;
    for (; i + 16 <= k; i += 16)
        f_store(out + i, f_mul(f_load(weight + i), f_mul(f_load(x + i), s)));
    for (; i < k; ++i) out[i] = weight[i] * (x[i] * scale);
}

// exp(x): 2**n * exp(r) with |r| <= ln(2)/2 by a polynomial of degree 6 (relative error 2e-7).
// Zero from -88 down; what is no number stays none.
SI vf f_exp(vf x) {
    x = f_max(f_set(-88.1f), f_min(f_set(88.3f), x));
    const vi n = f_round(f_mul(x, f_set(1.44269504f)));
    const vf whole = f_from_i(n);
    vf r = f_fma(whole, f_set(-0.693359375f), x);
    r = f_fma(whole, f_set(2.12194440e-4f), r);
    vf p = f_set(1.3888889e-3f);
    p = f_fma(p, r, f_set(8.3333333e-3f));
    p = f_fma(p, r, f_set(4.1666667e-2f));
    p = f_fma(p, r, f_set(1.6666667e-1f));
    p = f_fma(p, r, f_set(0.5f));
    p = f_fma(p, r, f_set(1.0f));
    p = f_fma(p, r, f_set(1.0f));
    return f_mul(p, f_power(n));
}

SI vf silu(vf g, vf u) {
    const vf e = f_exp(f_sub(f_zero(), g));
    return f_mul(f_div(g, f_add(f_set(1.0f), e)), u);
}

void silu_mul(const float* gate_up, int inter, float* out) {
    const float* up = gate_up + inter;
    int i = 0;
    for (; i + 16 <= inter; i += 16) f_store(out + i, silu(f_load(gate_up + i), f_load(up + i)));
    if (i < inter) {
        float lanes[16];
        f_store(lanes, silu(load_tail<QX_F32>(gate_up, i, inter - i),
                            load_tail<QX_F32>(up, i, inter - i)));
        memcpy(out + i, lanes, sizeof(float) * (inter - i));
    }
}

// Rotates the first rotary_dim of a head by halves (Su et al., RoFormer; NeoX order).
SI void rotate(float* x, int dim, const float* cos, const float* sin) {
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

SI uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Puts x [dim] into a cache row whose elements stand `step` apart.
SI void store_row(int dtype, void* row, int step, const float* x, int dim, float* scale) {
    if (dtype == QX_F32) {
        for (int i = 0; i < dim; ++i) ((float*)row)[i * step] = x[i];
    } else if (dtype == QX_BF16) {
        for (int i = 0; i < dim; ++i) ((uint16_t*)row)[i * step] = bf16_of(x[i]);
    } else if (dtype == QX_F16) {
        for (int i = 0; i < dim; i += 16) {
            const int count = dim - i < 16 ? dim - i : 16;
            uint16_t lanes[16];
            f_store_f16(lanes, load_tail<QX_F32>(x, i, count));
            for (int j = 0; j < count; ++j) ((uint16_t*)row)[(i + j) * step] = lanes[j];
        }
    } else {
        float most = 0.0f;
        for (int i = 0; i < dim; ++i) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        *scale = most / 127.0f;
        for (int i = 0; i < dim; ++i) ((int8_t*)row)[i * step] = (int8_t)lrintf(x[i] * inverse);
    }
}

SI int cache_size(int dtype) { return dtype == QX_F32 ? 4 : dtype == QX_I8 ? 1 : 2; }

void rotate_store(const qx_model* M, const qx_layer* L, float* qkv, int slot, int position,
                  const float* cos, const float* sin) {
    const int dim = M->head_dim, wide = round_up(dim, 16), size = cache_size(M->cache_dtype);
    const bool scaled = M->cache_dtype == QX_I8;
    float* k = qkv + (long)M->heads * dim;
    const float* v = k + (long)M->kv_heads * dim;
    for (int h = 0; h < M->heads + M->kv_heads; ++h) {
        float* x = qkv + (long)h * dim;
        const float* weight = h < M->heads ? L->q_norm : L->k_norm;
        if (weight) norm(x, weight, M->eps, dim, x);
        if (L->rope) rotate(x, M->rotary_dim, cos, sin);
    }
    for (int h = 0; h < M->kv_heads; ++h) {
        const long line = (long)slot * M->kv_heads + h, at = line * M->context + position;
        uint8_t* key = (uint8_t*)L->keys +
                       ((line * M->context + position / 16 * 16) * dim + position % 16) * size;
        uint8_t* value = (uint8_t*)L->values + at * wide * size;
        store_row(M->cache_dtype, key, 16, k + h * dim, dim, scaled ? L->key_scales + at : nullptr);
        store_row(M->cache_dtype, value, 1, v + h * dim, dim,
                  scaled ? L->value_scales + at : nullptr);
    }
}

// ---------------------------------------------------------------- attention

static const int KEYS = 128;  // keys of one softmax block; blocks begin at multiples of it

template <int D>
SI vf load_cache(const void* p, long at) {
    if constexpr (D == QX_I8) return f_load_i8((const int8_t*)p + at);
    else return load_row<D>(p, at);
}

// Scores of N query rows against 16 keys.
template <int D, int N>
SI void score16(const void* keys, long at, const float* const* q, int dim, vf* out) {
    for (int i = 0; i < N; ++i) out[i] = f_zero();
    for (int d = 0; d < dim; ++d) {
        const vf key = load_cache<D>(keys, at + d * 16);
        for (int i = 0; i < N; ++i) out[i] = f_fma(key, f_set(q[i][d]), out[i]);
    }
}

// o[N][W lanes of 16] += p[N] @ values
template <int D, int N, int W>
SI void mix(const void* values, long at, int wide, int count, const float* p, float* o) {
    vf acc[N][W];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < W; ++j) acc[i][j] = f_load(o + i * wide + 16 * j);
    for (int key = 0; key < count; ++key) {
        vf v[W];
        for (int j = 0; j < W; ++j) v[j] = load_cache<D>(values, at + (long)key * wide + 16 * j);
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < W; ++j) acc[i][j] = f_fma(v[j], f_set(p[i * KEYS + key]), acc[i][j]);
    }
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < W; ++j) f_store(o + i * wide + 16 * j, acc[i][j]);
}

template <int D, int N>
SI void mix_wide(const void* values, long at, int wide, int count, const float* p, float* o) {
    int j = 0;
    for (; j + 64 <= wide; j += 64) mix<D, N, 4>(values, at + j, wide, count, p, o + j);
    for (; j < wide; j += 16) mix<D, N, 1>(values, at + j, wide, count, p, o + j);
}

// One row's softmax over a block, in its place; returns what the earlier sums are to be scaled by.
SI float soften(float* s, int count, float* top, float* sum) {
    const int lanes = round_up(count, 16);
    vf most = f_set(*top);
    for (int i = 0; i < lanes; i += 16) most = f_max(most, f_load(s + i));
    const float now = f_max_all(most);
    if (now == -INFINITY) {  // no key of this block is seen
        memset(s, 0, sizeof(float) * lanes);
        return 1.0f;
    }
    vf total = f_zero();
    for (int i = 0; i < lanes; i += 16) {
        const vf p = f_exp(f_sub(f_load(s + i), f_set(now)));
        f_store(s + i, p);
        total = f_add(total, p);
    }
    const float scale = *top == -INFINITY ? 0.0f : expf(*top - now);
    *sum = *sum * scale + f_sum_all(total);
    *top = now;
    return scale;
}

template <int D>
void attend_dtype(const qx_model& M, const qx_layer& L, const qx_tile& tile, int kv_head,
                  const float* qkv, float* out) {
    const int dim = M.head_dim, wide = round_up(dim, 16), share = M.heads / M.kv_heads;
    const long width = (long)(M.heads + 2 * M.kv_heads) * dim;
    const int rows = tile.count * share;  // token by token, its heads together
    alignas(64) float s[QX_ROWS * KEYS];
    alignas(64) float o[QX_ROWS * 256];
    float top[QX_ROWS], sum[QX_ROWS];
    const float* q[QX_ROWS];
    for (int i = 0; i < rows; ++i) {
        const long token = tile.first + i / share, head = kv_head * share + i % share;
        q[i] = qkv + token * width + head * dim;
        top[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    memset(o, 0, sizeof(float) * rows * wide);
    const long line = ((long)tile.slot * M.kv_heads + kv_head) * M.context;
    const int seen = tile.position + tile.count;  // keys that the last token sees
    const int least = L.window && tile.position >= L.window ? tile.position - L.window + 1 : 0;
    for (int begin = least / KEYS * KEYS; begin < seen; begin += KEYS) {
        const int count = seen - begin < KEYS ? seen - begin : KEYS;
        for (int k = 0; k < count; k += 16) {
            const long at = (line + begin + k) * dim;
            vf scale = f_set(M.attention_scale);
            if (D == QX_I8) scale = f_mul(scale, f_load(L.key_scales + line + begin + k));
            for (int i = 0; i < rows;) {
                const int n = rows - i < 4 ? rows - i : 4;
                vf scores[4];
                if (n == 4) score16<D, 4>(L.keys, at, q + i, dim, scores);
                else if (n == 3) score16<D, 3>(L.keys, at, q + i, dim, scores);
                else if (n == 2) score16<D, 2>(L.keys, at, q + i, dim, scores);
                else score16<D, 1>(L.keys, at, q + i, dim, scores);
                for (int j = 0; j < n; ++j, ++i) {
                    const int sees = tile.position + i / share + 1 - begin - k;
                    f_store(s + i * KEYS + k, f_first(f_mul(scores[j], scale), sees));
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            const int position = tile.position + i / share;
            const int first = L.window ? position - L.window + 1 - begin : 0;
            for (int k = 0; k < first && k < count; ++k) s[i * KEYS + k] = -INFINITY;
            const float scale = soften(s + i * KEYS, count, top + i, sum + i);
            for (int j = 0; j < wide; j += 16)
                f_store(o + i * wide + j, f_mul(f_load(o + i * wide + j), f_set(scale)));
            if (D == QX_I8)
                for (int k = 0; k < count; ++k) s[i * KEYS + k] *= L.value_scales[line + begin + k];
        }
        const long at = (line + begin) * wide;
        int i = 0;
        for (; i + 4 <= rows; i += 4)
            mix_wide<D, 4>(L.values, at, wide, count, s + i * KEYS, o + i * wide);
        if (rows - i == 3) mix_wide<D, 3>(L.values, at, wide, count, s + i * KEYS, o + i * wide);
        if (rows - i == 2) mix_wide<D, 2>(L.values, at, wide, count, s + i * KEYS, o + i * wide);
        if (rows - i == 1) mix_wide<D, 1>(L.values, at, wide, count, s + i * KEYS, o + i * wide);
    }
    for (int i = 0; i < rows; ++i) {
        const long token = tile.first + i / share, head = kv_head * share + i % share;
        float* to = out + (token * M.heads + head) * dim;
        for (int d = 0; d < dim; ++d) to[d] = o[i * wide + d] / sum[i];
    }
}

void attend(const qx_model* M, const qx_layer* L, const qx_tile* tile, int kv_head,
            const float* qkv, float* out) {
    switch (M->cache_dtype) {
        case QX_F32: return attend_dtype<QX_F32>(*M, *L, *tile, kv_head, qkv, out);
        case QX_BF16: return attend_dtype<QX_BF16>(*M, *L, *tile, kv_head, qkv, out);
        case QX_F16: return attend_dtype<QX_F16>(*M, *L, *tile, kv_head, qkv, out);
        default: return attend_dtype<QX_I8>(*M, *L, *tile, kv_head, qkv, out);
    }
}

}  // namespace

#define QX_TABLE(name)                                                                            \
    {                                                                                             \
        name, quantize, matmul, matmul_exact, dense, embed, norm, silu_mul, rotate_store, attend  \
    }
