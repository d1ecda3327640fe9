// The instructions that reports speak of.
#pragma once
#include <cstddef>
#include <vector>

namespace machine {
struct Site { const char* entry; const char* instruction; const char* where; };

inline std::vector<Site>& sites() {
  static std::vector<Site> all;
  return all;
}
template <size_t N> int add_sites(const Site (&some)[N]) {
  const int first = int(sites().size());
  sites().insert(sites().end(), some, some + N);
  return first;
}
}  // namespace machine
