// SPDX-License-Identifier: Apache-2.0
#include "config/suggest.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "config/error.h"

namespace ds::config {

namespace {

constexpr size_t kMaxCompared = 64;  // longer names are compared by their start

std::string plain(const std::string& name) {
  std::string result;
  for (const char c : name.substr(0, kMaxCompared)) {
    result += c == '-' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return result;
}

using Index = std::multimap<std::string, std::string>;  // name -> path

void add_to_index(const Key& section, const std::string& path, Index& index) {
  for (const Key& child : section.children) {
    const std::string here = join(path, child.name);
    // The insides of refused sections would only mislead.
    if (child.status == Status::Ignored || !child.refusals.empty()) continue;
    index.emplace(child.name, here);
    for (const std::string& alias : child.aliases) index.emplace(alias, here);
    if (child.type == Type::Object) add_to_index(child, here, index);
  }
}

const Index& index_of_names() {
  static const Index index = [] {
    Index result;
    add_to_index(training_schema(), "", result);
    return result;
  }();
  return index;
}

}  // namespace

size_t edit_distance(const std::string& first, const std::string& second) {
  const std::string a = plain(first), b = plain(second);
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

std::string suggestion(const Key& section, const std::string& path, const std::string& name) {
  std::string best;
  size_t best_distance = std::numeric_limits<size_t>::max();
  const auto consider = [&](const std::string& known) {
    const size_t distance = edit_distance(name, known);
    if (distance < best_distance) {
      best_distance = distance;
      best = known;
    }
  };
  for (const Key& child : section.children) {
    if (child.status == Status::Ignored) continue;
    consider(child.name);
    for (const std::string& alias : child.aliases) consider(alias);
  }
  // A name that has little in common with any known one is no typing error.
  const bool near = !best.empty() && 2 * best_distance <= std::max(name.size(), best.size());
  std::string text = near ? "nearest known key: " + join(path, best) : "";
  const auto [begin, end] = index_of_names().equal_range(name);
  size_t listed = 0;
  for (auto it = begin; it != end && listed < 3 && best_distance > 0; ++it, ++listed) {
    text += (text.empty() ? "" : "; ") + std::string("known elsewhere as ") + it->second;
  }
  return text;
}

}  // namespace ds::config
