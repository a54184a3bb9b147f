// A thread pool that runs one function on all its threads, with barriers inside.
//
// Threads that wait for work spin for some microseconds and then sleep, so that a chain of short steps costs
// no system call and idle cores do not burn. Inside a step they spin ten times as long: a core that is given
// away to another process there is missed by all the others. Nothing is allocated after construction.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace edgevl {

class Pool {
  public:
    using Body = void (*)(void* context, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Runs body(context, i) for each thread i, the caller being thread 0; returns when all have returned.
    void run(Body body, void* context);

    // Called by every thread inside a body: the next item of the current phase, counted from 0.
    int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

    // Called by every thread inside a body: waits for all of them and sets next() back to 0.
    void barrier();

  private:
    // A number that is waited on until it changes.
    struct Gate {
        std::atomic<uint64_t> value{0};
        std::atomic<int> sleepers{0};
        std::mutex mutex;
        std::condition_variable changed;

        void advance();
        void wait(uint64_t seen, int spins);
    };

    void work(int thread);

    const int threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) Gate start_;
    alignas(64) Gate phase_;
    std::vector<std::thread> workers_;
};

}  // namespace edgevl
