// SPDX-License-Identifier: Apache-2.0
#include "config/batch.h"

#include <limits>
#include <utility>

namespace ds::config {

namespace {

constexpr const char* kTrain = "train_batch_size";
constexpr const char* kMicro = "train_micro_batch_size_per_gpu";
constexpr const char* kAccumulation = "gradient_accumulation_steps";
constexpr const char* kWorld = "data-parallel world size";

std::string text(int64_t value) { return std::to_string(value); }

// A number of the equation together with the story of where it came from.
struct Term {
  std::optional<int64_t> value;
  std::string origin = "given";

  void derive(int64_t result, const std::string& how) {
    value = result;
    origin = "derived: " + how;
  }
};

class Equation {
 public:
  Equation(const Batch& batch, const World& world) : world_(batch.data_parallel_size) {
    train_.value = batch.train;
    micro_.value = batch.micro;
    accumulation_.value = batch.accumulation;
    world_origin_ = world.size_source;
    if (world.ranks_per_sample > 1) {
      world_origin_ = text(world.size) + " ranks (" + world.size_source + ") / " + text(world.ranks_per_sample) + " (" +
                      world.ranks_per_sample_source + ")";
    }
  }

  bool can_be_solved() const { return train_.value || micro_.value; }

  void solve() {
    if (train_.value && micro_.value && !accumulation_.value) {
      accumulation_.derive(*train_.value / *micro_.value / world_,
                           text(*train_.value) + " / " + text(*micro_.value) + " / " + text(world_));
    } else if (train_.value && !micro_.value) {
      if (!accumulation_.value) default_accumulation();
      micro_.derive(*train_.value / world_ / *accumulation_.value,
                    text(*train_.value) + " / " + text(world_) + " / " + text(*accumulation_.value));
    }
    if (!accumulation_.value) default_accumulation();
    if (!train_.value) {
      int64_t product = 0;
      if (!product_of(product)) return;
      train_.derive(product, "the product");
    }
  }

  bool holds() const {
    int64_t product = 0;
    return product_of(product) && product > 0 && product == *train_.value;
  }

  // The equation with every number and where it came from, and the numbers that would do.
  std::string told() const {
    int64_t product = 0;
    const std::string right = product_of(product) ? text(product) : "more than fits in 64 bits";
    std::string result = std::string(kTrain) + " = " + kMicro + " x " + kAccumulation + " x " + kWorld + " does not hold: " +
                         (train_.value ? text(*train_.value) : "?") + " is not " + text(*micro_.value) + " x " +
                         text(*accumulation_.value) + " x " + text(world_) + " = " + right + "\n     " + line(kTrain, train_) +
                         "\n     " + line(kMicro, micro_) + "\n     " + line(kAccumulation, accumulation_) + "\n     " + kWorld +
                         " = " + text(world_) + " (" + world_origin_ + ")";
    return result + hint();
  }

  void store(Batch& batch) const {
    batch.train = train_.value;
    batch.micro = micro_.value;
    batch.accumulation = accumulation_.value;
  }

 private:
  // The multiples nearest to what was asked for, or, when all three numbers are given, what each would have to be if the others
  // are meant; nothing when the numbers are beyond reason.
  std::string hint() const {
    if (train_.origin == "given" && micro_.origin == "given" && accumulation_.origin == "given") return one_too_many();
    int64_t step = world_;
    for (const Term* term : {&micro_, &accumulation_}) {
      if (term->origin == "given" && __builtin_mul_overflow(step, *term->value, &step)) return "";
    }
    if (!train_.value || step <= 0 || *train_.value > std::numeric_limits<int64_t>::max() - step) return "";
    const int64_t below = *train_.value / step * step;
    return "\n     " + std::string(kTrain) + " must be a multiple of " + text(step) + ", e.g. " +
           (below > 0 ? text(below) + " or " : "") + text(below + step);
  }

  std::string one_too_many() const {
    std::string result;
    const auto consider = [&](const char* name, int64_t value) {
      result += (result.empty() ? "\n     change one of them: " : ", or ") + std::string(name) + " to " + text(value);
    };
    int64_t product = 0;
    if (product_of(product)) consider(kTrain, product);
    for (const auto& [name, other] : {std::pair(kMicro, &accumulation_), std::pair(kAccumulation, &micro_)}) {
      int64_t rest = 0;
      if (__builtin_mul_overflow(*other->value, world_, &rest) || rest <= 0 || *train_.value <= 0 || *train_.value % rest != 0) continue;
      consider(name, *train_.value / rest);
    }
    return result.empty() ? result : result + "; or leave one out, and it is derived";
  }

  void default_accumulation() {
    accumulation_.value = 1;
    accumulation_.origin = "the default";
  }

  bool product_of(int64_t& product) const {
    return !__builtin_mul_overflow(*micro_.value, *accumulation_.value, &product) &&
           !__builtin_mul_overflow(product, world_, &product);
  }

  static std::string line(const char* name, const Term& term) {
    return std::string(name) + " = " + (term.value ? text(*term.value) : "?") + " (" + term.origin + ")";
  }

  Term train_, micro_, accumulation_;
  const int64_t world_;
  std::string world_origin_;
};

}  // namespace

void solve_batch(Batch& batch, const World& world, bool required, Findings& findings) {
  if (world.ranks_per_sample < 1 || world.size % world.ranks_per_sample != 0) {
    findings.problem(world.ranks_per_sample_source, text(world.size) + " ranks (" + world.size_source +
                                                        ") cannot be divided into groups of " + text(world.ranks_per_sample));
    return;
  }
  batch.data_parallel_size = world.size / world.ranks_per_sample;
  Equation equation(batch, world);
  if (!equation.can_be_solved()) {
    if (required) {
      findings.problem(
          "",
          std::string(kTrain) + " and " + kMicro + " are both missing; give at least one" +
              (batch.accumulation ? std::string(" (") + kAccumulation + " = " + text(*batch.accumulation) + " alone is not enough)" : ""));
    } else if (!batch.accumulation) {
      batch.accumulation = 1;
    }
    return;
  }
  equation.solve();
  if (equation.holds()) {
    equation.store(batch);
  } else if (required) {
    findings.problem("", equation.told());
  } else {
    equation.store(batch);
  }
}

}  // namespace ds::config
