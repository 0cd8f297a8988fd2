// Sixteen lanes in an array: any machine, at the compiler's mercy.
#pragma once

struct vf {
    float v[16];
};
struct vi {
    int32_t v[16];
};

static constexpr bool kInPlace = false;

#define LANES for (int i = 0; i < 16; ++i)

SI float float_from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, low = h & 0x7fff;
    uint32_t bits;
    if (low >= 0x7c00) {
        bits = sign | 0x7f800000 | (low & 0x3ff) << 13;
    } else if (low >= 0x400) {
        bits = sign | ((low << 13) + 0x38000000);
    } else {
        const float small = (float)low * 5.9604644775390625e-8f;  // 2**-24
        memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
SI uint16_t f16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal: the addition rounds
        float tiny;
        memcpy(&tiny, &bits, 4);
        tiny += 0.5f;
        memcpy(&bits, &tiny, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}

SI vf f_set(float x) { vf r; LANES r.v[i] = x; return r; }
SI vf f_zero() { return f_set(0.0f); }
SI vf f_load(const float* p) { vf r; memcpy(r.v, p, 64); return r; }
SI void f_store(float* p, vf x) { memcpy(p, x.v, 64); }
SI vf f_add(vf a, vf b) { LANES a.v[i] += b.v[i]; return a; }
SI vf f_sub(vf a, vf b) { LANES a.v[i] -= b.v[i]; return a; }
SI vf f_mul(vf a, vf b) { LANES a.v[i] *= b.v[i]; return a; }
SI vf f_div(vf a, vf b) { LANES a.v[i] /= b.v[i]; return a; }
SI vf f_fma(vf a, vf b, vf c) { LANES c.v[i] += a.v[i] * b.v[i]; return c; }
SI vf f_max(vf a, vf b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
SI vf f_min(vf a, vf b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
SI vf f_abs(vf a) { LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
SI vf f_from_i(vi a) { vf r; LANES r.v[i] = (float)a.v[i]; return r; }
SI vi f_round(vf a) {  // ties to even; what is too large, or no number, becomes the least int
    vi r;
    LANES r.v[i] = __builtin_fabsf(a.v[i]) < 2147483648.0f ? (int32_t)__builtin_rintf(a.v[i])
                                                           : (int32_t)0x80000000;
    return r;
}
SI vf f_load_f16(const uint16_t* p) { vf r; LANES r.v[i] = float_from_f16(p[i]); return r; }
SI vf f_load_bf16(const uint16_t* p) {
    vf r;
    LANES {
        const uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
SI vf f_load_u8(const uint8_t* p) { vf r; LANES r.v[i] = (float)p[i]; return r; }
SI vf f_load_i8(const int8_t* p) { vf r; LANES r.v[i] = (float)p[i]; return r; }
SI void f_store_f16(uint16_t* p, vf x) { LANES p[i] = f16_from_float(x.v[i]); }
SI float f_max_all(vf x) {
    float m = x.v[0];
    LANES m = x.v[i] > m ? x.v[i] : m;
    return m;
}
SI float f_sum_all(vf x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
    return x.v[0];
}
SI vf f_power(vi n) {  // 2**n
    vf r;
    LANES {
        const uint32_t bits = (uint32_t)(n.v[i] + 127) << 23;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
SI vf f_first(vf x, int count) {  // the first `count` lanes, and minus infinity
    LANES if (i >= count) x.v[i] = -__builtin_inff();
    return x;
}

SI vi i_zero() { vi r; LANES r.v[i] = 0; return r; }
SI vi i_load(const void* p) { vi r; memcpy(r.v, p, 64); return r; }
SI void i_store(void* p, vi x) { memcpy(p, x.v, 64); }
SI vi i_add(vi a, vi b) { LANES a.v[i] += b.v[i]; return a; }
SI vi i_or(vi a, vi b) { LANES a.v[i] |= b.v[i]; return a; }
SI vi i_and_bytes(vi a, int mask) {
    LANES a.v[i] &= (int32_t)(0x01010101u * (uint32_t)mask);
    return a;
}
SI vi i_low_byte(vi a) { LANES a.v[i] &= 255; return a; }
template <int N>
SI vi i_shl(vi a) { LANES a.v[i] = (int32_t)((uint32_t)a.v[i] << N); return a; }
template <int N>
SI vi i_shr(vi a) { LANES a.v[i] = (int32_t)((uint32_t)a.v[i] >> N); return a; }
SI void i_store_i8(int8_t* p, vi a) {
    LANES p[i] = (int8_t)(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}
SI vi i_dot4(vi acc, vi w, int32_t x) {
    int8_t four[4];
    uint8_t bytes[64];
    memcpy(four, &x, 4);
    memcpy(bytes, w.v, 64);
    LANES acc.v[i] += bytes[4 * i] * four[0] + bytes[4 * i + 1] * four[1] +
                      bytes[4 * i + 2] * four[2] + bytes[4 * i + 3] * four[3];
    return acc;
}
SI int32_t i_sum_all(vi a) {
    int32_t s = 0;
    LANES s += a.v[i];
    return s;
}
