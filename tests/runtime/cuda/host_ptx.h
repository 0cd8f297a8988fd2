// The instructions of ptx.cuh on the host, one fiber for each thread of a block.
//
// Threads run in an order that changes from round to round. An asynchronous copy happens when it is
// issued or not before it is waited for, as a coin falls, and shared memory begins as NaN: code that
// reads too early or overwrites too soon gives other results. Addresses of global memory that were
// not handed in, barriers that not all reach, and threads that never end are errors.
#pragma once  // included by ptx.cuh, after decode.cuh

#include <algorithm>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>


namespace qx {

struct alignas(16) Words4 {
    u32 word[4];
};

namespace host {

struct Copy {
    u32 to;
    const void* from;
    bool there;
};

struct Barrier {
    int waiting = 0;
    long round = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    std::vector<u32> unpublished;  // where it copied to
    unsigned products = 0;
    std::vector<std::function<void()>> issued;
    std::deque<std::vector<std::function<void()>>> in_flight;
};

struct Machine {
    int grid[3], block[3], threads, current = 0;
    long progress = 0;
    ucontext_t home;
    std::vector<Fiber> fibers;
    std::vector<unsigned char> bytes;
    unsigned char* shared = nullptr;
    std::map<int, Barrier> barriers;
    std::vector<std::vector<unsigned char>> slots;  // what the lanes of a warp show each other
    std::vector<std::pair<const char*, const char*>> ranges;
    std::function<void()> kernel;
    std::mt19937 random;
    unsigned seed = 0;
    const char* failed = nullptr;
};

inline Machine* machine = nullptr;

inline Fiber& fiber() { return machine->fibers[machine->current]; }

inline void yield() {
    Fiber& self = fiber();
    swapcontext(&self.context, &machine->home);
}

// Ends the kernel: its threads do not run again.
inline void fail(const char* what) {
    machine->failed = what;
    for (;;) yield();
}

inline void wait(int key, int threads) {
    Barrier& barrier = machine->barriers[key];
    const long round = barrier.round;
    ++machine->progress;
    if (++barrier.waiting == threads) {
        barrier.waiting = 0;
        ++barrier.round;
        return;
    }
    while (barrier.round == round) yield();
}

inline void warp_wait() { wait(1000 + machine->current / 32, 32); }

inline void check(const void* from, size_t size) {
    const char* at = (const char*)from;
    for (const auto& [begin, end] : machine->ranges)
        if (at >= begin && at + size <= end) return;
    fail("reads memory that it was not given");
}

inline void perform(const Copy& copy) {
    fiber().unpublished.push_back(copy.to);
    if (copy.there) {
        check(copy.from, 16);
        std::memcpy(machine->shared + copy.to, copy.from, 16);
    } else {
        std::memset(machine->shared + copy.to, 0, 16);
    }
}

// What every lane of the warp passes, in the order of lanes.
template <class T>
std::vector<T> all_lanes(const T& mine) {
    auto& slot = machine->slots[machine->current / 32];
    std::memcpy(slot.data() + machine->current % 32 * sizeof(T), &mine, sizeof(T));
    warp_wait();
    std::vector<T> all(32);
    std::memcpy(all.data(), slot.data(), 32 * sizeof(T));
    warp_wait();
    return all;
}

inline void enter() {
    machine->kernel();
    fiber().done = true;
    ++machine->progress;
    swapcontext(&fiber().context, &machine->home);
}

inline void run_block() {
    Machine& m = *machine;
    m.barriers.clear();
    std::memset(m.bytes.data(), 0xff, m.bytes.size());
    m.fibers = std::vector<Fiber>(m.threads);
    for (Fiber& each : m.fibers) {
        const size_t size = 256 << 10;
        each.stack.reset(new char[size]);
        getcontext(&each.context);
        each.context.uc_stack.ss_sp = each.stack.get();
        each.context.uc_stack.ss_size = size;
        makecontext(&each.context, enter, 0);
    }
    std::vector<int> order(m.threads);
    for (int i = 0; i < m.threads; ++i) order[i] = i;
    bool stuck = false;
    for (int left = m.threads; left;) {
        const long before = m.progress;
        std::shuffle(order.begin(), order.end(), m.random);
        // some warps stand still for a while, unless nothing moved without them
        const unsigned asleep = stuck || m.random() % 4 == 0 ? 0 : m.random() & m.random();
        for (int i : order) {
            if (m.fibers[i].done || asleep >> i / 32 & 1) continue;
            m.current = i;
            swapcontext(&m.home, &m.fibers[i].context);
            left -= m.fibers[i].done;
            if (m.failed) return;
        }
        if (m.progress == before && stuck) m.failed = "threads wait at different barriers";
        stuck = m.progress == before;
        if (m.failed) return;
    }
}

// Blocks in an order of the seed, one after the other. What went wrong, or null.
inline const char* launch(int x, int y, int z, int threads, int shared, unsigned seed,
                   std::vector<std::pair<const char*, const char*>> ranges,
                   std::function<void()> kernel) {
    Machine m;
    machine = &m;
    m.random.seed(seed);
    m.seed = seed;
    m.threads = threads;
    m.ranges = std::move(ranges);
    m.kernel = std::move(kernel);
    m.bytes.resize(shared + 1024);
    m.shared = (unsigned char*)(((size_t)m.bytes.data() + 1023) / 1024 * 1024);
    m.slots.assign(threads / 32, std::vector<unsigned char>(32 * 256));
    m.grid[0] = x, m.grid[1] = y, m.grid[2] = z;
    std::vector<int> order(x * y * z);
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
    std::shuffle(order.begin(), order.end(), m.random);
    for (int at : order) {
        m.block[0] = at % x, m.block[1] = at / x % y, m.block[2] = at / x / y;
        run_block();
        if (m.failed) break;
    }
    machine = nullptr;
    return m.failed;
}

inline unsigned short to_bits(float value, int mantissa, int bias) {
    if (std::isnan(value)) return mantissa == 10 ? 0x7e00 : 0x7fc0;
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    const unsigned short infinity = (unsigned short)(((1 << (15 - mantissa)) - 1) << mantissa);
    if (size == 0) return sign;
    int exponent;
    std::frexp(size, &exponent);  // size = f * 2**exponent, f in [1/2, 1)
    const int least = 1 - bias;
    const int power = exponent - 1 < least ? least : exponent - 1;
    long whole = std::lrint(std::ldexp((double)size, mantissa - power));  // to nearest even
    if (std::isinf(size)) return sign | infinity;
    if (whole < 1L << mantissa) return (unsigned short)(sign | whole);
    const long bits = ((long)(power + bias) << mantissa) + (whole - (1L << mantissa));
    return (unsigned short)(sign | (bits >= infinity ? infinity : bits));
}

inline float from_16(unsigned short bits, int mantissa, int bias) {
    const int exponent = bits >> mantissa & ((1 << (15 - mantissa)) - 1);
    const int fraction = bits & ((1 << mantissa) - 1);
    float size;
    if (exponent == (1 << (15 - mantissa)) - 1)
        size = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        size = std::ldexp((float)fraction, 1 - bias - mantissa);
    else
        size = std::ldexp((float)(fraction | 1 << mantissa), exponent - bias - mantissa);
    return bits & 0x8000 ? -size : size;
}

template <class F>
float half_of(u32 pair, int upper) {
    return from_16((unsigned short)(pair >> (16 * upper)), F::mantissa, F::bias);
}

}  // namespace host

inline int thread() { return host::machine->current; }
inline int block_x() { return host::machine->block[0]; }
inline int block_y() { return host::machine->block[1]; }
inline int block_z() { return host::machine->block[2]; }
inline int blocks_x() { return host::machine->grid[0]; }
inline int blocks_z() { return host::machine->grid[2]; }
inline int uniform(int value) { return value; }
inline unsigned char* shared_memory() { return host::machine->shared; }
inline u32 shared_address() { return 0; }
inline unsigned long long read_once() { return 0; }

inline Words4 load_stream(const Words4* from, unsigned long long) {
    host::check(from, 16);
    return *from;
}

inline void copy_async(u32 to, const void* from, bool there) {
    const host::Copy copy{to, from, there};
    if (host::machine->random() & 1)
        host::perform(copy);
    else
        host::fiber().open.push_back(copy);
}

inline void copies_commit() {
    host::Fiber& fiber = host::fiber();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int PENDING>
void copies_wait() {
    auto& groups = host::fiber().groups;
    while (groups.size() > PENDING) {
        for (const auto& copy : groups.front()) host::perform(copy);
        groups.pop_front();
    }
}

inline void warp_sync() { host::warp_wait(); }

inline void group_sync(int id, int threads) {
    if (threads == 32)
        warp_sync();
    else
        host::wait(id + 1, threads);
}

inline void block_sync() { host::wait(0, host::machine->threads); }

inline void load_matrices(u32* to, u32 address) {
    const auto rows = host::all_lanes(address);
    const int lane = thread() % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const u32 row = rows[matrix * 8 + lane / 4];
        if (row % 16) host::fail("a row of ldmatrix is not aligned");
        std::memcpy(&to[matrix], host::machine->shared + row + lane % 4 * 4, 4);
    }
}

template <class F>
void mma(float* d, const u32* a, const u32* b, const float* c) {
    struct Operands {
        u32 a[4], b[2];
    } mine;
    std::memcpy(mine.a, a, 16);
    std::memcpy(mine.b, b, 8);
    const auto all = host::all_lanes(mine);
    const int lane = thread() % 32;
    for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r / 2), column = lane % 4 * 2 + r % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) {
            const int quad = k % 8 / 2, upper_k = k / 8;
            const u32 weight = all[row % 8 * 4 + quad].a[row / 8 + 2 * upper_k];
            const u32 token = all[column * 4 + quad].b[upper_k];
            sum += (double)host::half_of<F>(weight, k % 2) * host::half_of<F>(token, k % 2);
        }
        d[r] = c[r] + (float)sum;
    }
}

