// The fiber scheduler behind host.h: barriers, warp rendezvous, launches. Never sanitized (it is machinery, not code
// under test), but compiled with the same KVLAR_SIMT_ASAN / KVLAR_SIMT_TSAN as the kernels.
#include "simt/ptx_host.h"

#include <sys/mman.h>
#include <atomic>
#include <cstdarg>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>
#ifdef KVLAR_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef KVLAR_SIMT_TSAN
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>
#endif
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if !defined(__x86_64__)
#error "the kernel emulation switches stacks by hand and knows x86-64 only"
#endif
// Saves the callee-saved registers on the old stack and loads them from the new one.
extern "C" void kvlar_simt_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.globl kvlar_simt_switch
.type kvlar_simt_switch,@function
kvlar_simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size kvlar_simt_switch,.-kvlar_simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace simt {
__thread Lane* cur SIMT_TLS;
__thread Block blk SIMT_TLS;
#ifdef KVLAR_SIMT_TSAN
char fence_obj;
static char done_obj;
#endif

namespace {
#if defined(KVLAR_SIMT_ASAN) || defined(KVLAR_SIMT_TSAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;
constexpr unsigned kMaxThreads = 1024, kBarriers = 16;
constexpr uint64_t kMaxYields = 20'000'000;
constexpr unsigned kMaxShared = 227 * 1024;

struct Fiber : Lane {
  void* sp = nullptr;
  unsigned char* stack = nullptr;  // lowest usable byte
  bool done = false;
  const char* wait = nullptr;  // what it waits for (for reports)
  const char* op = nullptr;
  unsigned mask = 0;
  int arg = 0;
  void* fake = nullptr;  // ASan
  void* tsan = nullptr;  // TSan
  ptx::CopyQueue* copies = nullptr;
};
struct Warp {
  unsigned arrived = 0;
  char sync[2];
};
struct Barrier {
  unsigned count = 0, phase = 0, waiters = 0;
  int expect = 0, any = 0, all = 1, ones = 0;
  int result[2][3] = {};
  char sync[2];
  Fiber* waiting[kMaxThreads];  // no heap: TSan would see it
};
struct Worker {  // all that one OS thread needs to run blocks
  unsigned char* pool = nullptr;
  size_t pool_bytes = 0;
  std::unique_ptr<Fiber[]> fibers;
  std::unique_ptr<ptx::CopyQueue[]> copies;
  unsigned fiber_count = 0;
  Warp warps[32];
  Barrier bars[kBarriers];
  Fiber* ready[kMaxThreads];
  unsigned head = 0, ready_count = 0, n = 0, done_count = 0;
  Fiber main_context;
  bool failed = false;
  uint64_t rng = 0, yields = 0;
  bool skew = false;
  unsigned favourite = 0;
  const KernelDesc* kernel = nullptr;
  const void* params = nullptr;
  std::string error;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  void drop_stacks() {
    if (pool) munmap(pool, pool_bytes);
    pool = nullptr;
    pool_bytes = 0;
  }
  ~Worker() { drop_stacks(); }
};
__thread Worker* w SIMT_TLS;

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
uint32_t random_bits() {
  w->rng = w->rng * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(w->rng >> 33);
}

void push(Fiber* f) {
  f->wait = nullptr;
  w->ready[(w->head + w->ready_count++) & (kMaxThreads - 1)] = f;
}
// Seed 0: first come, first served. Odd seeds: any ready thread. Even seeds: a favourite warp runs ahead of the
// others for a while, which finds buffers that are reused too early.
Fiber* pop() {
  if (w->rng) {
    unsigned at = random_bits() % w->ready_count;
    if (w->skew) {
      if (!(random_bits() & 1023)) w->favourite = random_bits() % ((w->n + 31) / 32);
      for (int i = 0; i < 12 && w->ready[(w->head + at) & (kMaxThreads - 1)]->warp != w->favourite; ++i) at = random_bits() % w->ready_count;
    }
    std::swap(w->ready[w->head], w->ready[(w->head + at) & (kMaxThreads - 1)]);
  }
  Fiber* f = w->ready[w->head];
  w->head = (w->head + 1) & (kMaxThreads - 1);
  w->ready_count--;
  return f;
}

// Switches from `from` to `to`; either may be the scheduler's own context.
void go(Fiber* from, Fiber* to, [[maybe_unused]] bool from_ends = false) {
  if (from == to) return;
  cur = to;
#ifdef KVLAR_SIMT_ASAN
  const bool to_main = to == &w->main_context;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from->fake, to_main ? w->main_bottom : to->stack, to_main ? w->main_size : kStack);
#endif
#ifdef KVLAR_SIMT_TSAN
  __tsan_switch_to_fiber(to->tsan, 1 /* no synchronization */);
#endif
  kvlar_simt_switch(&from->sp, to->sp);
#ifdef KVLAR_SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
void suspend(const char* why) {  // gives way until someone pushes us
  Fiber* me = static_cast<Fiber*>(cur);
  me->wait = why;
  go(me, w->ready_count ? pop() : &w->main_context);
}
void requeue() {  // any ready thread may go next
  Fiber* me = static_cast<Fiber*>(cur);
  push(me);
  go(me, pop());
}
void fiber_main() {
#ifdef KVLAR_SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!w->main_bottom) {  // the first one comes from the scheduler
    w->main_bottom = bottom;
    w->main_size = size;
  }
#endif
  w->kernel->entry(w->params);
  Fiber* me = static_cast<Fiber*>(cur);
  if (me->copies->n) fail("thread ended with %d cp.async copies never waited for", me->copies->n);
#ifdef KVLAR_SIMT_TSAN
  __tsan_release(&done_obj);
#endif
  me->done = true;
  w->done_count++;
  go(me, w->ready_count ? pop() : &w->main_context, true);
  __builtin_unreachable();
}

std::string where(const Fiber* f) {
  char b[160];
  snprintf(b, sizeof b, "block (%u,%u,%u) thread (%u,%u,%u)", blk.bid.x, blk.bid.y, blk.bid.z, f->tid.x, f->tid.y, f->tid.z);
  return b;
}
void report_deadlock() {
  unsigned shown = 0;
  std::string text = std::string(w->kernel->name) + ": deadlock (divergent barrier or warp collective):";
  std::vector<std::string> seen;
  for (unsigned i = 0; i < w->n && shown < 4; ++i) {
    const Fiber& f = w->fibers[i];
    if (f.done || !f.wait) continue;
    bool first = true;
    for (const std::string& s : seen) first = first && s != f.wait;
    if (!first) continue;
    unsigned same = 0;
    for (unsigned j = i; j < w->n; ++j) same += !w->fibers[j].done && w->fibers[j].wait && !strcmp(w->fibers[j].wait, f.wait);
    text += "\n  " + std::to_string(same) + " thread(s) wait in " + f.wait + ", first: " + where(&f);
    seen.push_back(f.wait);
    shown++;
  }
  text += "\n  " + std::to_string(w->done_count) + " of " + std::to_string(w->n) + " threads have returned";
  w->error = text;
  w->failed = true;
}

void prepare_stacks(Worker& worker) {
  const size_t need = size_t(worker.n) * (kStack + kGuard);
  if (worker.pool_bytes >= need) return;
  worker.drop_stacks();
  void* p = mmap(nullptr, need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("kernel emulation: no memory for the stacks of a block");
    abort();
  }
  worker.pool = static_cast<unsigned char*>(p);
  worker.pool_bytes = need;
  for (unsigned i = 0; i < worker.n; ++i) mprotect(worker.pool + i * (kStack + kGuard), kGuard, PROT_NONE);
}

void start_fiber(Worker& worker, unsigned i, const Block& b) {
  Fiber& f = worker.fibers[i];
  f.tid = make_uint3(i % b.bdim.x, i / b.bdim.x % b.bdim.y, i / (b.bdim.x * b.bdim.y));
  f.lane = i & 31;
  f.warp = i >> 5;
  f.done = false;
  f.wait = nullptr;
  f.fake = nullptr;
  f.copies = &worker.copies[i];
  f.copies->n = f.copies->committed = 0;
  f.stack = worker.pool + i * (kStack + kGuard) + kGuard;
  void** sp = reinterpret_cast<void**>(f.stack + kStack - 64 - (i % 31) * 128);  // staggered: else all tops share one cache set
  *--sp = nullptr;  // return address of fiber_main: keeps the stack aligned
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int r = 0; r < 6; ++r) *--sp = nullptr;
  f.sp = sp;
#ifdef KVLAR_SIMT_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
  push(&f);
}

