// SPDX-License-Identifier: Apache-2.0
#include "plan/pieces.h"

#include <algorithm>

#include "base/error.h"

namespace ds::plan {

std::string cover_problem(Span<const Run> pieces, int64_t numel) {
  int64_t at = 0;
  for (const Run& run : pieces) {
    const std::string where = std::to_string(run.begin);
    if (run.begin < 0 || run.numel <= 0 || run.numel > numel || run.begin > numel - run.numel) {
      return "a piece [" + where + ", +" + std::to_string(run.numel) + ") does not lie in " + std::to_string(numel) + " elements";
    }
    if (run.begin > at) return "elements [" + std::to_string(at) + ", " + where + ") are missing";
    if (run.begin < at) return "elements [" + where + ", " + std::to_string(std::min(at, run.begin + run.numel)) + ") are there twice";
    at += run.numel;
  }
  return at == numel ? "" : "elements [" + std::to_string(at) + ", " + std::to_string(numel) + ") are missing";
}

std::vector<Part> parts_of(Span<const Run> pieces, const Run& want) {
  DS_CHECK_VALUE(want.begin >= 0 && want.numel >= 0, "run [" << want.begin << ", +" << want.numel << ") is negative");
  std::vector<Part> parts;
  if (want.numel == 0) return parts;
  const Run* run = std::upper_bound(pieces.begin(), pieces.end(), want.begin, [](int64_t v, const Run& r) { return v < r.begin; });
  DS_CHECK_VALUE(run != pieces.begin(), "run [" << want.begin << ", +" << want.numel << ") lies before the first piece");
  int64_t at = want.begin;
  const int64_t end = want.begin + want.numel;
  for (--run; at < end; ++run) {
    DS_CHECK_VALUE(run != pieces.end() && at < run->begin + run->numel,
                   "run [" << want.begin << ", +" << want.numel << ") reaches beyond the last piece");
    const int64_t n = std::min(end, run->begin + run->numel) - at;
    parts.push_back({run - pieces.begin(), at - run->begin, at - want.begin, n});
    at += n;
  }
  return parts;
}

}  // namespace ds::plan
