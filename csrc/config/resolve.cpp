// SPDX-License-Identifier: Apache-2.0
#include "config/resolve.h"

#include <list>
#include <map>

#include "config/suggest.h"
#include "config/values.h"

namespace ds::config {

namespace {

constexpr size_t kMaxListed = 50;

// What the user wrote for one key, and how it was spelt.
struct Written {
  const Json* value;
  std::string spelling;
};

class Resolver {
 public:
  Resolver(bool strict, Findings& findings, Resolved& out) : strict_(strict), findings_(findings), out_(out) {}

  Json object(const Key& schema, const Json& user, const std::string& path) {
    std::list<Json> moved;  // values made here; `written` points into it
    std::map<const Key*, Written> written = collect(schema, user, path);
    move_deprecated(schema, path, written, moved);
    Json result = Json::object();
    for (const Key& child : schema.children) {
      if (child.status == Status::Ignored) continue;
      const auto found = written.find(&child);
      if (child.deprecated || found == written.end()) {
        append_member(result, child.name, default_value(child));
        continue;
      }
      const std::string here = join(path, child.name);
      out_.given.insert(here);
      append_member(result, child.name, value(child, *found->second.value, here));
    }
    return result;
  }

  void report_ignored() {
    if (!unknown_.empty()) findings_.warn("unknown top-level keys are ignored: " + listing(unknown_));
    if (!unused_.empty()) findings_.warn("these keys have no effect here: " + listing(unused_));
    if (!dotted_.empty()) findings_.note("top-level names with dots are not applied: " + listing(dotted_));
  }

 private:
  static std::string listing(const std::vector<std::string>& items) {
    std::string text;
    for (size_t i = 0; i < items.size() && i < kMaxListed; ++i) text += (i ? ", " : "") + items[i];
    if (items.size() > kMaxListed) text += " and " + std::to_string(items.size() - kMaxListed) + " more";
    return text;
  }

  std::map<const Key*, Written> collect(const Key& schema, const Json& user, const std::string& path) {
    std::map<const Key*, Written> written;
    for (const auto& [name, item] : user.items()) {
      if (name.rfind("_comment", 0) == 0) continue;
      const Key* key = schema.find(name);
      if (key == nullptr) {
        unknown(schema, path, name);
      } else if (key->status == Status::Ignored) {
        unused(*key, join(path, name));
      } else if (!not_given(item)) {
        const auto [first, fresh] = written.emplace(key, Written{&item, name});
        if (!fresh) {
          findings_.problem(join(path, name), "written twice, as " + in_quotes(first->second.spelling) + " and as " + in_quotes(name) +
                                                  ", which are two spellings of one key; keep one");
        }
      }
    }
    return written;
  }

  void unknown(const Key& schema, const std::string& path, const std::string& name) {
    const std::string here = join(path, name);
    const std::string hint = suggestion(schema, path, name);
    if (path.empty() && !strict_) {
      // Some trainers add names like "zero_optimization.reduce_bucket_size" beside the section.
      const Key* section = schema.find(name.substr(0, name.find('.')));
      if (name.find('.') != std::string::npos && section != nullptr && section->type == Type::Object) {
        dotted_.push_back(in_quotes(name));
      } else if (unknown_.size() < kMaxListed) {
        unknown_.push_back(in_quotes(name) + (hint.empty() ? "" : " (" + hint + ")"));
      } else {
        unknown_.push_back(name);
      }
      return;
    }
    findings_.problem(here, "unknown key" + (hint.empty() ? "" : "; " + hint));
  }

  void unused(const Key& key, const std::string& here) {
    if (strict_) {
      findings_.problem(here, "has no effect (" + key.doc + "); remove it, or \"strict\"");
    } else {
      unused_.push_back(in_quotes(here));
    }
  }

