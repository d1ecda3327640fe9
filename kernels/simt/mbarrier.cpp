// Barriers of asynchronous copies in the emulation. Never sanitized: the race detector learns of the order they make
// through its own calls.
#include "simt/host.h"

namespace simt {
namespace {
struct State { uint16_t pending, count; int16_t units; uint16_t phase; };  // units of 16 bytes
static_assert(sizeof(State) == 8, "an mbarrier");

State& state(unsigned char* bar) { return *reinterpret_cast<State*>(bar); }
void order(unsigned char* bar) {  // between arrivals and waiters
#ifdef KVLAR_SIMT_TSAN
  __tsan_release(bar);
  __tsan_acquire(bar);
#else
  (void)bar;
#endif
}
void settle(State& s) {
  if (s.pending != 0 || s.units != 0) return;
  s.pending = s.count;
  s.phase ^= 1;
}
}  // namespace

void mbarrier_init(unsigned char* bar, unsigned arrivals) {
  state(bar) = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
  order(bar);
}
void mbarrier_arrive(unsigned char* bar, unsigned expected_bytes) {
  order(bar);
  State& s = state(bar);
  if (s.pending == 0) fail("mbarrier: more arrivals than it was made for");
  s.units = int16_t(s.units + int(expected_bytes / 16));
  s.pending--;
  settle(s);
}
void mbarrier_landed(unsigned char* bar, unsigned bytes) {
  order(bar);
  State& s = state(bar);
  s.units = int16_t(s.units - int(bytes / 16));
  settle(s);
}
bool mbarrier_passed(unsigned char* bar, unsigned parity) {
  order(bar);
  return state(bar).phase != uint16_t(parity);
}

}  // namespace simt