bool run_block(Worker& worker, const KernelDesc* kernel, const Block& b, const void* params, uint64_t seed) {
  w = &worker;
  blk = b;
  worker.n = b.bdim.x * b.bdim.y * b.bdim.z;
  worker.done_count = worker.head = worker.ready_count = 0;
  worker.failed = false;
  worker.yields = 0;
  worker.kernel = kernel;
  worker.params = params;
  const uint64_t linear = (uint64_t(b.bid.z) * b.gdim.y + b.bid.y) * b.gdim.x + b.bid.x;
  worker.rng = seed ? mix(seed * 0x10001 + linear) | 1 : 0;
  worker.skew = seed && seed % 2 == 0;
  worker.favourite = unsigned(worker.rng >> 40) % ((worker.n + 31) / 32);
  prepare_stacks(worker);
  if (worker.fiber_count < worker.n) {
    worker.fibers.reset(new Fiber[worker.n]);
    worker.copies.reset(new ptx::CopyQueue[worker.n]);
    worker.fiber_count = worker.n;
  }
  for (auto& x : worker.warps) x = Warp();
  for (auto& x : worker.bars) {
    x.count = x.phase = x.waiters = 0;
    x.any = x.ones = 0;
    x.all = 1;
  }
#ifdef KVLAR_SIMT_TSAN
  worker.main_context.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < worker.n; ++i) start_fiber(worker, i, b);
  worker.main_bottom = nullptr;
  cur = &worker.main_context;
  go(&worker.main_context, pop());
  // Back here: all are done, an error, or nobody can run.
  if (!worker.failed && worker.done_count != worker.n) report_deadlock();
