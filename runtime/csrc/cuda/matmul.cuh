// out = x weight^T + bias for packed weights [N, K] and x [M, K] in half precision.
//
// Weights are the first operand of mma.m16n8k16, tokens the second, so that 1 to 8 tokens cost the
// same. A warp owns TILES tiles of 16 outputs and 8 * COLUMNS tokens. Weights go from global memory
// to registers in loads of 16 bytes that each are of use once, AHEAD chunks before they are wanted;
// tokens go through a ring of STAGES steps of 64 inputs in shared memory, which the WARPS_N warps
// beside each other share. WARPS_K such groups, and then blocks (grid z), divide the inputs.
//
// Sums are kept in float32, a group's at a time, and meet the group's scale there: a product is
// (code - zero) * x, exact, and nothing is rounded to half precision before the end. Where groups
// have zero points of their own, a product is code * x and the zero point meets the sum of x: a
// difference of two float32 sums. Partial sums are added in their order, by the block that comes last: results do not change from run to run.
#pragma once

#include "weights.cuh"
#include "wgmma.cuh"

namespace qx {

struct Problem {
    const unsigned short* x;    // [M, K] at distances of stride_x, 16-byte aligned
    const Words4* weights;      // [tiles, chunks, loads, 32 lanes]
    const void* scales;         // [tiles, chunks, 8 rows, spans, 2: the row and the one 8 below]
    const void* zeros;          // likewise
    const float* bias;          // [N] or null
    unsigned short* out;        // [M, N]
    float* partial;             // [blocks z, M, N] where there are several
    u32* arrived;               // a zero for each block of a layer
    int M, N, K, stride_x, tiles, chunks;
};

// SPAN inputs share a scale; 0 where all inputs do. ZEROS: groups have zero points of their own.
// WGMMA: four warps beside each other multiply together, while they take the next step apart.
template <class F, int BITS, int TWICE_ZERO, bool ZEROS, class SCALE, int SPAN, int TILES,
          int COLUMNS, int WARPS_N, int WARPS_K, int STAGES, int AHEAD,
          bool WGMMA>
struct Matmul {
    static constexpr int kLoads = chunk_loads(BITS), kChunk = chunk_inputs(BITS);
    static constexpr int kStep = 64, kSteps = kChunk / kStep;
    static constexpr int kSpans = SPAN ? kChunk / SPAN : 1;
    static constexpr int kTokens = 8 * COLUMNS, kOutputs = 16 * TILES * WARPS_N;
    static constexpr int kThreads = 32 * WARPS_N * WARPS_K, kBeside = 32 * WARPS_N;
    static constexpr int kStage = kTokens * kStep * 2;  // bytes
    static constexpr int kRow = kOutputs + 4;           // floats; no two lanes meet in a bank
    static constexpr int kRing = WARPS_K * STAGES * kStage;
    static constexpr int kSums = WARPS_K * kTokens * kRow * 4;
    static constexpr int kShared = kRing > kSums ? kRing : kSums;
    static constexpr int kBehind = WGMMA ? 2 : 1;  // steps that are still read when one begins
    static_assert(STAGES > kBehind && AHEAD >= 1 && (!WGMMA || WARPS_N % 4 == 0), "");

    static constexpr int kScales = kSpans * (int)sizeof(SCALE);
    struct alignas(kScales < 16 ? kScales : 16) Scales {
        SCALE of[kSpans];
    };
    struct Chunk {
        Words4 words[TILES][kLoads];
        Scales scales[TILES], zeros[ZEROS ? TILES : 1];
    };

    static constexpr int kRows = kBeside / 8;  // of a step, that are copied at a time
    static constexpr int kCopies = (kTokens + kRows - 1) / kRows;

    const Problem& p;
    const int lane, warp_n, warp_k, first_token, tile;
    const unsigned long long policy;
    // Where the next copy and the next load begin, and what is left of each.
    const u32 ring, place;
    const unsigned short* source;
    int input, inputs, rows, filled = 0, used = 0;
    const Words4* weights[TILES];
    const Scales *scales, *zeros;
    u32 tokens[COLUMNS][4];  // of two fragments, for mma
    u32 ones[4];              // for sums of activations
    u32 taken[2][TILES][16];  // steps taken apart, for wgmma
    float total[TILES][COLUMNS][4] = {}, part[TILES][COLUMNS][4] = {}, sum[COLUMNS][4] = {};

