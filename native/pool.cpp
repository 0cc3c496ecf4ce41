// A small thread pool in which the caller never waits for a worker that has not begun: chunks are claimed one by one, and
// what nobody claims the caller does itself. What remains is a worker that loses its core in the middle of a chunk: the
// caller then sleeps instead of spinning, which keeps its own share of a core for when the worker is back, so that both run
// at the same time again. Busy neighbours so cost about the share that they take, not a slice of time at every barrier.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "kernels.h"

namespace {

constexpr int MOST_WORKERS = 255;
using Clock = std::chrono::steady_clock;

// How long a worker stays awake after its last chunk, and from when on it gives way to any thread that wants the core.
constexpr std::chrono::microseconds LINGER{200}, POLITE{40};
// How long a thread waits awake for chunks that others have claimed, and how long it then sleeps at a time.
constexpr std::chrono::microseconds PATIENCE{100}, NAP{50};

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  // One line that the caller writes and workers watch, one that they write.
  alignas(64) std::atomic<int64_t> open{0};  // chunks nobody has claimed; above zero only while task and context are valid
  std::atomic<int32_t> width{0};             // workers that may join
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t all = 0;
  alignas(64) int64_t done = 0;

  alignas(64) std::mutex owner;  // one job at a time; a second caller works alone
  std::mutex door;
  std::condition_variable bell;
  std::atomic<int32_t> asleep{0};
  int32_t workers = 0;

  bool claim_one() {
    int64_t left = open.load(std::memory_order_acquire);
    while (left > 0)
      if (open.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
        task(context, all - left);
        __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
        return true;
      }
    return false;
  }

  void work(int32_t index) {
    auto last = Clock::now();
    for (;;) {
      bool worked = false;
      for (int i = 0; i < 64 && !worked; ++i) {
        if (index < width.load(std::memory_order_relaxed))
          while (claim_one()) worked = true;
        if (!worked) pause_briefly();
      }
      const auto now = Clock::now();
      if (worked) last = now;
      if (now - last < LINGER) {
        if (now - last > POLITE) std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(door);
      asleep.fetch_add(1);
      // A bell missed between the last look and this wait costs speed once, never a result.
      if (open.load() == 0 || index >= width.load()) bell.wait(lock);
      asleep.fetch_sub(1);
      lock.unlock();
      last = Clock::now();
    }
  }

  void grow(int32_t wanted) {
    for (; workers < wanted; ++workers) {
      try {
        std::thread([this, index = workers] { work(index); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer hands, same result
      }
    }
  }

  void run(void (*job)(void*, int64_t), void* argument, int64_t chunks, int32_t helpers) {
    if (workers < helpers) grow(helpers);
    task = job;
    context = argument;
    all = chunks;
    __atomic_store_n(&done, 0, __ATOMIC_RELAXED);
    width.store(helpers, std::memory_order_relaxed);
    open.store(chunks);
    if (asleep.load() > 0) bell.notify_all();
    while (claim_one()) {
    }
    sk_wait(&done, chunks);
  }
};

std::atomic<Pool*> pool{nullptr};  // never freed: its threads may outlive every destructor

void forget_pool() { pool.store(nullptr); }  // threads do not survive a fork; the child starts its own

Pool* the_pool() {
  Pool* p = pool.load(std::memory_order_acquire);
  if (p) return p;
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh) return nullptr;
  if (!pool.compare_exchange_strong(p, fresh)) {
    delete fresh;
    return p;
  }
  static std::atomic<bool> registered{false};
  if (!registered.exchange(true)) pthread_atfork(nullptr, nullptr, forget_pool);
  return fresh;
}

}  // namespace

void sk_parallel(void (*task)(void*, int64_t), void* context, int64_t chunks, int32_t threads) {
  Pool* p = threads > 1 && chunks > 1 ? the_pool() : nullptr;
  if (p && p->owner.try_lock()) {
    p->run(task, context, chunks, threads - 1 < MOST_WORKERS ? threads - 1 : MOST_WORKERS);
    p->owner.unlock();
    return;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
}

void sk_wait(const int64_t* done, int64_t wanted) {
  if (__atomic_load_n(done, __ATOMIC_ACQUIRE) >= wanted) return;
  const auto limit = Clock::now() + PATIENCE;
  bool lost = false;
  for (int spins = 1; __atomic_load_n(done, __ATOMIC_ACQUIRE) < wanted; ++spins) {
    pause_briefly();
    if (lost)
      std::this_thread::sleep_for(NAP);
    else if (spins % 64 == 0)
      lost = Clock::now() > limit;
  }
}