#ifdef KVLAR_SIMT_ASAN
  if (worker.failed) __asan_unpoison_memory_region(worker.pool, worker.pool_bytes);
#endif
#ifdef KVLAR_SIMT_TSAN
  for (unsigned i = 0; i < worker.n; ++i) __tsan_destroy_fiber(worker.fibers[i].tsan);
  worker.drop_stacks();
#endif
  return !worker.failed;
}
thread_local std::string last_error;
#if defined(KVLAR_SIMT_ASAN) || defined(KVLAR_SIMT_TSAN)
std::mutex serial_lock;
#endif
#ifndef KVLAR_SIMT_TSAN
std::mutex pool_lock;
std::vector<std::unique_ptr<Worker>> idle;  // stacks are kept between launches
std::unique_ptr<Worker> take() {
  std::lock_guard<std::mutex> guard(pool_lock);
  if (idle.empty()) return std::unique_ptr<Worker>(new Worker);
  auto p = std::move(idle.back());
  idle.pop_back();
  return p;
}
void put_back(std::unique_ptr<Worker> p) {
  std::lock_guard<std::mutex> guard(pool_lock);
  idle.push_back(std::move(p));
}
#endif
}  // namespace

// ---- primitives
void fail(const char* format, ...) {
  char b[512];
  va_list ap;
  va_start(ap, format);
  vsnprintf(b, sizeof b, format, ap);
  va_end(ap);
  Fiber* me = static_cast<Fiber*>(cur);
  w->error = std::string(w->kernel->name) + ": " + b + " at " + where(me);
  w->failed = true;
  for (;;) go(me, &w->main_context);  // never resumed
}
void yield() {
  if (++w->yields > kMaxYields) fail("spin loop made no progress (waits for another block?)");
  requeue();
}
void maybe_yield() {
  if (w->rng && !(random_bits() & 3)) yield();
}
bool coin() { return w->rng && (random_bits() & 1); }

void warp_collective(unsigned mask, const char* op, Completion fn, int arg) {
  Fiber* me = static_cast<Fiber*>(cur);
  Fiber* base = &w->fibers[me->warp * 32];
  Warp& warp = w->warps[me->warp];
  if (!(mask >> me->lane & 1)) fail("%s: lane %u is not in its own mask 0x%08x", op, me->lane, mask);
  me->mask = mask;
  me->op = op;
  me->arg = arg;
  warp.arrived |= 1u << me->lane;
  if ((warp.arrived & mask) != mask) {
    suspend(op);
    return;
  }
  Lane* lanes[32];
  for (int l = 0; l < 32; ++l) {
    Fiber* f = base + l;
    lanes[l] = f;
    if (!(mask >> l & 1)) continue;
    if (f->mask != mask || f->arg != arg || (f->op != op && strcmp(f->op, op)))
      fail("warp divergence: lane %d is in %s (mask 0x%08x) while lane %u is in %s (mask 0x%08x)", l, f->op, f->mask, me->lane, op, mask);
  }
  fn(lanes, mask, arg);
  warp.arrived &= ~mask;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && base + l != me) push(base + l);
  if (w->rng) requeue();
}
void warp_barrier(unsigned mask) {
#ifdef KVLAR_SIMT_TSAN
  Warp& warp = w->warps[cur->warp];
  __tsan_release(&warp.sync[0]);
  warp_collective(mask, "__syncwarp", c_nop, 0);
  __tsan_acquire(&warp.sync[0]);
#else
  warp_collective(mask, "__syncwarp", c_nop, 0);
#endif
}

