// A small thread pool in which the caller never waits for a worker that has not begun: chunks are claimed one by one, and
// what nobody claims the caller does itself. So a busy neighbour costs at most one chunk, never a missing thread.
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
// How long a worker stays awake after its last chunk. It gives way to any thread that wants the core meanwhile.
constexpr std::chrono::microseconds LINGER{100};

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::atomic<int64_t> open{0};  // chunks nobody has claimed; above zero only while task and context are valid
  std::atomic<int64_t> done{0};
  std::atomic<int32_t> width{0};  // workers that may join
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;

  std::mutex owner;  // one job at a time; a second caller works alone
  std::mutex door;
  std::condition_variable bell;
  std::atomic<int32_t> asleep{0};
  int32_t workers = 0;

  bool claim_one() {
    int64_t left = open.load(std::memory_order_acquire);
    while (left > 0)
      if (open.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
        task(context, left - 1);
        done.fetch_add(1, std::memory_order_release);
        return true;
      }
    return false;
  }

  void work(int32_t index) {
    auto last = std::chrono::steady_clock::now();
    for (;;) {
      bool worked = false;
      for (int i = 0; i < 64 && !worked; ++i) {
        if (index < width.load(std::memory_order_relaxed))
          while (claim_one()) worked = true;
        pause_briefly();
      }
      const auto now = std::chrono::steady_clock::now();
      if (worked) last = now;
      if (now - last < LINGER) {
        std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(door);
      asleep.fetch_add(1);
      // A bell missed between the last look and this wait costs speed once, never a result.
      if (open.load() == 0 || index >= width.load()) bell.wait(lock);
      asleep.fetch_sub(1);
      lock.unlock();
      last = std::chrono::steady_clock::now();
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
    grow(helpers);
    task = job;
    context = argument;
    done.store(0, std::memory_order_relaxed);
    width.store(helpers, std::memory_order_relaxed);
    open.store(chunks);
    if (asleep.load() > 0) bell.notify_all();
    while (claim_one()) {
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < chunks; ++spins) {
      pause_briefly();
      if (spins > 1000) std::this_thread::yield();  // a claimed chunk is running on a core that somebody else took
    }
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
