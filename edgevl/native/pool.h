// A thread pool that runs one function on all its threads, in phases whose items the threads share.
//
// A phase is over when its items are done, not when every thread has come by: a thread that the system keeps
// from running, because others want the core, is not waited for unless it holds an item. Waiting threads spin
// for some microseconds and then sleep, so that a chain of short steps costs no system call and idle cores do
// not burn. Nothing is allocated after construction.
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
    // Returns whether it came to its end; false when a phase said that the run is over.
    using Body = bool (*)(void* context, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Runs body(context, i) for the caller, thread 0, and for each other thread that comes in time; returns
    // when all phases are over and no thread is inside. The body must run the same phases in the same order
    // on every thread.
    void run(Body body, void* context);

    // Called inside a body for phase 0, 1, 2, ...: runs items 0..items-1, more than none, that no other
    // thread has taken, and waits until all are done. False: the run is over, and the body must return at
    // once, touching nothing.
    template <class Item>
    bool phase(int thread, uint32_t number, int64_t items, const Item& item) {
        if (threads_ == 1) {
            for (int64_t i = 0; i < items; ++i) item(i);
            return true;
        }
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (uint32_t(ticket >> 32) == number) {
            const int64_t next = int64_t(ticket & 0xffffffffu);
            if (next >= items) return wait(thread, number);
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire)) {
                continue;
            }
            item(next);
            if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items) {
                advance(number);
                return true;
            }
            ticket = ticket_.load(std::memory_order_acquire);
        }
        return true;
    }

  private:
    // Sleepers are woken by whoever changes what they wait for, after the change.
    struct Bed {
        std::atomic<int> sleepers{0};
        std::mutex mutex;
        std::condition_variable changed;

        void wake();
        template <class Ready>
        void wait(int spins, const Ready& ready);
    };

    bool enter(int thread);
    void leave() { inside_.fetch_sub(1, std::memory_order_release); }
    void advance(uint32_t number);
    bool wait(int thread, uint32_t number);
    void work(int thread);

    const int threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint64_t> ticket_{0};  // phase << 32 | next item
    alignas(64) std::atomic<int64_t> done_{0};     // items of the phase
    alignas(64) std::atomic<uint64_t> newest_{0};  // run, counted from 1
    std::atomic<uint64_t> open_{0};                // the run that threads may be inside of; 0: none
    std::atomic<int> inside_{0};  // threads beside the caller that may touch what the run uses
    alignas(64) Bed idle_;
    alignas(64) Bed between_;
    std::vector<uint64_t> joined_;  // by thread: the run that it is in or was in last; its own alone
    std::vector<std::thread> workers_;
};

}  // namespace edgevl
