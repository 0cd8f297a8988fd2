// Threads that share the tasks of one loop after another.
//
// A worker that finds no loop spins for a while, so that the loops of one token and the tokens of one
// answer follow each other without a system call, and then sleeps. The caller takes tasks too and
// never waits for a worker that has not begun: with every other core busy a loop takes as long as on
// one thread, and no longer.
//
// Layers that stand between torch's operations run on torch's own threads instead (`parallel` is
// GOMP_parallel of its OpenMP): those spin too, and two kinds of spinning threads would slow each
// other.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "qexport_cpu.h"

class Pool {
  public:
    Pool(int threads, qx_parallel parallel);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls task(i) for every i below `count`, in no order, on all threads. One loop at a time.
    template <class Task>
    void run(int count, const Task& task) {
        run(count, [](const void* t, int i) { (*(const Task*)t)(i); }, &task);
    }

  private:
    using Call = void (*)(const void*, int);
    void run(int count, Call call, const void* task);
    void work();
    void take();
    void end();

    const int threads_;
    const qx_parallel parallel_;
    std::vector<std::thread> workers_;
    Call call_ = nullptr;
    const void* task_ = nullptr;
    int count_ = 0;
    std::atomic<int> next_{0}, active_{0}, sleepers_{0};
    std::atomic<bool> open_{false}, stop_{false};
    std::atomic<uint32_t> loop_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};
