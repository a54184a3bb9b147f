#include "pool.h"

namespace edgevl {

namespace {

constexpr int kIdleSpins = 4000;    // some tens of microseconds
constexpr int kPhaseSpins = 40000;  // some hundreds

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

// A sleeper counts itself before it looks, and what it looks at changes before sleepers are counted: one of
// the two always sees the other. Both need the single order of sequential consistency.
void Pool::Bed::wake() {
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
    {
        std::lock_guard<std::mutex> lock(mutex);
    }
    changed.notify_all();
}

template <class Ready>
void Pool::Bed::wait(int spins, const Ready& ready) {
    for (int i = 0; i < spins; ++i) {
        if (ready()) return;
        pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (!ready()) changed.wait(lock);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

Pool::Pool(int threads) : threads_(threads), joined_(size_t(threads), 0) {
    workers_.reserve(size_t(threads - 1));
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {
        stop_.store(true, std::memory_order_seq_cst);
        idle_.wake();
        for (std::thread& worker : workers_) worker.join();
        throw;
    }
}

Pool::~Pool() {
    stop_.store(true, std::memory_order_seq_cst);
    idle_.wake();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Body body, void* context) {
    if (threads_ == 1) {
        body(context, 0);
        return;
    }
    body_ = body;
    context_ = context;
    ticket_.store(0, std::memory_order_relaxed);
    const uint64_t run = newest_.load(std::memory_order_relaxed) + 1;
    open_.store(run, std::memory_order_seq_cst);
    newest_.store(run, std::memory_order_seq_cst);
    idle_.wake();
    body(context, 0);
    open_.store(0, std::memory_order_seq_cst);
    between_.wake();
    while (inside_.load(std::memory_order_seq_cst) != 0) pause();
}

// Threads count themselves before they look whether the run is open, and it is closed before they are
// counted.
bool Pool::enter(int thread) {
    inside_.fetch_add(1, std::memory_order_seq_cst);
    if (open_.load(std::memory_order_seq_cst) == joined_[size_t(thread)]) return true;
    leave();
    return false;
}

void Pool::advance(uint32_t number) {
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(uint64_t(number + 1) << 32, std::memory_order_seq_cst);
    between_.wake();
}

// Until the phase is over. Threads beside the caller are not inside meanwhile, so that the caller never waits
// for a thread that only waits.
bool Pool::wait(int thread, uint32_t number) {
    const auto over = [&] { return uint32_t(ticket_.load(std::memory_order_seq_cst) >> 32) != number; };
    if (thread == 0) {
        between_.wait(kPhaseSpins, over);
        return true;
    }
    const uint64_t run = joined_[size_t(thread)];
    leave();
    between_.wait(kPhaseSpins, [&] { return over() || open_.load(std::memory_order_seq_cst) != run; });
    return enter(thread);
}

void Pool::work(int thread) {
    uint64_t& run = joined_[size_t(thread)];
    for (;;) {
        idle_.wait(kIdleSpins, [&] {
            return newest_.load(std::memory_order_seq_cst) != run || stop_.load(std::memory_order_seq_cst);
        });
        if (stop_.load(std::memory_order_seq_cst)) return;
        run = newest_.load(std::memory_order_seq_cst);
        if (enter(thread) && body_(context_, thread)) leave();
    }
}

}  // namespace edgevl
