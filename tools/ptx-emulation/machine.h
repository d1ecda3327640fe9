// The instructions that nvcc makes of our kernels, on the runtime of their emulation: an instruction is a function of its name, and
// the types in its name are the function's template parameters. One that is not here does not compile.
// What each does is from "PTX ISA" 9.0, section 9.7; NaNs that arithmetic makes are 0x7fffffff, as there.
#pragma once
#include "simt/ptx_host.h"

#include <sys/mman.h>
#ifdef KVLAR_ACCESSES
#include "accesses.h"
#endif

// Called, not inlined: most of their thousands of places are alike, and compilers take long enough.
#define PTX_FN __attribute__((noinline))
#define PTX_CALLED static __attribute__((noinline, unused))
#ifdef KVLAR_STALLS
#include "stalls.h"
#endif
#define PTX_OP template <class T, class D, class A> PTX_FN void
#define PTX_OP2 template <class T, class D, class A, class B> PTX_FN void
#define PTX_OP3 template <class T, class D, class A, class B, class C> PTX_FN void

namespace machine {
using b8 = uint8_t; using b16 = uint16_t; using b32 = uint32_t; using b64 = uint64_t;
using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using f32 = float; using f64 = double; using pred = bool;
struct f16; struct bf16; struct f16x2; struct bf16x2; struct e4m3x2;  // names of types, in conversions and products

// ---- operands
struct Sink {};                    // `_`: what is not wanted
struct Number { int64_t value; };  // an immediate; also the address of a variable

// A register's bits as a T: as many, or the lower ones of a wider register.
template <class T, class R> SIMT_INLINE T as(R r) {
  static_assert(sizeof(T) <= sizeof(R) && std::is_same<T, bool>::value == std::is_same<R, bool>::value, "a register of another size");
  T t;
  std::memcpy(&t, &r, sizeof t);
  return t;
}
template <class T> SIMT_INLINE T as(Number n) { return T(n.value); }
// Likewise written; a wider register gets the value extended by its sign, or by zeros.
template <class T, class D> SIMT_INLINE void set(D& d, T v) {
  constexpr bool wanted = !std::is_same<D, Sink>::value;
  static_assert(!wanted || (sizeof(T) <= sizeof(D) && std::is_same<T, bool>::value == std::is_same<D, bool>::value), "a register of another size");
  if constexpr (wanted && sizeof(T) == sizeof(D)) {
    std::memcpy(&d, &v, sizeof d);
  } else if constexpr (wanted) {
    static_assert(std::is_integral<T>::value && std::is_integral<D>::value, "bits have no sign to extend");
    d = D(typename std::conditional<std::is_signed<T>::value, int64_t, uint64_t>::type(v));
  }
}
SIMT_INLINE float float_of(uint32_t bits) { return simt::bits<float>(bits); }
SIMT_INLINE double double_of(uint64_t bits) { return simt::bits<double>(bits); }
SIMT_INLINE uint32_t bits_of(float x) { return simt::bits<uint32_t>(x); }

SIMT_INLINE float rounded(float x) { return x == x ? x : float_of(0x7fffffffu); }
template <class T> SIMT_INLINE T canonical(T x) {
  if constexpr (std::is_same<T, float>::value) return rounded(x);
  else return x;
}

// ---- special registers
SIMT_INLINE uint32_t tid_x() { return simt::cur->tid.x; }
SIMT_INLINE uint32_t tid_y() { return simt::cur->tid.y; }
SIMT_INLINE uint32_t tid_z() { return simt::cur->tid.z; }
SIMT_INLINE uint32_t ntid_x() { return simt::blk.bdim.x; }
SIMT_INLINE uint32_t ntid_y() { return simt::blk.bdim.y; }
SIMT_INLINE uint32_t ntid_z() { return simt::blk.bdim.z; }
SIMT_INLINE uint32_t ctaid_x() { return simt::blk.bid.x; }
SIMT_INLINE uint32_t ctaid_y() { return simt::blk.bid.y; }
SIMT_INLINE uint32_t ctaid_z() { return simt::blk.bid.z; }
SIMT_INLINE uint32_t nctaid_x() { return simt::blk.gdim.x; }
SIMT_INLINE uint32_t nctaid_y() { return simt::blk.gdim.y; }
SIMT_INLINE uint32_t nctaid_z() { return simt::blk.gdim.z; }
SIMT_INLINE uint32_t laneid() { return simt::cur->lane; }

// ---- memory. Shared memory is a window of 32-bit addresses; all others are the host's own.
SIMT_INLINE uint32_t cta() { return (simt::blk.bid.z * simt::blk.gdim.y + simt::blk.bid.y) * simt::blk.gdim.x + simt::blk.bid.x; }
#ifdef KVLAR_ACCESSES
SIMT_INLINE void count_shared(uint64_t address, unsigned bytes) { access(Space::kShared, address, bytes, cta()); }
SIMT_INLINE void count_global(uint64_t address, unsigned bytes) { access(Space::kGlobal, address, bytes, cta()); }
#else
SIMT_INLINE void count_shared(uint64_t, unsigned) {}
SIMT_INLINE void count_global(uint64_t, unsigned) {}
#endif
constexpr uint64_t kSharedStart = 1024;  // the system's own lies before it; so null is nothing of ours

PTX_CALLED unsigned char* shared(uint64_t address, unsigned bytes, unsigned alignment) {
  if (address < kSharedStart || address + bytes > kSharedStart + uint64_t(simt::blk.shared_bytes))
    simt::fail("%u bytes of shared memory at %lld of %u", bytes, (long long)(address - kSharedStart), simt::blk.shared_bytes);
  if (bytes) count_shared(address, bytes);
  if (address % alignment) simt::fail("misaligned address of shared memory: %u bytes at %llu", bytes, (unsigned long long)(address - kSharedStart));
  return simt::blk.shared + (address - kSharedStart);
}
PTX_CALLED void misaligned(uint64_t address, unsigned alignment) {
  simt::fail("misaligned address: %u bytes at %#llx", alignment, (unsigned long long)address);
}
SIMT_INLINE unsigned char* elsewhere(uint64_t address, unsigned alignment) {
  count_global(address, alignment);
  if (address % alignment) misaligned(address, alignment);
  return reinterpret_cast<unsigned char*>(address);
}
template <class T, class... D> SIMT_INLINE void load(const unsigned char* from, D&&... d) {
  const T* p = reinterpret_cast<const T*>(from);
  (set<T>(d, *p++), ...);
}
template <class T, class... V> SIMT_INLINE void store(unsigned char* to, V... v) {
  T* p = reinterpret_cast<T*>(to);
  ((*p++ = as<T>(v)), ...);
}

// A GPU's caches do not follow what is written elsewhere. Read-only loads may be answered by one that no write of the same launch
// reaches, and nvcc makes them of what it takes to be constant. Plain loads may be answered by the SM's own, which writes of other
// CTAs do not reach: after a fence they are right, but our rule is to read past it (device/ptx.cuh, arrive_last). So it is remembered
// who was the last to write a word, found by the lower bits of its address.
struct Writer { uint32_t launch, cta; };
constexpr uint64_t kAddresses = 1ull << 38;
inline Writer* remembered() {
  void* p = mmap(nullptr, kAddresses / 4 * sizeof(Writer), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("kernel emulation: no addresses for what is written");
    abort();
  }
  return static_cast<Writer*>(p);
}
inline Writer* const kWriters = remembered();
SIMT_INLINE Writer& writer(uint64_t address) { return kWriters[address % kAddresses / 4]; }
PTX_CALLED uint64_t written(uint64_t address, unsigned bytes) {
  for (uint64_t a = address; a < address + bytes; a += 4) writer(a) = {simt::blk.launch, cta()};
  return address;
}
PTX_CALLED uint64_t read_only(uint64_t address, unsigned bytes) {
  for (uint64_t a = address; a < address + bytes; a += 4)
    if (writer(a).launch == simt::blk.launch) simt::fail("ld.global.nc of what the launch itself has written, at %#llx", (unsigned long long)a);
  return address;
}
SIMT_INLINE uint64_t newest(uint64_t address, unsigned) { return address; }
PTX_CALLED uint64_t cached(uint64_t address, unsigned bytes) {
  for (uint64_t a = address; a < address + bytes; a += 4)
    if (writer(a).launch == simt::blk.launch && writer(a).cta != cta())
      simt::fail("a load by L1 of what another CTA of the launch has written, at %#llx", (unsigned long long)a);
  return address;
}

#define PTX_LOAD(name, checked)                                                      \
  template <class T, class... D> PTX_FN void name(uint64_t a, D&&... d) {            \
    constexpr unsigned bytes = sizeof(T) * sizeof...(D);                             \
    load<T>(elsewhere(checked(a, bytes), bytes), d...);                              \
  }
#define PTX_STORE(name)                                                              \
  template <class T, class... V> PTX_FN void name(uint64_t a, V... v) {              \
    constexpr unsigned bytes = sizeof(T) * sizeof...(V);                             \
    store<T>(elsewhere(written(a, bytes), bytes), v...);                             \
  }
PTX_LOAD(ld, cached)
PTX_LOAD(ld_param, newest)
PTX_LOAD(ld_global, cached)
PTX_LOAD(ld_global_nc, read_only)
PTX_LOAD(ld_global_cg, newest)
PTX_LOAD(ld_global_cs, cached)
PTX_STORE(st)
PTX_STORE(st_global)
PTX_STORE(st_global_cg)
PTX_STORE(st_global_cs)
#undef PTX_LOAD
#undef PTX_STORE
template <class T, class... D> PTX_FN void ld_shared(uint64_t a, D&&... d) {
  const unsigned bytes = sizeof(T) * sizeof...(D);
  load<T>(shared(a, bytes, bytes), d...);
}
template <class T, class... V> PTX_FN void st_shared(uint64_t a, V... v) {
  const unsigned bytes = sizeof(T) * sizeof...(V);
  store<T>(shared(a, bytes, bytes), v...);
}
PTX_OP cvta_to_global(D& d, A a) { set<T>(d, as<T>(a)); }
PTX_OP cvta_shared(D& d, A a) { set<T>(d, T(reinterpret_cast<uintptr_t>(shared(as<T>(a), 0, 1)))); }
PTX_OP cvta_to_shared(D& d, A a) { set<T>(d, T(as<T>(a) - reinterpret_cast<uintptr_t>(simt::blk.shared) + kSharedStart)); }

#define PTX_ATOM(name, place, f)                                                                            \
  template <class T, class D, class A> PTX_FN void name(uint64_t address, D&& d, A a) {                \
    const T y = as<T>(a);                                                                                   \
    set<T>(d, simt::rmw(reinterpret_cast<T*>(place), [&](T x) { return T(f); }));                           \
  }
PTX_ATOM(atom_global_add, elsewhere(written(address, sizeof(T)), sizeof(T)), x + y)
PTX_ATOM(atom_global_or, elsewhere(written(address, sizeof(T)), sizeof(T)), x | y)
PTX_ATOM(atom_global_max, elsewhere(written(address, sizeof(T)), sizeof(T)), x > y ? x : y)
PTX_ATOM(atom_shared_add, shared(address, sizeof(T), sizeof(T)), x + y)
PTX_ATOM(atom_shared_or, shared(address, sizeof(T), sizeof(T)), x | y)
PTX_ATOM(atom_shared_max, shared(address, sizeof(T), sizeof(T)), x > y ? x : y)
#undef PTX_ATOM
template <class T, class D, class A> PTX_FN void atom_acq_rel_gpu_global_add(uint64_t address, D& d, A a) {
  set<T>(d, ptx::add_acq_rel(reinterpret_cast<T*>(elsewhere(written(address, sizeof(T)), sizeof(T))), as<T>(a)));
}
SIMT_INLINE void membar_gl() { __threadfence(); }
SIMT_INLINE void membar_cta() { __threadfence_block(); }
SIMT_INLINE void fence_mbarrier_init_release_cluster() {}

// ---- asynchronous copies
PTX_CALLED void copy_later(uint64_t to, uint64_t from, int size, int source_bytes) {
  if (source_bytes) count_global(from, unsigned(source_bytes));
  ptx::cp_async({shared(to, unsigned(size), unsigned(size))}, reinterpret_cast<const void*>(from), source_bytes, size);
}
template <class N> PTX_FN void cp_async_cg_shared_global(uint64_t to, uint64_t from, Number bytes, N source_bytes) {
  copy_later(to, from, int(bytes.value), as<s32>(source_bytes));
}
SIMT_INLINE void cp_async_cg_shared_global(uint64_t to, uint64_t from, Number bytes) { cp_async_cg_shared_global(to, from, bytes, bytes); }
SIMT_INLINE void cp_async_cg_shared_global_L2_128B(uint64_t to, uint64_t from, Number bytes) { cp_async_cg_shared_global(to, from, bytes); }
template <class N> PTX_FN void cp_async_ca_shared_global(uint64_t to, uint64_t from, Number bytes, N source_bytes) {
  copy_later(to, cached(from, as<u32>(source_bytes)), int(bytes.value), as<s32>(source_bytes));
}
SIMT_INLINE void cp_async_ca_shared_global(uint64_t to, uint64_t from, Number bytes) { cp_async_ca_shared_global(to, from, bytes, bytes); }
SIMT_INLINE void cp_async_commit_group() { ptx::cp_async_commit(); }
PTX_CALLED void cp_async_wait_group(Number newest) { ptx::cp_async_wait_but(int(newest.value)); }

constexpr unsigned kBarrier = 8;  // bytes
template <class T, class N> PTX_FN void mbarrier_init_shared_cta(uint64_t bar, N arrivals) {
  ptx::mbarrier_init({shared(bar, kBarrier, kBarrier)}, as<u32>(arrivals));
}
template <class T, class N> PTX_FN void mbarrier_arrive_expect_tx_shared_cta(uint64_t bar, Sink, N bytes) {
  ptx::mbarrier_arrive_expect({shared(bar, kBarrier, kBarrier)}, as<u32>(bytes));
}
template <class T> PTX_FN void mbarrier_arrive_shared_cta(uint64_t bar, Sink) { ptx::mbarrier_arrive({shared(bar, kBarrier, kBarrier)}); }
template <class T, class P> PTX_FN void mbarrier_try_wait_parity_shared_cta(uint64_t bar, bool& passed, P parity) {
  simt::yield();  // whatever comes of it: what is done in a loop must let others go on
  passed = ptx::mbarrier_try_wait({shared(bar, kBarrier, kBarrier)}, as<u32>(parity));
}
template <class N>
SIMT_INLINE void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(uint64_t to, uint64_t from, uint64_t bar, N n) {
  const u32 bytes = as<u32>(n);
  ptx::bulk_copy({shared(to, bytes, 16)}, reinterpret_cast<const void*>(from), bytes, {shared(bar, kBarrier, kBarrier)});
}

// ---- moves
PTX_OP mov(D& d, A a) { set<T>(d, as<T>(a)); }
template <class D, class A, class B> PTX_FN void pack(D& d, A low, B high) {
  static_assert(sizeof(D) == sizeof(A) + sizeof(B), "halves");
  std::memcpy(&d, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&d) + sizeof low, &high, sizeof high);
}
template <class A, class B, class S> PTX_FN void unpack(A& low, B& high, S s) {
  static_assert(sizeof(S) == sizeof(A) + sizeof(B), "halves");
  std::memcpy(&low, &s, sizeof low);
  std::memcpy(&high, reinterpret_cast<char*>(&s) + sizeof low, sizeof high);
}
PTX_OP3 selp(D& d, A a, B b, C c) { set<T>(d, c ? as<T>(a) : as<T>(b)); }

