// Packed weights as kernels read them: chunks, scales, fragments (runtime/kernels/cuda_layout.py).
#pragma once

#include "ptx.cuh"

namespace qx {

// Loads of 16 bytes that make a chunk of a tile, and its inputs.
QX_FN constexpr int chunk_loads(int bits) { return bits == 3 ? 3 : bits == 4 ? 2 : 1; }
QX_FN constexpr int chunk_inputs(int bits) { return chunk_loads(bits) * 256 / bits; }

struct Half2Scale {
    u32 bits;
    QX_FN float low() const { return from_half((unsigned short)bits); }
    QX_FN float high() const { return from_half((unsigned short)(bits >> 16)); }
};

struct Bfloat2Scale {
    u32 bits;
    QX_FN float low() const { return from_bits(bits << 16); }
    QX_FN float high() const { return from_bits(bits & 0xffff0000u); }
};

struct Float2Scale {
    float first, second;
    QX_FN float low() const { return first; }
    QX_FN float high() const { return second; }
};

template <class F>
QX_FN unsigned short rounded(float value) {
    if constexpr (F::mantissa == 10)
        return to_half(value);
    else
        return to_bfloat16(value);
}

template <class F>
QX_FN float widened(u32 bits) {
    if constexpr (F::mantissa == 10)
        return from_half((unsigned short)bits);
    else
        return from_bits(bits << 16);
}

template <int VALUE>
struct Number {
    static constexpr int value = VALUE;
};

template <int COUNT, int AT = 0, class Body>
QX_FN void repeat(const Body& body) {
    if constexpr (AT < COUNT) {
        body(Number<AT>{});
        repeat<COUNT, AT + 1>(body);
    }
}

// Fragment AT (16 inputs) of a step (64), whose words of this lane are at `words`.
template <class F, int BITS, int TWICE_ZERO, int AT>
QX_FN void decode_fragment(const u32* words, u32* a) {
    constexpr int fragments = Words<BITS>::pairs / 4;  // that words decoded together hold
    const u32* these = words + AT / fragments * Words<BITS>::count;
    repeat<4>([&](auto r) {
        constexpr int pair = AT % fragments * 4 + decltype(r)::value;
        a[decltype(r)::value] = decode_pair<F, BITS, TWICE_ZERO, pair>(these);
    });
}

}  // namespace qx
