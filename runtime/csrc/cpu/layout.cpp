// Packed codes: blocks of 32 rows, each a sequence of chunks, each of two halves of 16 rows.
//
// A vector of 64 bytes has a lane of four bytes for each of 16 rows; byte j of a lane belongs to
// input 4f + j of the chunk, where a byte holds the codes of several fields f:
//
//   8 bits: one field.  4, 2, 1 bits: field f stands at bit f * bits.
//   3 bits: half a chunk is three vectors b0, b1, b2 and eight fields. Fields 0..5 stand at bits 0 and 3
//   of b0, b1, b2. Fields 6 and 7 have their upper two bits at 6..7 of b0 and b1, and their lowest
//   bit at bits 6 and 7 of b2: with that bit moved to 5, bits 5..7 are the code.
//
// Rows and inputs beyond the matrix have code 0; activations are zero there.
#include <string.h>

#include "qexport_cpu.h"

static int round_up(int x, int to) { return (x + to - 1) / to * to; }

size_t qx_packed_bytes(int bits, int n, int k) {
    return (size_t)round_up(n, 32) * round_up(k, 32) * bits / 8;
}

// Adds the code of field f to the bytes [vector * 64] at its place.
static void put(uint8_t* byte, int bits, int f, unsigned code) {
    if (bits != 3) {
        byte[0] |= (uint8_t)(code << (f * bits % 8));
    } else if (f < 6) {
        byte[f / 2 * 64] |= (uint8_t)(code << (f % 2 * 3));
    } else {
        byte[(f - 6) * 64] |= (uint8_t)(code >> 1 << 6);
        byte[2 * 64] |= (uint8_t)((code & 1) << f);
    }
}

void qx_pack(const uint8_t* codes, int bits, int n, int k, uint8_t* out) {
    const int padded = round_up(k, 32), vectors = bits == 3 ? 3 : 1;
    const int fields = bits == 3 ? 8 : 8 / bits, inputs = 4 * fields;
    memset(out, 0, qx_packed_bytes(bits, n, k));
    for (int row = 0; row < n; ++row) {
        uint8_t* block = out + (size_t)(row / 32) * 4 * bits * padded;
        const uint8_t* from = codes + (size_t)row * k;
        for (int i = 0; i < k; ++i) {
            uint8_t* chunk = block + (size_t)(i / inputs * 2 + row % 32 / 16) * vectors * 64;
            put(chunk + row % 16 * 4 + i % 4, bits, i % inputs / 4, from[i]);
        }
    }
}
