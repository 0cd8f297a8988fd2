// Packed weights as a dense matrix in half precision: scale * (code - zero) in float32, rounded once.
//
// The product with many tokens is then cuBLAS's. A warp takes a chunk of a tile of 16 outputs; a step
// of 64 inputs goes through shared memory, so that rows are written 128 bytes at a time.
#pragma once

#include "weights.cuh"

namespace qx {

struct Dense {
    const Words4* weights;  // [tiles, chunks, loads, 32 lanes]
    const void* scales;     // [tiles, chunks, 8 rows, spans, 2], or [tiles, 8, 2]
    const void* zeros;      // likewise
    unsigned short* out;    // [N, K] from output 16 * first_tile on
    int N, K, chunks, first_tile;
};

template <class F, int BITS, int TWICE_ZERO, bool ZEROS, class SCALE, int SPAN>
struct Dequantize {
    static constexpr int kLoads = chunk_loads(BITS), kChunk = chunk_inputs(BITS);
    static constexpr int kStep = 64, kSteps = kChunk / kStep, kSpans = SPAN ? kChunk / SPAN : 1;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kRow = kStep + 8;  // numbers; eight rows lie in different banks
    static constexpr int kShared = kWarps * 16 * kRow * 2;

    const Dense& d;
    const int lane, chunk, tile;
    unsigned short* const rows;

    QX_FN Dequantize(const Dense& dense)
        : d(dense),
          lane(thread() % 32),
          chunk(block_x() * kWarps + thread() / 32),
          tile(block_y()),
          rows((unsigned short*)shared_memory() + thread() / 32 * 16 * kRow) {}

    // Pair R of a fragment times its row's scale.
    QX_FN u32 scaled(u32 pair, float scale, float zero) const {
        const float low = widened<F>(pair) - zero, high = widened<F>(pair >> 16) - zero;
        return rounded<F>(scale * low) | (u32)rounded<F>(scale * high) << 16;
    }

    template <int STEP>
    QX_FN void step(const Words4* words, const SCALE* scales, const SCALE* zeros) const {
        u32 mine[BITS];
        QX_UNROLL for (int j = 0; j < BITS; ++j)
            mine[j] = words[(STEP * BITS + j) / 4].word[(STEP * BITS + j) % 4];
        repeat<4>([&](auto f) {
            constexpr int at = decltype(f)::value;
            const int span = SPAN ? (STEP * 4 + at) * 16 / (SPAN ? SPAN : 1) : 0;
            const float zero_low = ZEROS ? zeros[span].low() : 0.0f;
            const float zero_high = ZEROS ? zeros[span].high() : 0.0f;
            u32 a[4];
            decode_fragment<F, BITS, TWICE_ZERO, at>(mine, a);
            QX_UNROLL for (int r = 0; r < 4; ++r) {
                const bool upper = r % 2;
                const int row = lane / 4 + 8 * (r % 2), input = at * 16 + lane % 4 * 2 + 8 * (r / 2);
                *(u32*)(rows + row * kRow + input) =
                    scaled(a[r], upper ? scales[span].high() : scales[span].low(),
                           upper ? zero_high : zero_low);
            }
        });
        warp_sync();
        QX_UNROLL for (int i = 0; i < 4; ++i) {
            const int row = i * 4 + lane / 8, output = tile * 16 + row;
            const int first = STEP * kStep + lane % 8 * 8, input = chunk * kChunk + first;
            if (output < d.N && input < d.K)  // K is a multiple of 8
                *(Words4*)(d.out + (long)output * d.K + input) =
                    *(const Words4*)(rows + row * kRow + lane % 8 * 8);
        }
        warp_sync();
    }

    static QX_FN void run(const Dense& dense) {
        const Dequantize self(dense);
        if (self.chunk >= dense.chunks) return;
        const long at = (long)(dense.first_tile + self.tile) * dense.chunks + self.chunk;
        const long row = (SPAN ? at : dense.first_tile + self.tile) * 8 + self.lane / 4;
        Words4 words[kLoads];
        SCALE scales[kSpans], zeros[kSpans];
        QX_UNROLL for (int j = 0; j < kLoads; ++j)
            words[j] = dense.weights[(at * kLoads + j) * 32 + self.lane];
        QX_UNROLL for (int j = 0; j < kSpans; ++j) {
            scales[j] = ((const SCALE*)dense.scales)[row * kSpans + j];
            if constexpr (ZEROS) zeros[j] = ((const SCALE*)dense.zeros)[row * kSpans + j];
        }
        repeat<kSteps>([&](auto s) {
            self.template step<decltype(s)::value>(words, scales, zeros);
        });
    }
};

}  // namespace qx
