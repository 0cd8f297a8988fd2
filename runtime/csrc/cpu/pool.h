// Threads that share the tasks of one loop after another.
//
// A worker that finds no loop spins for some microseconds, so that the loops of one token follow
// each other without a system call, and then sleeps, so that other threads of the process (torch's
// among them) have the cores. The caller takes tasks too and never waits for a worker that has
// not begun: with every other core busy a loop takes as long as on one thread, and no longer.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return (int)workers_.size() + 1; }

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
