#include "pool.h"

namespace edgevl {

namespace {

constexpr int kStartSpins = 4000;   // some tens of microseconds
constexpr int kPhaseSpins = 40000;  // some hundreds

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

// A sleeper counts itself before it looks at the value, and the value changes before the sleepers are
// counted: one of the two always sees the other. Both need the single order of sequential consistency.
void Pool::Gate::advance() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
    {
        std::lock_guard<std::mutex> lock(mutex);
    }
    changed.notify_all();
}

void Pool::Gate::wait(uint64_t seen, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (value.load(std::memory_order_acquire) != seen) return;
        pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (value.load(std::memory_order_seq_cst) == seen) changed.wait(lock);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::Pool(int threads) : threads_(threads) {
    workers_.reserve(size_t(threads - 1));
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
        stop_ = true;
        start_.advance();
        for (std::thread& worker : workers_) worker.join();
        throw;
    }
}

Pool::~Pool() {
    stop_ = true;
    start_.advance();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Body body, void* context) {
    body_ = body;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    if (threads_ > 1) start_.advance();
    body(context, 0);
    barrier();
}

void Pool::barrier() {
    if (threads_ == 1) {
        next_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint64_t seen = phase_.value.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_)
        return phase_.wait(seen, kPhaseSpins);
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    phase_.advance();
}

void Pool::work(int thread) {
    for (uint64_t seen = 0;; ++seen) {
        start_.wait(seen, kStartSpins);
        if (stop_) return;
        body_(context_, thread);
        barrier();
    }
}

}  // namespace edgevl