    QX_FN Matmul(const Problem& problem)
        : p(problem),
          lane(thread() % 32),
          warp_n(uniform(thread() / 32) % WARPS_N),
          warp_k(uniform(thread() / 32) / WARPS_N),
          first_token(block_y() * kTokens),
          tile((block_x() * WARPS_N + warp_n) * TILES),
          policy(read_once()),
          ring(shared_address() + warp_k * STAGES * kStage),
          place(thread() % kBeside / 8 * 128 + ((thread() ^ thread() % kBeside / 8) % 8 << 4)) {
        QX_UNROLL for (int r = 0; r < 4; ++r) ones[r] = in_register<both<F>(65536)>();
    }

    // From chunk `begin` on, to chunk `end`.
    QX_FN void aim(int begin, int end) {
        const int row = thread() % kBeside / 8;
        input = begin * kChunk + thread() % 8 * 8;
        inputs = p.K < end * kChunk ? p.K : end * kChunk;
        rows = p.M - first_token - row;
        source = p.x + (long)(first_token + row) * p.stride_x + input;
        QX_UNROLL for (int i = 0; i < TILES; ++i)
            weights[i] = p.weights + chunk_of(i, begin) * kLoads * 32 + lane;
        scales = (const Scales*)p.scales + chunk_of(0, begin) * 8 + lane / 4;
        zeros = (const Scales*)p.zeros + chunk_of(0, begin) * 8 + lane / 4;
    }

    // A tile beyond the last reads the last one once more; what comes of it is not written.
    QX_FN int tile_at(int i) const { return tile + i < p.tiles ? tile + i : p.tiles - 1; }

    QX_FN long chunk_of(int i, int chunk) const { return (long)tile_at(i) * p.chunks + chunk; }

    QX_FN void load(Chunk& to) {
        QX_UNROLL for (int i = 0; i < TILES; ++i) {
            QX_UNROLL for (int j = 0; j < kLoads; ++j)
                to.words[i][j] = load_stream(weights[i] + j * 32, policy);
            weights[i] += kLoads * 32;
        }
        if constexpr (SPAN != 0) {
            QX_UNROLL for (int i = 0; i < TILES; ++i) load_scales(to, i, p.chunks);
            scales += 8;
            zeros += 8;
        }
    }

    // Tile i's, which lie `apart` rows of 8 lanes from one tile to the next.
    QX_FN void load_scales(Chunk& to, int i, int apart) const {
        const int at = (tile_at(i) - tile_at(0)) * apart * 8;
        to.scales[i] = scales[at];
        if constexpr (ZEROS) to.zeros[i] = zeros[at];
    }

    // Tokens of the next step into the ring: rows of 128 bytes, their eighths exchanged so that the
    // same eighth of eight rows lies in all banks (the 128-byte swizzle of wgmma, too).
    QX_FN void copy_step() {
        const bool there = input < inputs;
        QX_UNROLL for (int i = 0; i < kCopies; ++i)
            if (kTokens % kRows == 0 || i * kRows + thread() % kBeside / 8 < kTokens)
                copy_async(ring + filled + i * kRows * 128 + (place ^ i * kRows % 8 << 4),
                           source + (long)(i * kRows) * p.stride_x, there && i * kRows < rows);
        copies_commit();
        input += kStep;
        source += kStep;
        filled = filled + kStage == STAGES * kStage ? 0 : filled + kStage;
    }

    // A group is complete: its scales meet its sums.
    QX_FN void settle_span(const Chunk& chunk, int j) {
        if constexpr (WGMMA) wgmma_wait<0>();
        QX_UNROLL for (int i = 0; i < TILES; ++i) {
            const float low = chunk.scales[i].of[j].low(), high = chunk.scales[i].of[j].high();
            QX_UNROLL for (int n = 0; n < COLUMNS; ++n)
                QX_UNROLL for (int r = 0; r < 4; ++r) {
                    float value = part[i][n][r];
                    if constexpr (ZEROS) {
                        const SCALE zero = chunk.zeros[i].of[j];
                        value -= (r < 2 ? zero.low() : zero.high()) * sum[n][r % 2];
                    }
                    total[i][n][r] += (r < 2 ? low : high) * value;
                }
        }
    }

