// decode.cuh on the host: every code in every place, beside every neighbour in its half of a word.
#include "decode.cuh"

namespace {

constexpr u32 kNeighbours[] = {0x0000, 0xffff, 0x5a5a, 0x8001};

template <int BITS>
u32 code_of(const u32* words, int pair, int upper) {
    if (BITS == 3 && pair == 15) {
        u32 code = 0;
        for (int word = 0; word < 3; ++word) code |= (words[word] >> (15 + 16 * upper) & 1) << word;
        return code;
    }
    const int fields = qx::Words<BITS>::fields;
    return words[pair / fields] >> (16 * upper + pair % fields * BITS) & ((1u << BITS) - 1);
}

template <class F, int BITS, int TWICE_ZERO>
long wrong_pairs(const u32* words) {
    u32 pairs[16];
    qx::decode<F, BITS, TWICE_ZERO>(words, pairs);
    long wrong = 0;
    for (int p = 0; p < qx::Words<BITS>::pairs; ++p)
        for (int upper = 0; upper < 2; ++upper) {
            const float want = (float)code_of<BITS>(words, p, upper) - 0.5f * TWICE_ZERO;
            const u32 bits = pairs[p] >> (16 * upper) & 0xffff;
            wrong += qx::number(bits, F::mantissa, F::bias) != want;
        }
    return wrong;
}

template <class F, int BITS, int TWICE_ZERO>
long all_wrong() {
    long wrong = 0;
    for (int at = 0; at < qx::Words<BITS>::count; ++at)
        for (u32 half = 0; half < 65536; ++half)
            for (u32 other : kNeighbours) {
                u32 words[3] = {other << 16 | other, other << 16 | other, other << 16 | other};
                words[at] = other << 16 | half;
                wrong += wrong_pairs<F, BITS, TWICE_ZERO>(words);
                words[at] = half << 16 | other;
                wrong += wrong_pairs<F, BITS, TWICE_ZERO>(words);
            }
    return wrong;
}

template <class F, int BITS, int TWICE_ZERO>
void decode_all(const u32* words, int count, u32* pairs) {
    using W = qx::Words<BITS>;
    for (int i = 0; i < count; ++i)
        qx::decode<F, BITS, TWICE_ZERO>(words + i * W::count, pairs + i * W::pairs);
}

}  // namespace

// Every grid: bits and twice the zero point. 0 is what grids with a zero point per group begin from.
#define GRIDS(DO) \
    DO(1, 1) DO(2, 0) DO(2, 2) DO(2, 3) DO(2, 4) DO(3, 0) DO(3, 8) DO(4, 0) DO(4, 16)

// Numbers that are not `code - zero`; -1 for a grid that there is not.
extern "C" long exhaust(int bfloat16, int bits, int twice_zero) {
#define DO(BITS, ZERO)                                                  \
    if (bits == BITS && twice_zero == ZERO)                             \
        return bfloat16 ? all_wrong<qx::Bfloat16, BITS, ZERO>() : all_wrong<qx::Half, BITS, ZERO>();
    GRIDS(DO)
#undef DO
    return -1;
}

extern "C" int decode_words(int bfloat16, int bits, int twice_zero, const u32* words, int count,
                            u32* pairs) {
#define DO(BITS, ZERO)                                                            \
    if (bits == BITS && twice_zero == ZERO) {                                     \
        if (bfloat16) decode_all<qx::Bfloat16, BITS, ZERO>(words, count, pairs); \
        else decode_all<qx::Half, BITS, ZERO>(words, count, pairs);               \
        return 0;                                                                 \
    }
    GRIDS(DO)
#undef DO
    return -1;
}