// ---- integers
template <class T> using Unsigned = typename std::make_unsigned<T>::type;
template <class T> constexpr int kBits = 8 * sizeof(T);
template <class T> constexpr bool kFloat = std::is_floating_point<T>::value;
#define PTX_BITS(name, f)                                       \
  PTX_OP2 name(D& d, A a, B b) {                                \
    const T x = as<T>(a), y = as<T>(b);                         \
    set<T>(d, T(f));                                            \
  }
PTX_BITS(and_, x & y)
PTX_BITS(or_, x | y)
PTX_BITS(xor_, x ^ y)
#undef PTX_BITS
PTX_OP not_(D& d, A a) {
  if constexpr (std::is_same<T, bool>::value) d = !a;
  else set<T>(d, T(~as<T>(a)));
}
// Shifts by more than there are bits leave nothing but the sign.
PTX_OP2 shl(D& d, A a, B b) {
  const u32 n = as<u32>(b);
  set<T>(d, n < u32(kBits<T>) ? T(as<T>(a) << n) : T(0));
}
PTX_OP2 shr(D& d, A a, B b) {
  const u32 n = as<u32>(b);
  const T x = as<T>(a);
  set<T>(d, n < u32(kBits<T>) ? T(x >> n) : T(x < 0 ? -1 : 0));
}
PTX_OP3 shf_l_wrap(D& d, A low, B high, C n) { set<T>(d, __funnelshift_l(as<T>(low), as<T>(high), as<u32>(n))); }
PTX_OP3 shf_r_wrap(D& d, A low, B high, C n) { set<T>(d, __funnelshift_r(as<T>(low), as<T>(high), as<u32>(n))); }
template <class T, class D, class A, class B, class P, class N> PTX_FN void bfi(D& d, A field, B into, P at, N length) {
  const u32 from = as<u32>(at) & 255, bits = as<u32>(length) & 255;
  const T ones = bits >= u32(kBits<T>) ? T(~T(0)) : T((T(1) << bits) - 1);
  const T mask = from >= u32(kBits<T>) ? T(0) : T(ones << from), x = from >= u32(kBits<T>) ? T(0) : T(as<T>(field) << from);
  set<T>(d, T((as<T>(into) & ~mask) | (x & mask)));
}
PTX_OP clz(D& d, A a) { set<u32>(d, u32(__clz(as<T>(a)))); }
PTX_OP popc(D& d, A a) { set<u32>(d, u32(sizeof(T) == 8 ? __popcll(as<T>(a)) : __popc(unsigned(as<T>(a))))); }
PTX_OP brev(D& d, A a) { set<T>(d, __brev(as<T>(a))); }
// How far left the most significant one has to go; all ones where there is none.
PTX_OP bfind_shiftamt(D& d, A a) { const T x = as<T>(a); set<u32>(d, x ? u32(__clz(x)) : 0xffffffffu); }
PTX_CALLED u32 permuted_bytes(u32 a, u32 b, u32 c) { return __byte_perm(a, b, c); }
PTX_OP3 prmt(D& d, A a, B b, C c) { set<T>(d, permuted_bytes(as<T>(a), as<T>(b), as<u32>(c))); }
PTX_CALLED u32 of_table(u32 x, u32 y, u32 z, unsigned table) {
  u32 r = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) r |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  return r;
}
template <class T, class D, class A, class B, class C> PTX_FN void lop3(D& d, A a, B b, C c, Number table) {
  set<T>(d, of_table(as<T>(a), as<T>(b), as<T>(c), unsigned(table.value)));
}
template <class TA, class TB, class D, class A, class B, class C> PTX_FN void dp4a(D& d, A a, B b, C c) {
  static_assert(std::is_same<TA, TB>::value, "bytes of one kind");
  set<TA>(d, TA(__dp4a(as<TA>(a), as<TA>(b), as<TA>(c))));
}
template <class T> using Wide = typename std::conditional<sizeof(T) == 2, typename std::conditional<std::is_signed<T>::value, s32, u32>::type,
                                                          typename std::conditional<std::is_signed<T>::value, s64, u64>::type>::type;