    // Whether fragment AT of a step is a group's first: sums begin anew.
    template <int STEP, int AT>
    static QX_FN constexpr bool begins() {
        return SPAN != 0 && (STEP * 4 + AT) * 16 % (SPAN ? SPAN : 1) == 0;
    }

    // Ends the group that ends with fragment AT of a step, if one does.
    template <int STEP, int AT>
    QX_FN void settle(const Chunk& chunk) {
        constexpr int done = (STEP * 4 + AT + 1) * 16;
        if constexpr (SPAN != 0)
            if constexpr (done % SPAN == 0) settle_span(chunk, done / SPAN - 1);
    }

    template <int STEP>
    QX_FN void words_of(const Chunk& chunk, int i, u32* words) const {
        QX_UNROLL for (int j = 0; j < BITS; ++j)
            words[j] = chunk.words[i][(STEP * BITS + j) / 4].word[(STEP * BITS + j) % 4];
    }

    template <int STEP>
    QX_FN void multiply_step(const Chunk& chunk, u32 stage) {
        u32 words[TILES][BITS];
        QX_UNROLL for (int i = 0; i < TILES; ++i) words_of<STEP>(chunk, i, words[i]);
        const u32 row = stage + lane % 8 * 128;
        repeat<4>([&](auto f) {
            constexpr int at = decltype(f)::value;
            if constexpr (at % 2 == 0)
                QX_UNROLL for (int n = 0; n < COLUMNS; ++n)
                    load_matrices(tokens[n],
                                  row + n * 1024 + (((lane / 8 + at * 2) ^ (lane % 8)) << 4));
            constexpr bool add = !begins<STEP, at>();
            if constexpr (ZEROS)
                QX_UNROLL for (int n = 0; n < COLUMNS; ++n)
                    add_product<add>(sum[n], ones, tokens[n] + at % 2 * 2);
            QX_UNROLL for (int i = 0; i < TILES; ++i) {
                u32 a[4];
                decode_fragment<F, BITS, TWICE_ZERO, at>(words[i], a);
                QX_UNROLL for (int n = 0; n < COLUMNS; ++n)
                    add_product<add>(part[i][n], a, tokens[n] + at % 2 * 2);
            }
            settle<STEP, at>(chunk);
        });
    }

    template <bool ADD>
    QX_FN void add_product(float* d, const u32* a, const u32* b) const {
        const float none[4] = {};
        mma<F>(d, a, b, ADD ? d : none);
    }

    // A step is taken apart while the tensor cores are at the one before.
    template <int STEP>
    QX_FN void take_apart(const Chunk& chunk) {
        QX_UNROLL for (int i = 0; i < TILES; ++i) {
            u32 words[BITS];
            words_of<STEP>(chunk, i, words);
            repeat<4>([&](auto f) {
                constexpr int at = decltype(f)::value;
                decode_fragment<F, BITS, TWICE_ZERO, at>(words, taken[STEP % 2][i] + at * 4);
            });
        }
    }

    template <int STEP>
    QX_FN void multiply_taken(const Chunk& chunk, u32 stage) {
        repeat<4>([&](auto f) {
            constexpr int at = decltype(f)::value;
            constexpr bool add = !begins<STEP, at>(), ends = at == 3 || begins<STEP, at + 1>();
            if constexpr (at == 0 || !add) wgmma_begin();
            const u32 inputs_at = stage + at * 32;
            if constexpr (ZEROS) wgmma<F, COLUMNS>(&sum[0][0], ones, inputs_at, add);
            QX_UNROLL for (int i = 0; i < TILES; ++i)
                wgmma<F, COLUMNS>(&part[i][0][0], taken[STEP % 2][i] + at * 4, inputs_at, add);
            if constexpr (ends) wgmma_commit();
            settle<STEP, at>(chunk);
        });
    }

    QX_FN void multiply(const Chunk& chunk) {
        repeat<kSteps>([&](auto s) {
            constexpr int step = decltype(s)::value;
            if constexpr (WGMMA) {
                wgmma_wait<1>();
                take_apart<step>(chunk);
            }
            copies_wait<STAGES - kBehind - 1>();
            if constexpr (WGMMA) wgmma_publish();
            // all see this step, and none reads any more the one whose place the next copy takes
            group_sync(warp_k, kBeside);
            copy_step();
            if constexpr (WGMMA)
                multiply_taken<step>(chunk, ring + used);
            else
                multiply_step<step>(chunk, ring + used);
            used = used + kStage == STAGES * kStage ? 0 : used + kStage;
        });
    }

