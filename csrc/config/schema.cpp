// SPDX-License-Identifier: Apache-2.0
#include "config/schema.h"

#include <algorithm>
#include <iterator>

namespace ds::config {

const Key* Key::find(const std::string& spelling) const {
  for (const Key& child : children) {
    if (child.name == spelling) return &child;
    if (std::find(child.aliases.begin(), child.aliases.end(), spelling) != child.aliases.end()) return &child;
  }
  return nullptr;
}

namespace {

Key make(std::string name, Type type, Json fallback, std::string doc) {
  Key key;
  key.name = std::move(name);
  key.type = type;
  key.fallback = std::move(fallback);
  key.doc = std::move(doc);
  return key;
}

Key make_parent(std::string name, Type type, std::string doc, std::vector<Key> children) {
  Key key = make(std::move(name), type, nullptr, std::move(doc));
  key.children = std::move(children);
  return key;
}

// Below a typed section every object is typed too.
void inherit_text_numbers(Key& key) {
  for (Key& child : key.children) {
    child.text_numbers = child.text_numbers || key.text_numbers;
    inherit_text_numbers(child);
  }
}

Key build_training_schema() {
  std::vector<Key> all;
  const auto append = [&all](std::vector<Key> part) {
    std::move(part.begin(), part.end(), std::back_inserter(all));
  };
  append(general_keys());
  append(optimizer_keys());
  append(precision_keys());
  append(zero_keys());
  append(storage_keys());
  append(tool_keys());
  append(parallel_keys());
  append(data_keys());
  append(removed_keys());
  Key root = object("", "", std::move(all));
  inherit_text_numbers(root);
  return root;
}

}  // namespace

Key boolean(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Bool, std::move(fallback), std::move(doc));
}
Key integer(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Int, std::move(fallback), std::move(doc));
}
Key number(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Number, std::move(fallback), std::move(doc));
}
Key text(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Text, std::move(fallback), std::move(doc));
}
Key choice(std::string name, Json fallback, std::vector<std::string> choices, std::string doc) {
  Key key = make(std::move(name), Type::Choice, std::move(fallback), std::move(doc));
  key.choices = std::move(choices);
  return key;
}
Key dtype(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Dtype, std::move(fallback), std::move(doc));
}
Key texts(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::TextList, std::move(fallback), std::move(doc));
}
Key integers(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::IntList, std::move(fallback), std::move(doc));
}
Key numbers(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::NumberList, std::move(fallback), std::move(doc));
}
Key number_or_list(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::NumberOrList, std::move(fallback), std::move(doc));
}
Key object(std::string name, std::string doc, std::vector<Key> children) {
  return make_parent(std::move(name), Type::Object, std::move(doc), std::move(children));
}
Key map_of(std::string name, std::string doc, std::vector<Key> children) {
  return make_parent(std::move(name), Type::Map, std::move(doc), std::move(children));
}
Key list_of(std::string name, std::string doc, std::vector<Key> children) {
  return make_parent(std::move(name), Type::ObjectList, std::move(doc), std::move(children));
}
Key free_form(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Free, std::move(fallback), std::move(doc));
}
Key any(std::string name, Json fallback, std::string doc) {
  return make(std::move(name), Type::Any, std::move(fallback), std::move(doc));
}

std::vector<Key> names_only(const std::vector<std::string>& names) {
  std::vector<Key> keys;
  for (const std::string& name : names) keys.push_back(any(name, nullptr, "").accepted());
  return keys;
}

const Key& training_schema() {
  static const Key schema = build_training_schema();
  return schema;
}

}  // namespace ds::config