PTX_OP2 mul_lo(D& d, A a, B b) { set<T>(d, T(uint64_t(as<T>(a)) * uint64_t(as<T>(b)))); }
PTX_OP2 mul_wide(D& d, A a, B b) { set<Wide<T>>(d, Wide<T>(as<T>(a)) * Wide<T>(as<T>(b))); }
PTX_OP2 mul_hi(D& d, A a, B b) {
  static_assert(sizeof(T) == 4, "of 32 bits");
  set<T>(d, T((Wide<T>(as<T>(a)) * Wide<T>(as<T>(b))) >> 32));
}
PTX_OP3 mad_lo(D& d, A a, B b, C c) { set<T>(d, T(uint64_t(as<T>(a)) * uint64_t(as<T>(b)) + uint64_t(as<T>(c)))); }
// Compilers divide ahead of the branch that asks for it: by zero it is no error, but what comes of it is nothing to use.
PTX_OP2 div(D& d, A a, B b) {
  const T x = as<T>(a), y = as<T>(b);
  set<T>(d, y == 0 ? T(-1) : std::is_signed<T>::value && y == T(-1) ? T(0 - Unsigned<T>(x)) : T(x / y));
}
PTX_OP2 rem(D& d, A a, B b) {
  const T x = as<T>(a), y = as<T>(b);
  set<T>(d, y == 0 ? T(-1) : std::is_signed<T>::value && y == T(-1) ? T(0) : T(x % y));
}