    QX_FN void multiply_all(int begin, int end) {
        Chunk chunks[AHEAD + 1];
        aim(begin, end);
        repeat<AHEAD>([&](auto i) {
            if (begin + decltype(i)::value < end) load(chunks[decltype(i)::value]);
        });
        QX_UNROLL for (int i = 0; i < STAGES - kBehind; ++i) copy_step();
        for (int at = begin; at < end; at += AHEAD + 1)
            repeat<AHEAD + 1>([&](auto i) {
                constexpr int here = decltype(i)::value;
                if (at + here >= end) return;
                if (at + here + AHEAD < end) load(chunks[(here + AHEAD) % (AHEAD + 1)]);
                multiply(chunks[here]);
            });
        copies_wait<0>();
        if constexpr (WGMMA) wgmma_wait<0>();
        if constexpr (SPAN == 0) {
            Chunk chunk;
            scales = (const Scales*)p.scales + tile_at(0) * 8 + lane / 4;
            zeros = (const Scales*)p.zeros + tile_at(0) * 8 + lane / 4;
            QX_UNROLL for (int i = 0; i < TILES; ++i) load_scales(chunk, i, 1);
            settle_span(chunk, 0);
        }
    }

    // Sums of the warps that divided the inputs, in their order; f(token, output, sum).
    template <class Use>
    QX_FN void gather(const Use& use) {
        float* sums = (float*)shared_memory();
        block_sync();
        float* mine = sums + warp_k * kTokens * kRow + warp_n * 16 * TILES + lane / 4;
        QX_UNROLL for (int i = 0; i < TILES; ++i)
            QX_UNROLL for (int n = 0; n < COLUMNS; ++n)
                QX_UNROLL for (int r = 0; r < 4; ++r)
                    mine[(n * 8 + lane % 4 * 2 + r % 2) * kRow + i * 16 + r / 2 * 8] =
                        total[i][n][r];
        block_sync();
        for (int at = thread(); at < kTokens * kOutputs; at += kThreads) {
            const int row = at / kOutputs, column = at % kOutputs;
            const int token = first_token + row, output = block_x() * kOutputs + column;
            if (token >= p.M || output >= p.N) continue;
            float value = 0.0f;
            for (int k = 0; k < WARPS_K; ++k) value += sums[(k * kTokens + row) * kRow + column];
            use(token, output, value);
        }
    }

    QX_FN void write(int token, int output, float value) const {
        if (p.bias) value += p.bias[output];
        p.out[(long)token * p.N + output] = rounded<F>(value);
    }

    QX_FN void finish() {
        if (blocks_z() == 1) {
            gather([&](int token, int output, float value) { write(token, output, value); });
            return;
        }
        const long layer = (long)p.M * p.N;
        gather([&](int token, int output, float value) {
            p.partial[block_z() * layer + (long)token * p.N + output] = value;
        });
        fence();
        block_sync();
        u32* counter = p.arrived + block_y() * blocks_x() + block_x();
        u32* last = (u32*)shared_memory();
        if (thread() == 0) *last = arrive(counter) == (u32)blocks_z() - 1;
        block_sync();
        if (!*last) return;
        fence();
        for (int at = thread(); at < kTokens * kOutputs; at += kThreads) {
            const int token = first_token + at / kOutputs;
            const int output = block_x() * kOutputs + at % kOutputs;
            if (token >= p.M || output >= p.N) continue;
            float value = 0.0f;
            for (int z = 0; z < blocks_z(); ++z)
                value += load_fresh(p.partial + z * layer + (long)token * p.N + output);
            write(token, output, value);
        }
        if (thread() == 0) *counter = 0;  // for the next call
    }

    static QX_FN void run(const Problem& problem) {
        Matmul matmul(problem);
        const long slices = (long)blocks_z() * WARPS_K;
        const long slice = (long)block_z() * WARPS_K + matmul.warp_k;
        matmul.multiply_all((int)(problem.chunks * slice / slices),
                            (int)(problem.chunks * (slice + 1) / slices));
        matmul.finish();
    }
};

}  // namespace qx
