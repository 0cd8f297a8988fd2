// How packed codes become pairs of half-precision numbers on a GPU.
//
// A thread has the codes of fragments of mma.m16n8k16's A operand, four registers of two numbers each
// (prepack in runtime/kernels/cuda_layout.py). Words of 32 bits hold them in two halves of 16, for the
// lower and the upper number of a register:
//
//   1, 2, 4 bits: pair p of a word stands at bit p * bits of both halves.
//   3 bits: three words hold 16 pairs. Pair p < 15 stands at bit p % 5 * 3 of word p / 5; the three bits
//   of pair 15 are the topmost of each half of words 0, 1, 2.
//
// A code is or-ed into the mantissa of 2**mantissa where it stands, s bits up: the number is then
// 2**mantissa + code * 2**s exactly, and one fused multiply-add makes code - zero of it (Kim et al., "Who
// says elephants can't run", for s = 0). For that `2**(mantissa - s) + zero` has to be a number of the
// format: half-integer zero points need s >= 1.
//
// Compiled for the host too, where tests go through all codes in all places.
#pragma once

#if defined(__CUDA_ARCH__)
#define QX_FN __device__ __forceinline__
#define QX_UNROLL _Pragma("unroll")
#else
#define QX_FN inline
#define QX_UNROLL
#endif

typedef unsigned int u32;

namespace qx {

// Bits of `times` * 2**-16 in a format with 5 or 8 bits of exponent; all ones if it is no number there.
QX_FN constexpr u32 number_bits(long times, int mantissa, int bias) {
    u32 sign = 0;
    if (times < 0) {
        sign = 0x8000;
        times = -times;
    }
    if (times == 0) return 0;
    int exponent = bias - 16 + mantissa;
    while (times >= 2L << mantissa) {
        if (times & 1) return 0xffffffffu;  // is no number of this format
        times >>= 1;
        ++exponent;
    }
    while (times < 1L << mantissa) {
        times <<= 1;
        --exponent;
    }
    return sign | (u32)exponent << mantissa | ((u32)times & ((1u << mantissa) - 1));
}

#if !defined(__CUDA_ARCH__)
// The same arithmetic on the host, one number at a time, in float: every value here fits one.
inline float number(u32 bits, int mantissa, int bias) {
    const int exponent = (int)(bits >> mantissa & ((1u << (15 - mantissa)) - 1));
    if (exponent == 0) return 0.0f;
    const float whole = (float)((bits & ((1u << mantissa) - 1)) | 1u << mantissa);
    const float value = __builtin_ldexpf(whole, exponent - bias - mantissa);
    return bits & 0x8000 ? -value : value;
}

inline u32 fma_number(u32 a, u32 b, u32 c, int mantissa, int bias) {
    const float sum = number(a, mantissa, bias) * number(b, mantissa, bias) + number(c, mantissa, bias);
    return number_bits((long)(sum * 65536.0f), mantissa, bias);
}

inline u32 fma_pair(u32 a, u32 b, u32 c, int mantissa, int bias) {
    const u32 low = fma_number(a & 0xffff, b & 0xffff, c & 0xffff, mantissa, bias);
    return low | fma_number(a >> 16, b >> 16, c >> 16, mantissa, bias) << 16;
}
#endif

template <int MANTISSA, int BIAS>
struct Format {
    static constexpr int mantissa = MANTISSA, bias = BIAS;
    // a * b + c of two numbers each, rounded once.
    static QX_FN u32 fma(u32 a, u32 b, u32 c) {
#if defined(__CUDA_ARCH__)
        u32 d;
        if constexpr (MANTISSA == 10)
            asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        else
            asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
#else
        return fma_pair(a, b, c, mantissa, bias);
#endif
    }
};

using Half = Format<10, 15>;
using Bfloat16 = Format<7, 127>;

// Two equal numbers, `times` * 2**-16 each.
template <class F>
QX_FN constexpr u32 both(long times) {
    return number_bits(times, F::mantissa, F::bias) * 0x10001u;
}

QX_FN u32 and_or(u32 a, u32 mask, u32 c) {
#if defined(__CUDA_ARCH__)
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
    return d;
#else
    return (a & mask) | c;
#endif
}

// Where a field at bit `bit` of its half goes: words are shifted down by `shift`, up where it is
// negative, as rarely as the mantissa allows.
struct Place {
    int shift, s;
};

template <class F, int BITS, bool HALF_ZERO>
QX_FN constexpr Place place(int bit) {
    const int least = HALF_ZERO ? 1 : 0, most = F::mantissa - BITS;
    int shift = -least;
    for (int b = 0; b <= bit; b += BITS)
        if (b - shift > most) shift = b - least;
    return {shift, bit - shift};
}

// code - zero of two codes in the mantissa of `word`, s bits up; twice_zero is odd for half-integers.
template <class F, int S, int TWICE_ZERO>
QX_FN u32 settle(u32 word) {
    constexpr long one = 65536;
    constexpr u32 scale = both<F>(one >> S);
    constexpr u32 offset = both<F>(-((one << F::mantissa >> S) + one * TWICE_ZERO / 2));
    static_assert(offset >> 16 != 0xffff, "2**(mantissa - s) + zero is no number of the format");
    return F::fma(word, scale, offset);
}

template <class F>
constexpr u32 magic = both<F>(65536L << F::mantissa);

template <int BITS>
struct Words {
    static constexpr int count = BITS == 3 ? 3 : 1;       // that are decoded together
    static constexpr int pairs = BITS == 3 ? 16 : 16 / BITS;
    static constexpr int fields = BITS == 3 ? 5 : pairs;  // that lie in one word
};

// Pair P of Words<BITS>::count words as `code - zero`.
template <class F, int BITS, int TWICE_ZERO, int P>
QX_FN u32 decode_pair(const u32* words) {
    using W = Words<BITS>;
    if constexpr (BITS == 3 && P == 15) {
        u32 x = and_or(words[0] >> 15, 0x00010001u, magic<F>);
        x = and_or(words[1] >> 14, 0x00020002u, x);
        x = and_or(words[2] >> 13, 0x00040004u, x);
        return settle<F, 0, TWICE_ZERO>(x);
    } else {
        constexpr Place at = place<F, BITS, TWICE_ZERO % 2 != 0>(P % W::fields * BITS);
        constexpr u32 mask = (((1u << BITS) - 1) << at.s) * 0x10001u;
        const u32 word = words[P / W::fields];
        const u32 moved = at.shift < 0 ? word << -at.shift : word >> (at.shift < 0 ? 0 : at.shift);
        return settle<F, at.s, TWICE_ZERO>(and_or(moved, mask, magic<F>));
    }
}

template <class F, int BITS, int TWICE_ZERO, int P = 0>
QX_FN void decode(const u32* words, u32* pairs) {
    if constexpr (P < Words<BITS>::pairs) {
        pairs[P] = decode_pair<F, BITS, TWICE_ZERO, P>(words);
        decode<F, BITS, TWICE_ZERO, P + 1>(words, pairs);
    }
}

}  // namespace qx