// ---- integers and floats
#define PTX_ARITHMETIC(name, integers, floats)                                    \
  PTX_OP2 name(D& d, A a, B b) {                                                  \
    const T x = as<T>(a), y = as<T>(b);                                           \
    if constexpr (kFloat<T>) set<T>(d, canonical(T(floats)));                     \
    else set<T>(d, T(integers));                                                  \
  }
PTX_ARITHMETIC(add, Unsigned<T>(x) + Unsigned<T>(y), x + y)
PTX_ARITHMETIC(sub, Unsigned<T>(x) - Unsigned<T>(y), x - y)
#undef PTX_ARITHMETIC
// Of a NaN and a number the number; -0 is below +0.
template <class T> PTX_FN T least(T x, T y) {
  if constexpr (kFloat<T>) {
    if (x != x) return canonical(y);
    if (y != y) return x;
    if (x == y) return std::signbit(x) ? x : y;
  }
  return x < y ? x : y;
}
template <class T> PTX_FN T greatest(T x, T y) {
  if constexpr (kFloat<T>) {
    if (x != x) return canonical(y);
    if (y != y) return x;
    if (x == y) return std::signbit(x) ? y : x;
  }
  return x > y ? x : y;
}
PTX_CALLED f32 least_f32(f32 x, f32 y) { return least(x, y); }
PTX_CALLED f32 greatest_f32(f32 x, f32 y) { return greatest(x, y); }
PTX_OP2 min(D& d, A a, B b) { set<T>(d, least(as<T>(a), as<T>(b))); }
PTX_OP2 max(D& d, A a, B b) { set<T>(d, greatest(as<T>(a), as<T>(b))); }
template <class T> PTX_FN void flip_sign(T& x) {
  if constexpr (std::is_same<T, float>::value) x = float_of(simt::bits<uint32_t>(x) ^ 0x80000000u);
  else if constexpr (kFloat<T>) x = double_of(simt::bits<uint64_t>(x) ^ 0x8000000000000000ull);
  else x = T(0 - Unsigned<T>(x));
}
PTX_OP neg(D& d, A a) { T x = as<T>(a); flip_sign(x); set<T>(d, x); }
PTX_OP abs(D& d, A a) { T x = as<T>(a); if (kFloat<T> ? std::signbit(double(x)) : x < 0) flip_sign(x); set<T>(d, x); }

