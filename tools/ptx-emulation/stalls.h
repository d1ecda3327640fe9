// Says where threads wait for results: a model, not a measurement, and its cycles are not a GPU's time. It finds chains of latencies.
//
// Every register has a time when its value is there, and every thread a clock. Between labels, branches and barriers an instruction
// issues as soon as its operands are there (ptxas changes the order within such a block), and a block ends when all of it has issued,
// one instruction a cycle. A wait is what an instruction's operands, the slowest of them, put off that end by. At a barrier all go on
// from the latest, and take over what it has waited for: the waits of a CTA are those on the way to its last instruction. A branch
// over a little arithmetic is none, as ptxas writes predicates for it (src/stalls.rs).
//
// What is not in it: other warps on the same SM, and queues of any kind; the two sides of a branch, one after the other; how long ago
// a value was stored that is loaded; other CTAs, whose clocks all begin with zero; bulk copies, which take no time; and what ptxas
// does across branches. Where it moves loads ahead of one, a chain that is listed here is none: look at the machine code as well.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#include "sites.h"

// (Of its own, for instructions to have any name in the outer one.)
namespace machine::stalls {
// ---- latencies: cycles from an instruction's issue until another can use what it makes. They are assumptions, rounded from what
// microbenchmarks of GPUs of this class have been published to find, or guesses where that is said. None was measured by us.
constexpr unsigned kAlu = 5;           // arithmetic of 16 and 32 bits, also of 64 (two at least, in truth): 4 to 6
constexpr unsigned kConstant = 5;      // parameters and other constants, which arithmetic reads in passing: 0 to 8 when cached
constexpr unsigned kSpecial = 20;      // special functions, conversions of numbers to other kinds, popc and the like; %tid: 17 to 24
constexpr unsigned kDouble = 16;       // arithmetic of doubles: a guess
constexpr unsigned kSequence = 45;     // division and roots of floats that round, which ptxas writes out: a guess
constexpr unsigned kDivision = 90;     // division of integers, which it writes out too: a guess (of 64 bits it is several times that)
constexpr unsigned kWarp = 25;         // shuffles, votes, matches, reductions of a warp: 22 to 30
constexpr unsigned kShared = 30;       // loads from shared memory: 23 to 33
constexpr unsigned kMatrices = 33;     // ldmatrix: 29 to 36
constexpr unsigned kMovMatrix = 30;    // movmatrix: a guess by ldmatrix
constexpr unsigned kProduct = 33;      // mma of 16x8x16 halves or 16x8x32 bytes: about
constexpr unsigned kSmallProduct = 24; // mma of half that depth: about
constexpr unsigned kSharedAtomic = 60; // a guess: they differ by operation, and with every lane that meets another
constexpr unsigned kAtomic = 500;      // of global memory, there and back: loads, and what L2 does: a guess
constexpr unsigned kFence = 500;       // membar.gl and what orders memory like it, with writes under way: a guess
constexpr unsigned kBlockFence = 10;   // membar.cta: a guess
constexpr unsigned kBarrier = 20;      // bar.sync, after the last has come: a guess
constexpr unsigned kNothing = 0;       // what makes nothing to wait for
// Loads of global memory that L2 answers: 200 to 280. KVLAR_STALLS_GLOBAL says otherwise (of memory: 500 to 800).
inline const unsigned kGlobal = getenv("KVLAR_STALLS_GLOBAL") ? unsigned(atoi(getenv("KVLAR_STALLS_GLOBAL"))) : 270;

// When a value is there, and in the lower bits the instruction that it comes of: the later of two has its own.
using Ready = uint64_t;
constexpr int kSiteBits = 24;
inline Ready ready(uint64_t time, unsigned site) { return time << kSiteBits | site; }
inline uint64_t time_of(Ready r) { return r >> kSiteBits; }
SIMT_INLINE Ready latest() { return 0; }
template <class... R> SIMT_INLINE Ready latest(Ready first, R... others) {
  const Ready other = latest(others...);
  return first > other ? first : other;
}

// A wait of a thread, after those before it.
struct Wait { const Wait* before; unsigned waiter, source; uint64_t cycles; };
struct Sum { uint64_t visits = 0, cycles = 0; };
struct OfEntry {
  uint64_t launches = 0, ctas = 0, cycles = 0, longest = 0;
  std::map<std::pair<unsigned, unsigned>, Sum> waits, of_longest;  // by who waited, and for what
  std::map<unsigned, double> for_others;                           // cycles at a barrier, of a mean thread
};
// Written when the process ends: by entry and source, since an instruction of a line may stand in many places.
struct Profile {
  std::mutex lock;
  std::map<std::string, OfEntry> entries;
  ~Profile() {
    const char* path = getenv("KVLAR_STALLS");
    FILE* to = path ? fopen(path, "w") : stderr;
    if (!to) perror(path), to = stderr;
    for (const auto& [name, e] : entries) {
      fprintf(to, "entry\t%s\t%llu\t%llu\t%llu\t%llu\n", name.c_str(), (unsigned long long)e.launches, (unsigned long long)e.ctas,
              (unsigned long long)e.cycles, (unsigned long long)e.longest);
      std::map<std::tuple<std::string, std::string, std::string, std::string>, std::pair<Sum, Sum>> lines;
      const auto add = [&](const decltype(e.waits)& waits, Sum std::pair<Sum, Sum>::*of) {
        for (const auto& [who, sum] : waits) {
          const Site &waiter = sites()[who.first], &source = sites()[who.second];
          Sum& line = lines[{waiter.where, waiter.instruction, source.where, source.instruction}].*of;
          line.visits += sum.visits, line.cycles += sum.cycles;
        }
      };
      add(e.waits, &std::pair<Sum, Sum>::first);
      add(e.of_longest, &std::pair<Sum, Sum>::second);
      for (const auto& [line, sums] : lines) {
        const auto& [where, instruction, from, made_by] = line;
        fprintf(to, "wait\t%s\t%s\t%s\t%s\t%s\t%llu\t%llu\t%llu\n", name.c_str(), where.c_str(), instruction.c_str(), from.c_str(),
                made_by.c_str(), (unsigned long long)sums.first.visits, (unsigned long long)sums.first.cycles,
                (unsigned long long)sums.second.cycles);
      }
      std::map<std::pair<std::string, std::string>, double> others;
      for (const auto& [site, cycles] : e.for_others) others[{sites()[site].where, sites()[site].instruction}] += cycles;
      for (const auto& [line, cycles] : others)
        fprintf(to, "others\t%s\t%s\t%s\t%.0f\n", name.c_str(), line.first.c_str(), line.second.c_str(), cycles);
    }
    if (to != stderr) fclose(to);
  }
};
inline Profile& profile() {
  static Profile all;
  return all;
}

// Of a barrier, the latest that has come to it. Who has left it may come again before all have: two turns at a time.
struct Turn { unsigned number = 0; uint64_t end = 0; const Wait* path = nullptr; };
struct Clock;
// A block's, on the thread that runs it.
struct ClocksOfBlock {
  unsigned launch = 0, cta = 0, ended = 0;
  std::deque<Wait> waits;
  Turn turns[16][2];
  uint64_t end = 0;
  const Wait* path = nullptr;
  std::map<unsigned, uint64_t> for_others;
  void begin() {
    const unsigned at = (simt::blk.bid.z * simt::blk.gdim.y + simt::blk.bid.y) * simt::blk.gdim.x + simt::blk.bid.x;
    if (launch == simt::blk.launch && cta == at) return;
    *this = ClocksOfBlock();  // (A block that failed has no end.)
    launch = simt::blk.launch, cta = at;
  }
  void finish(const char* entry, const Clock& c);
};
inline thread_local ClocksOfBlock clocks_of_block;

// A thread's. What it does with it is called, not inlined, as most of `machine.h` is.
struct Clock {
  const char* name;
  unsigned first;                // of its entry's sites
  uint64_t entry = 0, end = 0;   // of the block that it is in
  uint64_t issued = 0;           // in that block
  const Wait* path = nullptr;
  Ready copying = 0;             // cp.async since the last group
  std::vector<Ready> groups;     // that nothing has waited for
  unsigned turns[16] = {};
  Clock(const char* name, unsigned first) : name(name), first(first) { clocks_of_block.begin(); }
  ~Clock() { clocks_of_block.finish(name, *this); }