static Barrier& barrier_arrive(int id, int n, int pred, bool wait, unsigned* phase) {
  if (id < 0 || id >= int(kBarriers)) fail("barrier id %d out of range", id);
  if (n >= 0 && (n == 0 || n % 32 || n > int(w->n))) fail("bar %d, %d: bad thread count", id, n);
  Barrier& b = w->bars[id];
  const int expect = n < 0 ? int(w->n) : n;
  if (b.count && b.expect != expect) fail("bar %d: threads disagree on the count (%d, %d)", id, b.expect, expect);
  b.expect = expect;
  *phase = b.phase;
  b.any |= pred != 0;
  b.all &= pred != 0;
  b.ones += pred != 0;
#ifdef KVLAR_SIMT_TSAN
  __tsan_release(&b.sync[b.phase & 1]);
#endif
  if (int(++b.count) < expect) {
    if (!wait) return b;
    b.waiting[b.waiters++] = static_cast<Fiber*>(cur);
    suspend(id ? "bar.sync" : "__syncthreads");
  } else {
    int* r = b.result[b.phase & 1];
    r[0] = b.ones;
    r[1] = b.all;
    r[2] = b.any;
    for (unsigned i = 0; i < b.waiters; ++i) push(b.waiting[i]);
    b.phase++;
    b.count = b.waiters = 0;
    b.any = b.ones = 0;
    b.all = 1;
    if (w->rng) requeue();
    if (!wait) return b;
  }
#ifdef KVLAR_SIMT_TSAN
  __tsan_acquire(&b.sync[*phase & 1]);
#endif
  return b;
}
void block_barrier(int id, int n, bool wait) {
  unsigned phase;
  barrier_arrive(id, n, 0, wait, &phase);
}
int block_barrier_reduce(int kind, int pred) {
  unsigned phase;
  Barrier& b = barrier_arrive(0, -1, pred, true, &phase);
  return b.result[phase & 1][kind];
}
}  // namespace simt

#ifdef KVLAR_SIMT_TSAN
// Counts only reports raised while a CUDA thread runs: Rust's std is not instrumented, so TSan may misjudge it (run
// with TSAN_OPTIONS=exitcode=0; the launch itself returns the error).
static std::atomic<unsigned> kernel_races{0};
extern "C" void __tsan_on_report(void*) {
  if (simt::w && simt::cur && simt::cur != &simt::w->main_context) kernel_races++;
}
extern "C" __attribute__((visibility("hidden"), alias("__tsan_on_report"))) void kvlar_simt_on_report(void*);
// The detector calls the first function of that name in the process, which is its own if it was loaded before us.
static bool hears_of_races() { return dlsym(RTLD_DEFAULT, "__tsan_on_report") == reinterpret_cast<void*>(&kvlar_simt_on_report); }
#endif

namespace ptx {
CopyQueue& copy_queue() { return *static_cast<simt::Fiber*>(simt::cur)->copies; }
}  // namespace ptx

// ---- launch
extern "C" const char* kvlar_simt_last_error() { return simt::last_error.c_str(); }