// ---- floats. Suffixes say how to round: all to nearest even, as the host does.
PTX_OP2 add_rn(D& d, A a, B b) { add<T>(d, a, b); }
PTX_OP2 sub_rn(D& d, A a, B b) { sub<T>(d, a, b); }
PTX_OP2 mul(D& d, A a, B b) { set<T>(d, canonical(as<T>(a) * as<T>(b))); }
PTX_OP2 mul_rn(D& d, A a, B b) {
  if constexpr (std::is_same<T, f16x2>::value) set<b32>(d, ptx::mul_f16x2(as<b32>(a), as<b32>(b)));
  else mul<T>(d, a, b);
}
PTX_OP3 fma_rn(D& d, A a, B b, C c) {
  if constexpr (std::is_same<T, f16x2>::value) set<b32>(d, ptx::fma_f16x2(as<b32>(a), as<b32>(b), as<b32>(c)));
  else set<T>(d, canonical(std::fma(as<T>(a), as<T>(b), as<T>(c))));
}
PTX_OP2 div_rn(D& d, A a, B b) { set<T>(d, canonical(as<T>(a) / as<T>(b))); }
PTX_OP rcp_rn(D& d, A a) { set<T>(d, canonical(T(1) / as<T>(a))); }
PTX_OP sqrt_rn(D& d, A a) { set<T>(d, canonical(std::sqrt(as<T>(a)))); }
PTX_OP ex2_approx_ftz(D& d, A a) { set<T>(d, canonical(ptx::ex2_approx(as<T>(a)))); }
PTX_OP lg2_approx_ftz(D& d, A a) { set<T>(d, canonical(ptx::lg2_approx(as<T>(a)))); }
PTX_OP lg2_approx(D& d, A a) { set<T>(d, canonical(std::log2(as<T>(a)))); }
PTX_OP rcp_approx_ftz(D& d, A a) { set<T>(d, canonical(ptx::rcp_approx(as<T>(a)))); }
PTX_OP tanh_approx(D& d, A a) { set<T>(d, canonical(ptx::tanh_approx(as<T>(a)))); }

