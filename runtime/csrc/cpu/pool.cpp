#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
static void pause_core() { _mm_pause(); }
#elif defined(__aarch64__)
static void pause_core() { asm volatile("yield"); }
#else
static void pause_core() {}
#endif

static const int kSpins = 20000;  // a third of a millisecond to one: what a token takes outside

Pool::Pool(int threads, qx_parallel parallel) : threads_(threads), parallel_(parallel) {
    if (parallel_) return;
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {  // the system has no more threads to give
        end();
        throw;
    }
}

Pool::~Pool() { end(); }

void Pool::end() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(int count, Call call, const void* task) {
    if (threads_ == 1 || count <= 1) {
        for (int i = 0; i < count; ++i) call(task, i);
        return;
    }
    call_ = call;
    task_ = task;
    count_ = count;
    next_ = 0;
    if (parallel_) {
        parallel_([](void* pool) { ((Pool*)pool)->take(); }, this, (unsigned)threads_, 0);
        return;
    }
    open_ = true;
    ++loop_;
    if (sleepers_ > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }  // none is between its last look and sleep
        wake_.notify_all();
    }
    take();
    open_ = false;  // who comes now finds nothing; who is in is waited for
    while (active_ > 0) pause_core();
}

void Pool::take() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(task_, i);
}

void Pool::work() {
    uint32_t seen = 0;
    for (;;) {
        for (int spin = 0; spin < kSpins && loop_ == seen && !stop_; ++spin) pause_core();
        if (loop_ == seen && !stop_) {
            std::unique_lock<std::mutex> lock(mutex_);
            ++sleepers_;
            wake_.wait(lock, [&] { return loop_ != seen || stop_; });
            --sleepers_;
        }
        if (stop_) return;
        seen = loop_;
        ++active_;  // both counters are sequentially consistent: the caller sees this, or we see
        if (open_) take();  // that it has closed the loop
        --active_;
    }
}