  // An instruction that has its operands then; when it issues.
  uint64_t issue(unsigned site, Ready operands) {
    const uint64_t at = std::max(entry, time_of(operands));
    end = std::max(end, entry + ++issued);
    wait(site, operands);
    return at;
  }
  void wait(unsigned site, Ready operands) {
    const uint64_t at = time_of(operands);
    if (at <= end) return;
    clocks_of_block.waits.push_back({path, first + site, unsigned(operands & ((1u << kSiteBits) - 1)), at - end});
    path = &clocks_of_block.waits.back(), end = at;
  }
  void next_block() { entry = end, issued = 0; }
};
inline void ClocksOfBlock::finish(const char* entry, const Clock& c) {
  if (c.end >= end) end = c.end, path = c.path;
  const unsigned threads = simt::blk.bdim.x * simt::blk.bdim.y * simt::blk.bdim.z;
  if (++ended < threads) return;
  std::map<std::pair<unsigned, unsigned>, Sum> sums;
  for (const Wait* w = path; w; w = w->before) {
    Sum& s = sums[{w->waiter, w->source}];
    s.visits++, s.cycles += w->cycles;
  }
  std::lock_guard<std::mutex> guard(profile().lock);
  OfEntry& e = profile().entries[entry];
  e.launches += cta == 0, e.ctas++, e.cycles += end;
  for (const auto& [who, s] : sums) e.waits[who].visits += s.visits, e.waits[who].cycles += s.cycles;
  for (const auto& [site, cycles] : for_others) e.for_others[site] += double(cycles) / threads;
  if (end > e.longest) e.longest = end, e.of_longest = std::move(sums);
}

// ---- what translations call, before the instruction itself
template <class... R> PTX_FN Ready issue(Clock& c, unsigned site, unsigned latency, R... operands) {
  return ready(c.issue(site, latest(operands...)) + latency, c.first + site);
}
// A predicate that is false takes the place of an instruction, but nothing waits for its operands.
PTX_CALLED void skip(Clock& c, unsigned site, Ready predicate) { c.issue(site, predicate); }
template <class... R> PTX_FN void branch(Clock& c, unsigned site, R... predicate) {
  c.issue(site, latest(predicate...));
  c.next_block();
}
PTX_CALLED void label(Clock& c) { c.next_block(); }
// Nothing goes on before it is done.
template <class... R> PTX_FN Ready hold(Clock& c, unsigned site, unsigned latency, R... operands) {
  const Ready done = issue(c, site, 0, ready(c.end, c.first + site), operands...) + (uint64_t(latency) << kSiteBits);
  c.wait(site, done);
  c.next_block();
  return done;
}
// Of all lanes that take part, the last to have its operands: they have the result at once.
inline void latest_of_lanes(simt::Lane* const lanes[32], unsigned mask, int) {
  Ready all = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) all = std::max(all, *reinterpret_cast<const Ready*>(lanes[l]->in));
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) std::memcpy(lanes[l]->out, &all, sizeof all);
}
template <class... R> PTX_FN Ready exchange(Clock& c, unsigned site, uint32_t mask, R... operands) {
  // (What a lane has since its block's beginning is itself that instruction's.)
  simt::put(std::max(latest(operands...), ready(c.entry, c.first + site)));
  simt::warp_collective(mask, "the clock of a warp's exchange", latest_of_lanes, 0);
  return issue(c, site, kWarp, simt::get<Ready>());
}
struct Met { uint64_t end; const Wait* path; };
inline void latest_lane(simt::Lane* const lanes[32], unsigned mask, int) {
  Met all{0, nullptr};
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && reinterpret_cast<const Met*>(lanes[l]->in)->end >= all.end) all = *reinterpret_cast<const Met*>(lanes[l]->in);
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) std::memcpy(lanes[l]->out, &all, sizeof all);
}
PTX_CALLED void meet_lanes(Clock& c, unsigned site, uint32_t mask) {
  c.issue(site, 0);
  simt::put(Met{c.end, c.path});
  simt::warp_collective(mask, "the clock of bar.warp.sync", latest_lane, 0);
  const Met all = simt::get<Met>();
  c.end = all.end, c.path = all.path;
  c.next_block();
}
template <class... R> PTX_FN unsigned arrive(Clock& c, unsigned site, uint32_t id, R... operands) {
  c.issue(site, latest(operands...));
  c.next_block();
  const unsigned number = ++c.turns[id & 15];
  Turn& turn = clocks_of_block.turns[id & 15][number & 1];
  if (turn.number != number) turn = {number, 0, nullptr};
  if (c.end >= turn.end) turn.end = c.end, turn.path = c.path;
  return number;
}
// After it: all have come.
PTX_CALLED Ready leave(Clock& c, unsigned site, uint32_t id, unsigned number) {
  const Turn& turn = clocks_of_block.turns[id & 15][number & 1];
  clocks_of_block.for_others[c.first + site] += turn.end - c.end;
  c.end = turn.end, c.path = turn.path;
  const Ready done = ready(c.end + kBarrier, c.first + site);
  c.wait(site, done);
  c.next_block();
  return done;
}

template <class... R> PTX_FN void copy(Clock& c, unsigned site, R... operands) {
  c.copying = std::max(c.copying, issue(c, site, kGlobal, operands...));
}
PTX_CALLED void commit(Clock& c, unsigned site) {
  c.issue(site, 0);
  c.groups.push_back(c.copying);
  c.copying = 0;
}
PTX_CALLED void wait_groups(Clock& c, unsigned site, uint32_t newest) {
  c.issue(site, 0);
  while (c.groups.size() > newest) {
    c.wait(site, c.groups.front());
    c.groups.erase(c.groups.begin());
  }
  c.next_block();
}
}  // namespace machine::stalls
