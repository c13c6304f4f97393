// SPDX-License-Identifier: Apache-2.0
#include "io/faults.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <sstream>
#include <thread>
#include <utility>

#include "base/error.h"
#include "io/chunk.h"

namespace ds::io {
namespace {

constexpr int kGarbage = 0xdb;

// splitmix64 (Steele, Lea, Flood 2014)
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

double unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// A part of the chunk, not all of it where it has parts; a place where direct access may stop.
int64_t part_of(const Chunk& chunk, uint64_t bits) {
  const int64_t step = chunk.direct ? kDirectAlignment : 1;
  const int64_t steps = chunk.bytes / step;
  return steps < 2 ? chunk.bytes : (1 + static_cast<int64_t>(bits % static_cast<uint64_t>(steps - 1))) * step;
}

template <typename T>
T number(const std::string& name, const std::string& text) {
  std::istringstream stream(text);
  T value;
  DS_CHECK_VALUE(stream >> value && stream.eof(), "faults: " << name << " must be a number, got '" << text << "'");
  return value;
}

}  // namespace

void FaultOptions::check() const {
  double sum = 0;
  for (double p : {error, torn, cut, again, delay}) {
    DS_CHECK_VALUE(p >= 0 && p <= 1, "faults: probabilities must lie in [0, 1], got " << p);
    sum += p;
  }
  DS_CHECK_VALUE(sum - delay <= 1, "faults: error, torn, cut and again add up to " << sum - delay << ", more than 1");
  DS_CHECK_VALUE(again <= 0.9, "faults: again must be at most 0.9, got " << again << ": nothing would ever finish");
  DS_CHECK_VALUE(delay_us >= 0 && delay_us <= 10'000'000, "faults: delay_us must lie in [0, 10000000], got " << delay_us);
}

FaultOptions FaultOptions::parse(const std::string& text) {
  FaultOptions options;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals), value = equals == std::string::npos ? "" : item.substr(equals + 1);
    if (name == "seed") options.seed = number<uint64_t>(name, value);
    else if (name == "error") options.error = number<double>(name, value);
    else if (name == "torn") options.torn = number<double>(name, value);
    else if (name == "cut") options.cut = number<double>(name, value);
    else if (name == "again") options.again = number<double>(name, value);
    else if (name == "delay") options.delay = number<double>(name, value);
    else if (name == "delay_us") options.delay_us = number<int64_t>(name, value);
    else DS_FAIL_VALUE("faults: unknown name '" << name << "' (seed, error, torn, cut, again, delay, delay_us)");
  }
  options.check();
  return options;
}

int64_t Faults::issue(Chunk& chunk) const {
  const uint64_t bits = mix(mix(mix(options_.seed ^ chunk.serial()) ^ static_cast<uint64_t>(chunk.offset)) ^ chunk.issues++);
  chunk.luck = bits;
  chunk.fault = Fault::None;
  double left = unit(bits);
  const std::pair<double, Fault> faults[] = {
      {options_.error, Fault::Error}, {options_.torn, Fault::Torn}, {options_.cut, Fault::Cut}, {options_.again, Fault::Again}};
  for (const auto& [probability, fault] : faults) {
    if (left < probability) {
      chunk.fault = fault;
      break;
    }
    left -= probability;
  }
  return chunk.fault == Fault::Torn || chunk.fault == Fault::Cut ? part_of(chunk, mix(bits)) : chunk.bytes;
}

int64_t Faults::answer(Chunk& chunk, int64_t result) const {
  const uint64_t bits = mix(chunk.luck ^ 1);
  if (unit(bits) < options_.delay && options_.delay_us > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(mix(bits) % static_cast<uint64_t>(options_.delay_us) + 1));
  }
  switch (chunk.fault) {
    case Fault::None:
    case Fault::Cut: return result;
    case Fault::Again: return -EINTR;
    case Fault::Error:
    case Fault::Torn:
      if (!chunk.is_write()) std::memset(chunk.data, kGarbage, static_cast<size_t>(chunk.bytes));
      return chunk.fault == Fault::Error && chunk.is_write() && mix(bits) % 4 == 0 ? -ENOSPC : -EIO;
  }
  DS_FAIL("not a Fault: " << static_cast<int>(chunk.fault));
}

}  // namespace ds::io