inline float from_half(unsigned short bits) { return host::from_16(bits, 10, 15); }
inline unsigned short to_half(float value) { return host::to_bits(value, 10, 15); }
inline unsigned short to_bfloat16(float value) { return host::to_bits(value, 7, 127); }

inline float from_bits(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <u32 VALUE>
u32 in_register() {
    return VALUE;
}

inline u32 arrive(u32* counter) { return (*counter)++; }
inline void fence() {}
inline float load_fresh(const float* from) { return *from; }

// wgmma: operands are read and results written, as a coin falls, when it is issued or not before
// it is waited for. Copies into shared memory have to be published before.
namespace host {

template <class F, int COLUMNS>
void multiply_warp(float* d, const u32* a, u32 address, bool add) {
    struct Operand {
        u32 a[4];
    } mine;
    std::memcpy(mine.a, a, 16);
    const auto all = all_lanes(mine);
    const int lane = thread() % 32;
    if (lane == 0)
        for (const Fiber& each : machine->fibers)
            for (u32 at : each.unpublished)
                if (at - (address & ~1023u) < COLUMNS * 1024u) fail("a copy is not published");
    for (int n = 0; n < COLUMNS; ++n)
        for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r / 2), token = n * 8 + lane % 4 * 2 + r % 2;
            double sum = 0;
            for (int k = 0; k < 16; ++k) {
                const u32 weight = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
                const u32 plain = address + token * 128 + k * 2;
                const u32 swizzled = plain ^ (plain >> 7 & 7) << 4;
                u32 pair = 0;
                std::memcpy(&pair, machine->shared + swizzled, 2);
                sum += (double)half_of<F>(weight, k % 2) * half_of<F>(pair, 0);
            }
            float& to = d[n * 4 + r];
            to = (add ? to : 0.0f) + (float)sum;
        }
}

}  // namespace host

inline void wgmma_publish() { host::fiber().unpublished.clear(); }
inline void wgmma_begin() {}

template <class F, int COLUMNS>
void wgmma(float* d, const u32* a, u32 address, bool add) {
    host::Fiber& fiber = host::fiber();
    const unsigned coin = (fiber.products++ * 2654435761u + host::machine->seed * 40503u) >> 16;
    const auto run = [=] { host::multiply_warp<F, COLUMNS>(d, a, address, add); };
    if ((coin & 1) && fiber.issued.empty() && fiber.in_flight.empty())
        run();
    else
        fiber.issued.push_back(run);
}

inline void wgmma_commit() {
    host::Fiber& fiber = host::fiber();
    fiber.in_flight.push_back(std::move(fiber.issued));
    fiber.issued.clear();
}

template <int PENDING>
void wgmma_wait() {
    auto& groups = host::fiber().in_flight;
    while (groups.size() > PENDING) {
        for (const auto& run : groups.front()) run();
        groups.pop_front();
    }
}

}  // namespace qx