// ---- comparisons. Of floats: those with u are true where a NaN is compared, the others false.
#define PTX_SETP(name, f)                                                \
  PTX_OP2 setp_##name(D& d, A a, B b) {                                  \
    const T x = as<T>(a), y = as<T>(b);                                  \
    d = f;                                                               \
  }
PTX_SETP(eq, x == y)
PTX_SETP(ne, kFloat<T> ? x < y || x > y : x != y)
PTX_SETP(lt, x < y)
PTX_SETP(le, x <= y)
PTX_SETP(gt, x > y)
PTX_SETP(ge, x >= y)
PTX_SETP(equ, !(x < y || x > y))
PTX_SETP(neu, !(x == y))
PTX_SETP(ltu, !(x >= y))
PTX_SETP(leu, !(x > y))
PTX_SETP(gtu, !(x <= y))
PTX_SETP(geu, !(x < y))
PTX_SETP(num, x == x && y == y)
PTX_SETP(nan, x != x || y != y)
#undef PTX_SETP

// ---- conversions
template <class To, class From> PTX_FN To clamped(From x) {  // floats to integers: to the nearest there is; NaN is 0, of 64 bits their top
  if (x != x) return sizeof(To) == 8 ? To(1ull << 63) : To(0);
  const double low = std::is_signed<To>::value ? -std::ldexp(1.0, kBits<To> - 1) : 0, beyond = std::ldexp(1.0, kBits<To> - std::is_signed<To>::value);
  if (double(x) < low) return To(low);
  if (double(x) >= beyond) return std::is_signed<To>::value ? To(~(Unsigned<To>(1) << (kBits<To> - 1))) : To(~To(0));
  return To(x);
}
template <class To, class From, class D, class A> PTX_FN void cvt(D& d, A a) {
  if constexpr (std::is_same<From, f16>::value) set<To>(d, canonical(simt::half_to_float(as<b16>(a))));
  else if constexpr (std::is_same<From, bf16>::value) set<To>(d, canonical(simt::bf16_to_float(as<b16>(a))));
  else set<To>(d, To(as<From>(a)));
}
template <class To, class From, class D, class A> PTX_FN void cvt_rn(D& d, A a) {
  if constexpr (std::is_same<From, e4m3x2>::value) {
    const b16 x = as<b16>(a);
    set<b32>(d, simt::float_to_half(simt::e4m3_to_float(u8(x))) | b32(simt::float_to_half(simt::e4m3_to_float(u8(x >> 8)))) << 16);
  } else if constexpr (std::is_same<To, f16>::value) set<b16>(d, as<f32>(a) == as<f32>(a) ? simt::float_to_half(as<f32>(a)) : b16(0x7fff));
  else if constexpr (std::is_same<To, bf16>::value) set<b16>(d, simt::float_to_bf16(as<f32>(a)));
  else set<To>(d, canonical(To(as<From>(a))));
}
template <class To, class From, class D, class A, class B> PTX_FN void cvt_rn(D& d, A high, B low) {
  using Half = typename std::conditional<std::is_same<To, f16x2>::value, f16, bf16>::type;
  b16 h, l;
  cvt_rn<Half, From>(h, high);
  cvt_rn<Half, From>(l, low);
  set<b32>(d, l | b32(h) << 16);
}
template <class To, class From, class D, class A, class B> PTX_FN void cvt_rn_satfinite(D& d, A high, B low) {
  static_assert(std::is_same<To, e4m3x2>::value && std::is_same<From, f32>::value, "two bytes");
  set<b16>(d, b16(simt::float_to_e4m3(as<f32>(low)) | simt::float_to_e4m3(as<f32>(high)) << 8));
}
template <class To, class From, class D, class A> PTX_FN void cvt_rni(D& d, A a) {
  if constexpr (kFloat<To>) set<To>(d, canonical(To(std::nearbyint(as<From>(a)))));
  else set<To>(d, clamped<To>(std::nearbyint(as<From>(a))));
}
template <class To, class From, class D, class A> PTX_FN void cvt_rzi(D& d, A a) {
  if constexpr (kFloat<To>) set<To>(d, canonical(To(std::trunc(as<From>(a)))));
  else set<To>(d, clamped<To>(std::trunc(as<From>(a))));
}
template <class To, class From, class D, class A> PTX_FN void cvt_rmi(D& d, A a) {
  if constexpr (kFloat<To>) set<To>(d, canonical(To(std::floor(as<From>(a)))));
  else set<To>(d, clamped<To>(std::floor(as<From>(a))));
}
template <class To, class From, class D, class A> PTX_FN void cvt_rpi(D& d, A a) {
  if constexpr (kFloat<To>) set<To>(d, canonical(To(std::ceil(as<From>(a)))));
  else set<To>(d, clamped<To>(std::ceil(as<From>(a))));
}

