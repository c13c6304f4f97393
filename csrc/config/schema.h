// SPDX-License-Identifier: Apache-2.0
// The schema: one row for each key the library knows. Parsing, did-you-mean, the Python attributes and docs/config.md all come
// from these rows, so a key is added, renamed, or moved from "not built yet" to "implemented" in one place.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace ds::config {

using Json = nlohmann::ordered_json;

enum class Type {
  Bool, Int, Number, Text, Choice, Dtype, TextList, NumberList, NumberOrList, IntList,
  Object,      // a fixed set of named keys: `children`
  Map,         // names chosen by the user, each value an object of `children`
  ObjectList,  // a list of objects of `children`
  Free,        // any object, handed on as it is
  Any,         // any value, handed on as it is
};

enum class Status {
  Implemented,  // changes what the library does
  Accepted,     // read and checked, but there is nothing left for it to change here
  Ignored,      // people write it, older versions read it; dropped with one note
};

enum class Device { Any, Cpu, Cuda };

// A value that is understood but cannot be honoured yet. Removing the row is all it takes once the feature is there.
struct Refusal {
  enum class When {
    True, False, Equals, AboveOne,
    Given,    // anything but null, false, empty, or an object whose "enabled" is false
    Enabled,  // somewhere inside it stands an "enabled": true
  };
  When when;
  std::string equals;  // for Equals
  std::string advice;  // what to write instead
  Device device = Device::Any;
};

// How the value of a deprecated key reaches the key that replaced it.
enum class Move { Value, ToCpuDevice, Drop };

struct Bound {
  double value;
  bool open;  // the bound itself is not allowed
};

struct Key {
  std::string name;
  Type type = Type::Any;
  Json fallback;  // the default; null means "not given"
  std::string doc;
  Status status = Status::Implemented;
  std::vector<Refusal> refusals;
  std::optional<Bound> low, high;
  bool infinite_ok = false;
  bool any_case = false;      // choices compare without regard to case
  bool real_bool = false;     // only true and false, no "yes" and no 1
  bool text_numbers = false;  // section: "8" is read as 8, as typed sections always did
  bool one_text_ok = false;   // a single string stands for a list of one
  bool bool_as_int = false;   // true is read as 1
  bool listed_word = false;   // a list key that also takes one of `choices`
  std::vector<std::string> choices;
  std::vector<std::string> aliases;
  std::string stages;  // of ZeRO; empty: does not depend on them
  std::string replaced_by;
  Move move = Move::Value;
  bool deprecated = false;
  size_t length = 0;  // of a list; 0: any
  std::vector<Key> children;

  // Chainable setters, so that a row reads like a sentence.
  Key& at_least(double v) { low = Bound{v, false}; return *this; }
  Key& above(double v) { low = Bound{v, true}; return *this; }
  Key& at_most(double v) { high = Bound{v, false}; return *this; }
  Key& below(double v) { high = Bound{v, true}; return *this; }
  Key& or_infinite() { infinite_ok = true; return *this; }
  Key& ignoring_case() { any_case = true; return *this; }
  Key& strict_bool() { real_bool = true; return *this; }
  Key& numbers_as_text() { text_numbers = true; return *this; }
  Key& or_one_text() { one_text_ok = true; return *this; }
  Key& or_bool() { bool_as_int = true; return *this; }
  Key& or_word(std::string word) { listed_word = true; choices = {std::move(word)}; return *this; }
  Key& alias(std::string other) { aliases.push_back(std::move(other)); return *this; }
  Key& on_stages(std::string text) { stages = std::move(text); return *this; }
  Key& of_length(size_t n) { length = n; return *this; }
  Key& accepted() { status = Status::Accepted; return *this; }
  Key& ignored() { status = Status::Ignored; return *this; }
  Key& renamed(std::string to, Move how = Move::Value) {
    deprecated = true; replaced_by = std::move(to); move = how; return *this;
  }
  Key& refuse(Refusal::When when, std::string advice, Device device = Device::Any) {
    refusals.push_back({when, "", std::move(advice), device}); return *this;
  }
  Key& refuse_value(std::string value, std::string advice, Device device = Device::Any) {
    refusals.push_back({Refusal::When::Equals, std::move(value), std::move(advice), device}); return *this;
  }

  // The child that is written `spelling`, under its own name or an alias; nullptr if there is none.
  const Key* find(const std::string& spelling) const;
};

using When = Refusal::When;

Key boolean(std::string name, Json fallback, std::string doc);
Key integer(std::string name, Json fallback, std::string doc);
Key number(std::string name, Json fallback, std::string doc);
Key text(std::string name, Json fallback, std::string doc);
Key choice(std::string name, Json fallback, std::vector<std::string> choices, std::string doc);
Key dtype(std::string name, Json fallback, std::string doc);
Key texts(std::string name, Json fallback, std::string doc);
Key integers(std::string name, Json fallback, std::string doc);
Key numbers(std::string name, Json fallback, std::string doc);
Key number_or_list(std::string name, Json fallback, std::string doc);
Key object(std::string name, std::string doc, std::vector<Key> children);
Key map_of(std::string name, std::string doc, std::vector<Key> children);
Key list_of(std::string name, std::string doc, std::vector<Key> children);
Key free_form(std::string name, Json fallback, std::string doc);
Key any(std::string name, Json fallback, std::string doc);
// Rows that matter only by name: parts of sections that are refused as soon as they are enabled.
std::vector<Key> names_only(const std::vector<std::string>& names);

// The whole training document. Its children are the top-level keys.
const Key& training_schema();

// What a constructor named by `type` takes. `extra` are further names that pass unchecked (torch's own switches).
struct ParamsSchema {
  std::vector<std::string> types;
  Key params;
  std::vector<std::string> extra;
};
const std::vector<ParamsSchema>& optimizer_schemas();
const std::vector<ParamsSchema>& scheduler_schemas();

// The rooms of the schema, one function a file.
std::vector<Key> general_keys();
std::vector<Key> precision_keys();
std::vector<Key> zero_keys();
std::vector<Key> optimizer_keys();
std::vector<Key> tool_keys();
std::vector<Key> storage_keys();
std::vector<Key> parallel_keys();
std::vector<Key> data_keys();
std::vector<Key> removed_keys();

}  // namespace ds::config