  // Note: deprecated keys. The value goes to the key that took over, unless that is written too: then nobody can say which is meant.
  void move_deprecated(const Key& schema, const std::string& path, std::map<const Key*, Written>& written, std::list<Json>& moved) {
    const std::map<const Key*, Written> before = written;
    for (const auto& [key, was] : before) {
      if (!key->deprecated) continue;
      const std::string here = join(path, key->name);
      if (key->move == Move::Drop) {
        findings_.warn(here + " is deprecated and its value is not used; " + key->doc);
        continue;
      }
      const Key* target = schema.find(key->replaced_by);
      const auto taken = before.find(target);
      if (taken != before.end()) {
        findings_.problem(
            here, "deprecated, and " + in_quotes(join(path, taken->second.spelling)) + ", which replaced it, is given too; keep that one");
        continue;
      }
      const std::optional<Json> typed = typed_value(*key, *was.value, here, findings_);
      findings_.warn(here + " is deprecated; use " + join(path, key->replaced_by));
      if (!typed) continue;
      if (key->move == Move::Value) {
        moved.push_back(*typed);
      } else if (typed->get<bool>()) {
        moved.push_back(Json{{"device", "cpu"}});
      } else {
        continue;
      }
      written.emplace(target, Written{&moved.back(), key->name});
    }
  }

  Json value(const Key& key, const Json& user, const std::string& here) {
    switch (key.type) {
      case Type::Object: return section(key, user, here);
      case Type::Map: return map(key, user, here);
      case Type::ObjectList: return list(key, user, here);
      case Type::Free:
        if (!user.is_object()) break;
        record_members(user, here);
        return without_auto(user);
      case Type::Any: return without_auto(user);
      default: break;
    }
    return typed_value(key, user, here, findings_).value_or(default_value(key));
  }

  Json section(const Key& key, const Json& user, const std::string& here) {
    if (user.is_object()) return object(key, user, here);
    const std::optional<bool> truth = user.is_boolean() && key.bool_as_int ? as_bool(user) : std::nullopt;
    if (!truth) {
      findings_.problem(here, "found " + show_typed(user) + "; allowed: " + allowed(key));
      return default_value(key);
    }
    const std::string& first = key.children.front().name;
    findings_.warn(here + " as true or false is deprecated; use {" + in_quotes(first) + ": " + (*truth ? "1" : "0") + "}");
    return object(key, Json{{first, *truth ? 1 : 0}}, here);
  }

  Json map(const Key& key, const Json& user, const std::string& here) {
    if (!user.is_object()) {
      findings_.problem(here, "found " + show_typed(user) + "; allowed: " + allowed(key));
      return Json::object();
    }
    Json result = Json::object();
    for (const auto& [name, item] : user.items()) {
      const std::string path = join(here, name);
      if (not_given(item)) continue;
      if (!item.is_object()) {
        findings_.problem(path, "found " + show_typed(item) + "; allowed: an object {...}");
        continue;
      }
      out_.given.insert(path);
      append_member(result, name, object(key, item, path));
    }
    return result;
  }

  Json list(const Key& key, const Json& user, const std::string& here) {
    Json result = Json::array();
    if (!user.is_array()) {
      findings_.problem(here, "found " + show_typed(user) + "; allowed: " + allowed(key));
      return result;
    }
    for (size_t i = 0; i < user.size(); ++i) {
      const std::string path = here + "[" + std::to_string(i) + "]";
      if (!user[i].is_object()) {
        findings_.problem(path, "found " + show_typed(user[i]) + "; allowed: an object {...}");
        continue;
      }
      result.push_back(object(key, user[i], path));
    }
    return result;
  }

  void record_members(const Json& user, const std::string& path) {
    for (const auto& [name, item] : user.items()) {
      if (not_given(item)) continue;
      out_.given.insert(join(path, name));
      if (item.is_object()) record_members(item, join(path, name));
    }
  }

  const bool strict_;
  Findings& findings_;
  Resolved& out_;
  std::vector<std::string> unknown_, unused_, dotted_;
};

}  // namespace

Json default_value(const Key& key) {
  if (key.type == Type::Map) return Json::object();
  if (key.type == Type::ObjectList) return Json::array();
  if (key.type != Type::Object) return key.fallback;
  Json result = Json::object();
  for (const Key& child : key.children) {
    if (child.status != Status::Ignored) append_member(result, child.name, default_value(child));
  }
  return result;
}

Resolved resolve(const Key& schema, const Json& document, bool strict, Findings& findings) {
  Resolved out;
  Resolver resolver(strict, findings, out);
  out.values = resolver.object(schema, document, "");
  resolver.report_ignored();
  return out;
}

}  // namespace ds::config