// ---- barriers
template <class I> PTX_FN void bar_sync(I id) { simt::block_barrier(as<s32>(id), -1); }
template <class I, class N> PTX_FN void bar_sync(I id, N threads) { simt::block_barrier(as<s32>(id), as<s32>(threads)); }
template <class I, class N> PTX_FN void bar_arrive(I id, N threads) { simt::block_barrier(as<s32>(id), as<s32>(threads), false); }
template <class T> PTX_FN void bar_red_or(bool& d, Number id, bool p) {
  if (id.value != 0) simt::fail("bar.red of another barrier than 0");
  d = simt::block_barrier_reduce(2, p) != 0;
}
template <class M> PTX_FN void bar_warp_sync(M mask) { simt::warp_barrier(as<u32>(mask)); }

// ---- the warp
enum class Way { kUp, kDown, kButterfly, kIndex };
PTX_CALLED u32 shuffle(Way way, bool& p, u32 a, u32 b, u32 c, u32 mask) {
  const int lane = simt::lane(), by = int(b & 31), clamp = int(c & 31), segment = int(c >> 8 & 31);
  const int first = lane & segment, last = first | (clamp & ~segment);
  int from = 0;
  switch (way) {
    case Way::kUp: from = lane - by; p = from >= last; break;  // here the clamp is a lower bound
    case Way::kDown: from = lane + by; p = from <= last; break;
    case Way::kButterfly: from = lane ^ by; p = from <= last; break;
    case Way::kIndex: from = first | (by & ~segment); p = from <= last; break;
  }
  static const char* const kNames[] = {"shfl.sync.up", "shfl.sync.down", "shfl.sync.bfly", "shfl.sync.idx"};
  return simt::shfl(mask, a, p ? from : lane, kNames[int(way)]);
}
#define PTX_SHFL(name, way)                                                                                                        \
  template <class T, class D, class A, class B, class C, class M> PTX_FN void name(D& d, bool& p, A a, B b, C c, M mask) {    \
    set<T>(d, shuffle(way, p, as<T>(a), as<u32>(b), as<u32>(c), as<u32>(mask)));                                                   \
  }
PTX_SHFL(shfl_sync_up, Way::kUp)
PTX_SHFL(shfl_sync_down, Way::kDown)
PTX_SHFL(shfl_sync_bfly, Way::kButterfly)
PTX_SHFL(shfl_sync_idx, Way::kIndex)
#undef PTX_SHFL
template <class T, class M> PTX_FN void vote_sync_any(bool& d, bool p, M mask) { d = __any_sync(as<u32>(mask), p); }
template <class T, class M> PTX_FN void vote_sync_all(bool& d, bool p, M mask) { d = __all_sync(as<u32>(mask), p); }
template <class T, class D, class M> PTX_FN void vote_sync_ballot(D& d, bool p, M mask) { set<T>(d, __ballot_sync(as<u32>(mask), p)); }
template <class T, class D, class A, class M> PTX_FN void match_any_sync(D& d, A a, M mask) {
  set<u32>(d, __match_any_sync(as<u32>(mask), as<T>(a)));
}
template <class T, class D, class A, class M> PTX_FN void match_all_sync(D& d, bool& p, A a, M mask) {
  int same;
  set<u32>(d, __match_all_sync(as<u32>(mask), as<T>(a), &same));
  p = same != 0;
}
#define PTX_REDUX(name, f)                                                                                      \
  template <class T, class D, class A, class M> PTX_FN void redux_sync_##name(D& d, A a, M mask) {         \
    set<T>(d, f(as<u32>(mask), as<T>(a)));                                                                      \
  }
PTX_REDUX(add, __reduce_add_sync)
PTX_REDUX(min, __reduce_min_sync)
PTX_REDUX(max, __reduce_max_sync)
PTX_REDUX(and, __reduce_and_sync)
PTX_REDUX(or, __reduce_or_sync)
PTX_REDUX(xor, __reduce_xor_sync)
#undef PTX_REDUX

// ---- matrices
template <int K> PTX_FN void load_matrices(uint32_t (&r)[K], uint64_t row, bool trans) {
  const bool asked = simt::lane() < 8 * K;  // the addresses of other lanes count for nothing
  ptx::ldmatrix_any(r, {asked ? shared(row, 16, 16) : nullptr}, trans);
}
template <int K, class... D> PTX_FN void ldmatrix(bool trans, uint64_t row, D&... d) {
  static_assert(sizeof...(D) == K, "a register a matrix");
  uint32_t r[K];
  load_matrices(r, row, trans);
  int i = 0;
  (set<b32>(d, r[i++]), ...);
}
template <class T, class... D> PTX_FN void ldmatrix_sync_aligned_m8n8_x1_shared(uint64_t a, D&... d) { ldmatrix<1>(false, a, d...); }
template <class T, class... D> PTX_FN void ldmatrix_sync_aligned_m8n8_x2_shared(uint64_t a, D&... d) { ldmatrix<2>(false, a, d...); }
template <class T, class... D> PTX_FN void ldmatrix_sync_aligned_m8n8_x4_shared(uint64_t a, D&... d) { ldmatrix<4>(false, a, d...); }
template <class T, class... D> PTX_FN void ldmatrix_sync_aligned_m8n8_x2_trans_shared(uint64_t a, D&... d) { ldmatrix<2>(true, a, d...); }
template <class T, class... D> PTX_FN void ldmatrix_sync_aligned_m8n8_x4_trans_shared(uint64_t a, D&... d) { ldmatrix<4>(true, a, d...); }
PTX_OP movmatrix_sync_aligned_m8n8_trans(D& d, A a) { set<b32>(d, ptx::movmatrix_trans(as<b32>(a))); }