extern "C" int kvlar_simt_launch(const simt::KernelDesc* kernel, const unsigned g[3], const unsigned b[3], unsigned shared_bytes,
                                 const void* params, unsigned params_bytes, uint64_t seed, unsigned workers) {
  using namespace simt;
  const auto bad = [&](const std::string& m) {
    last_error = std::string(kernel->name) + ": " + m;
    return 1;
  };
  const uint64_t threads = uint64_t(b[0]) * b[1] * b[2], blocks = uint64_t(g[0]) * g[1] * g[2];
  if (!threads || threads > kMaxThreads || b[2] > 64) return bad("bad block size");
  if (!blocks || g[0] > 2147483647u || g[1] > 65535 || g[2] > 65535) return bad("bad grid size");
  if (shared_bytes > kMaxShared) return bad("more than 227 KiB of dynamic shared memory");
#ifdef KVLAR_SIMT_TSAN
  if (!hears_of_races()) return bad("races would go unnoticed: this library must be loaded before libtsan");
#endif
  const unsigned fixed = kernel->fixed_shared_bytes, dynamic_at = (fixed + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const unsigned all_shared_bytes = shared_bytes ? dynamic_at + shared_bytes : fixed;
  if (params_bytes != kernel->params_bytes)
    return bad("takes " + std::to_string(kernel->params_bytes) + " bytes of parameters, got " + std::to_string(params_bytes));

  static std::atomic<unsigned> launches{0};
  const unsigned launch = ++launches;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex error_lock;
  std::string error;
  std::vector<void*> shared_blocks;    // TSan: freed only after the launch
  uint64_t stride = 1, offset = 0;     // seeded order of blocks: i -> i * stride + offset (mod blocks)
  if (seed && blocks > 1) {
    offset = mix(seed) % blocks;
    stride = 1 + mix(seed + 1) % (blocks - 1);
    const auto gcd = [](uint64_t x, uint64_t y) {
      while (y) {
        const uint64_t t = x % y;
        x = y;
        y = t;
      }
      return x;
    };
    while (gcd(stride, blocks) != 1) stride++;
  }
  const auto run_one = [&](Worker& worker, uint64_t i) {
    const uint64_t at = (i * stride + offset) % blocks;
    Block block{make_uint3(unsigned(at % g[0]), unsigned(at / g[0] % g[1]), unsigned(at / (uint64_t(g[0]) * g[1]))),
                make_uint3(b[0], b[1], b[2]), make_uint3(g[0], g[1], g[2]), nullptr, nullptr, all_shared_bytes, launch};
    // Exact size and fresh for each block (red zones); 0xFF bytes are NaN in every float format, -1 in integers.
    if (all_shared_bytes) {
      if (posix_memalign(reinterpret_cast<void**>(&block.shared), kSharedAlignment, all_shared_bytes)) abort();
      memset(block.shared, 0xFF, all_shared_bytes);
      block.dyn = block.shared + dynamic_at;
    }
    const bool ok = run_block(worker, kernel, block, params, seed);
#ifdef KVLAR_SIMT_TSAN
    if (block.shared) shared_blocks.push_back(block.shared);
#else
    free(block.shared);
#endif
    if (!ok) {
      std::lock_guard<std::mutex> guard(error_lock);
      if (error.empty()) error = worker.error;
      stop = true;
    }
  };
#ifdef KVLAR_SIMT_TSAN  // a fresh OS thread and fresh stacks a block: no shadow left over, no order between blocks
  std::lock_guard<std::mutex> serial(serial_lock);
  std::vector<std::unique_ptr<Worker>> used;  // lanes' memory is not reused before the launch ends
  for (uint64_t i = 0; i < blocks && !stop; ++i) {
    used.emplace_back(new Worker);
    Worker* worker = used.back().get();
    std::thread t([&, worker] {
      run_one(*worker, i);
      w = nullptr;
    });
    t.join();
  }
  __tsan_acquire(&done_obj);
  if (kernel_races.exchange(0) && error.empty())
    error = std::string(kernel->name) + ": data race between CUDA threads (see the ThreadSanitizer report on stderr)";
  for (void* p : shared_blocks) free(p);
  (void)workers;
  (void)next;
#else
  const auto loop = [&] {
    auto worker = take();
    for (uint64_t i; !stop && (i = next++) < blocks;) run_one(*worker, i);
    w = nullptr;
    put_back(std::move(worker));
  };
#ifdef KVLAR_SIMT_ASAN
  std::lock_guard<std::mutex> serial(serial_lock);
  workers = 1;
#endif
  if (!workers) workers = std::max(1u, std::thread::hardware_concurrency());
  if (workers > blocks) workers = unsigned(blocks);
  std::vector<std::thread> others;
  for (unsigned t = 1; t < workers; ++t) others.emplace_back(loop);
  loop();
  for (auto& t : others) t.join();
#endif
  if (!error.empty()) {
    last_error = error;
    return 1;
  }
  return 0;
}
