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

// Codes of one row and chunk, four a word, as a lane of each vector. No field reaches out of its byte.
static void pack_lane(const uint32_t* fields, int bits, uint8_t* lane) {
    uint32_t words[3] = {0, 0, 0};
    if (bits == 3) {
        for (int f = 0; f < 6; ++f) words[f / 2] |= fields[f] << (f % 2 * 3);
        for (int f = 6; f < 8; ++f) {
            words[f - 6] |= (fields[f] >> 1 & 0x03030303u) << 6;
            words[2] |= (fields[f] & 0x01010101u) << f;
        }
    } else {
        for (int f = 0; f < 8 / bits; ++f) words[0] |= fields[f] << (f * bits);
    }
    for (int i = 0; i < (bits == 3 ? 3 : 1); ++i) memcpy(lane + i * 64, words + i, 4);
}

void qx_pack(const uint8_t* codes, int bits, int n, int k, uint8_t* out) {
    const int padded = round_up(k, 32), vectors = bits == 3 ? 3 : 1;
    const int fields = bits == 3 ? 8 : 8 / bits, inputs = 4 * fields;
    if (n % 32) memset(out, 0, qx_packed_bytes(bits, n, k));
    for (int row = 0; row < n; ++row) {
        uint8_t* lane = out + (size_t)(row / 32) * 4 * bits * padded +
                        (size_t)(row % 32 / 16) * vectors * 64 + row % 16 * 4;
        const uint8_t* from = codes + (size_t)row * k;
        for (int i = 0; i < padded; i += inputs, lane += 2 * vectors * 64) {
            uint32_t four[8] = {0};
            const int here = k - i < inputs ? (k > i ? k - i : 0) : inputs;
            memcpy(four, from + i, here);
            pack_lane(four, bits, lane);
        }
    }
}
