// Counts what a GPU needs for the accesses of a warp: cycles of shared memory's 32 banks, and 32-byte sectors of global memory.
//
// The lanes' accesses by one instruction are taken together by how often each lane has come by: right wherever lanes leave a loop for
// good; where some skip a turn, what is counted together is not what a GPU would do at once.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <string>
#include <unordered_map>
#include <vector>
#include "sites.h"

namespace machine {
enum class Space { kShared, kGlobal };
struct Total { uint64_t requests = 0, needed = 0, least = 0; };

// All counts; printed when the process ends.
struct Counts {
  std::mutex lock;
  std::map<std::tuple<std::string, std::string, std::string, bool>, Total> totals;
  ~Counts() {
    const char* path = getenv("KVLAR_ACCESSES");
    FILE* to = path ? fopen(path, "w") : stderr;
    if (!to) perror(path), to = stderr;
    for (const auto& [what, t] : totals) {
      const auto& [entry, where, instruction, shared] = what;
      fprintf(to, "%s\t%s\t%s\t%s\t%llu\t%llu\t%llu\n", shared ? "shared" : "global", entry.c_str(), where.c_str(), instruction.c_str(),
              (unsigned long long)t.requests, (unsigned long long)t.needed, (unsigned long long)t.least);
    }
    if (to != stderr) fclose(to);
  }
};
inline Counts& counts() {
  static Counts all;
  return all;
}

struct Request {
  unsigned bytes = 0;
  std::vector<std::pair<int, uint64_t>> lanes;  // and their addresses
};
// What the bank with most to deliver delivers, of lanes that are served at once.
inline unsigned longest(const Request& r, int first, int lanes) {
  std::set<uint64_t> words;
  for (const auto& [lane, address] : r.lanes)
    if (lane >= first && lane < first + lanes)
      for (unsigned i = 0; i < (r.bytes + 3) / 4; ++i) words.insert(address / 4 + i);
  unsigned banks[32] = {}, most = 0;
  for (uint64_t word : words) most = std::max(most, ++banks[word % 32]);
  return most;
}
inline void cycles(const Request& r, Total& t) {
  // Wide accesses are served a half or a quarter of the warp at a time, unless the lanes share words and all go at once.
  const int at_once = r.bytes == 16 ? 8 : r.bytes == 8 ? 16 : 32;
  unsigned sum = 0;
  for (int first = 0; first < 32; first += at_once) sum += longest(r, first, at_once);
  t.needed += std::min(sum, longest(r, 0, 32));
  std::set<uint64_t> words;
  for (const auto& [lane, address] : r.lanes)
    for (unsigned i = 0; i < (r.bytes + 3) / 4; ++i) words.insert(address / 4 + i);
  t.least += (words.size() + 31) / 32;
}
inline void sectors(const Request& r, Total& t) {
  std::set<uint64_t> touched, bytes;
  for (const auto& [lane, address] : r.lanes)
    for (unsigned i = 0; i < r.bytes; ++i) bytes.insert(address + i), touched.insert((address + i) / 32);
  t.needed += touched.size();
  t.least += (bytes.size() + 31) / 32;
}

// A block's, on the thread that runs it.
struct OfBlock {
  unsigned launch = 0, cta = 0;
  std::unordered_map<uint64_t, unsigned> came_by;                   // of a thread and a part
  std::map<std::tuple<int, unsigned, unsigned>, Request> requests;  // of a part, a warp and a turn
  void end() {
    std::map<int, Total> totals;
    for (const auto& [key, request] : requests) {
      const int part = std::get<0>(key);
      Total& t = totals[part];
      t.requests++;
      part % 2 ? cycles(request, t) : sectors(request, t);
    }
    std::lock_guard<std::mutex> guard(counts().lock);
    for (const auto& [part, t] : totals) {
      const Site& s = sites()[size_t(part / 2)];
      Total& sum = counts().totals[{s.entry, s.where, s.instruction, part % 2 != 0}];
      sum.requests += t.requests, sum.needed += t.needed, sum.least += t.least;
    }
    came_by.clear(), requests.clear();
  }
  ~OfBlock() { end(); }
};
inline thread_local OfBlock of_block;
inline thread_local int here = -1;  // the site of the instruction at hand

inline void access(Space space, uint64_t address, unsigned bytes, uint32_t cta) {
  if (here < 0) return;
  if (of_block.launch != simt::blk.launch || of_block.cta != cta) {
    of_block.end();
    of_block.launch = simt::blk.launch, of_block.cta = cta;
  }
  // Copies access both: apart, by an even and an odd number.
  const int part = 2 * here + (space == Space::kShared);
  const unsigned turn = of_block.came_by[uint64_t(part) << 10 | (simt::cur->warp * 32 + simt::cur->lane)]++;
  Request& r = of_block.requests[{part, simt::cur->warp, turn}];
  r.bytes = bytes;
  r.lanes.emplace_back(int(simt::cur->lane), address);
}
}  // namespace machine