// d = a b + c, the matrices spread over registers as they stand in the instruction.
template <class D> using Product = void (*)(D (&)[4], const uint32_t*);
template <class D, int K, class... R> PTX_FN void multiply(Product<D> f, const uint32_t (&ab)[K], D (&d)[4], R&... to) {
  f(d, ab);
  int i = 0;
  (set<D>(to, canonical(d[i++])), ...);
}
#define PTX_LARGE(name, D)                                                     \
  PTX_CALLED void called_##name(D (&d)[4], const uint32_t* ab) {               \
    const uint32_t a[4] = {ab[0], ab[1], ab[2], ab[3]};                        \
    ptx::name(d, a, ab[4], ab[5]);                                             \
  }
#define PTX_SMALL(name, D)                                                     \
  PTX_CALLED void called_##name(D (&d)[4], const uint32_t* ab) {               \
    const uint32_t a[2] = {ab[0], ab[1]};                                      \
    ptx::name(d, a, ab[2]);                                                    \
  }
PTX_LARGE(mma_m16n8k16_bf16, float)
PTX_LARGE(mma_m16n8k16_f16, float)
PTX_LARGE(mma_m16n8k32_s8, int)
PTX_LARGE(mma_m16n8k32_u8s8, int)
PTX_SMALL(mma_m16n8k8_bf16, float)
PTX_SMALL(mma_m16n8k8_f16, float)
PTX_SMALL(mma_m16n8k16_s8, int)
#undef PTX_LARGE
#undef PTX_SMALL
#define PTX_MATRICES template <class D, class A, class B, class C, class R, class X, class Y, class Z> PTX_FN void
PTX_MATRICES mma_sync_aligned_m16n8k16_row_col(R& d0, R& d1, R& d2, R& d3, X a0, X a1, X a2, X a3, Y b0, Y b1, Z c0, Z c1, Z c2, Z c3) {
  static_assert(std::is_same<D, f32>::value && std::is_same<C, f32>::value && std::is_same<A, B>::value, "sums of floats");
  float d[4] = {as<f32>(c0), as<f32>(c1), as<f32>(c2), as<f32>(c3)};
  multiply(std::is_same<A, bf16>::value ? &called_mma_m16n8k16_bf16 : &called_mma_m16n8k16_f16,
           {as<b32>(a0), as<b32>(a1), as<b32>(a2), as<b32>(a3), as<b32>(b0), as<b32>(b1)}, d, d0, d1, d2, d3);
}
PTX_MATRICES mma_sync_aligned_m16n8k8_row_col(R& d0, R& d1, R& d2, R& d3, X a0, X a1, Y b0, Z c0, Z c1, Z c2, Z c3) {
  static_assert(std::is_same<D, f32>::value && std::is_same<C, f32>::value && std::is_same<A, B>::value, "sums of floats");
  float d[4] = {as<f32>(c0), as<f32>(c1), as<f32>(c2), as<f32>(c3)};
  multiply(std::is_same<A, bf16>::value ? &called_mma_m16n8k8_bf16 : &called_mma_m16n8k8_f16,
           {as<b32>(a0), as<b32>(a1), as<b32>(b0)}, d, d0, d1, d2, d3);
}
PTX_MATRICES mma_sync_aligned_m16n8k32_row_col(R& d0, R& d1, R& d2, R& d3, X a0, X a1, X a2, X a3, Y b0, Y b1, Z c0, Z c1, Z c2, Z c3) {
  static_assert(std::is_same<D, s32>::value && std::is_same<C, s32>::value && std::is_same<B, s8>::value, "sums of integers");
  int d[4] = {as<s32>(c0), as<s32>(c1), as<s32>(c2), as<s32>(c3)};
  multiply(std::is_same<A, u8>::value ? &called_mma_m16n8k32_u8s8 : &called_mma_m16n8k32_s8,
           {as<b32>(a0), as<b32>(a1), as<b32>(a2), as<b32>(a3), as<b32>(b0), as<b32>(b1)}, d, d0, d1, d2, d3);
}
// Of bytes: the name that halves have, with half as many registers.
PTX_MATRICES mma_sync_aligned_m16n8k16_row_col(R& d0, R& d1, R& d2, R& d3, X a0, X a1, Y b0, Z c0, Z c1, Z c2, Z c3) {
  static_assert(std::is_same<D, s32>::value && std::is_same<C, s32>::value && std::is_same<A, s8>::value && std::is_same<B, s8>::value, "sums of integers");
  int d[4] = {as<s32>(c0), as<s32>(c1), as<s32>(c2), as<s32>(c3)};
  multiply(&called_mma_m16n8k16_s8, {as<b32>(a0), as<b32>(a1), as<b32>(b0)}, d, d0, d1, d2, d3);
}
#undef PTX_MATRICES
}  // namespace machine
