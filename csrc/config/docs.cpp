// SPDX-License-Identifier: Apache-2.0
#include "config/docs.h"

#include "config/error.h"
#include "config/values.h"

namespace ds::config {

namespace {

constexpr const char* kPreface = R"(# Configuration

*Generated from the schema by `python -m deepspeed.config`; do not edit.*

The configuration is one JSON document, given as a dict, a path, JSON text, or base64 of JSON text. Files may contain comments
(`//`, `#`, `/* */`), trailing commas and unquoted names. A name given twice is an error.

- `null` and `"auto"` mean "not given", anywhere.
- An unknown key inside a section is an error; at the top level it is a warning. `"strict": true` makes it an error there too.
- Integers may be written as `5e8`. In the sections marked † numbers may also be strings (`"8"`). True and false may be written
  as `1`, `0`, `"yes"`, `"no"`, `"on"`, `"off"`. Names that begin with `_comment` are skipped.
- `train_batch_size` = `train_micro_batch_size_per_gpu` × `gradient_accumulation_steps` × data-parallel world size. Give at least one
  of the first two; the rest follows (accumulation is 1 unless it can be derived).

Status: **implemented** keys change what the library does. **accepted** keys are checked, but there is nothing for them to change.
**refused** values are understood, cannot be honoured yet, and end the load with a message; other values of the same key are fine.
**no effect**: found in old files, dropped with one warning. **deprecated**: the value moves to the key that replaced it.
)";

// Text for a table cell.
std::string cell(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '|') result += '\\';
    result += c;
  }
  return result;
}

std::string default_words(const Key& key) {
  if (key.status == Status::Ignored || key.deprecated) return "–";
  switch (key.type) {
    case Type::Object: case Type::Map: case Type::ObjectList: return "–";
    default: break;
  }
  return "`" + key.fallback.dump() + "`";
}

std::string refusal_words(const Refusal& refusal) {
  const std::string where = refusal.device == Device::Cuda ? " on a GPU" : refusal.device == Device::Cpu ? " on the CPU" : "";
  switch (refusal.when) {
    case When::True: return "`true`" + where;
    case When::False: return "`false`" + where;
    case When::Equals: return "`" + Json(refusal.equals).dump() + "`" + where;
    case When::AboveOne: return "above 1" + where;
    case When::Given: return "any content" + where;
    case When::Enabled: return "when enabled" + where;
  }
  return "";
}

std::string status_words(const Key& key) {
  if (key.deprecated) return key.replaced_by.empty() ? "deprecated" : "deprecated → `" + key.replaced_by + "`";
  if (key.status == Status::Ignored) return "no effect";
  std::string text = key.status == Status::Accepted ? "accepted" : "implemented";
  if (key.refusals.empty()) return text;
  std::string refused;
  for (const Refusal& refusal : key.refusals) refused += (refused.empty() ? "refused: " : ", ") + refusal_words(refusal);
  return refused;
}

std::string name_words(const Key& key) {
  std::string text = "`" + key.name + "`";
  for (const std::string& alias : key.aliases) text += ", `" + alias + "`";
  return text;
}

bool is_section(const Key& key) { return key.type == Type::Object || key.type == Type::Map || key.type == Type::ObjectList; }

std::string section_path(const std::string& path, const Key& key) {
  std::string here = join(path, key.name);
  if (key.type == Type::Map) here += ".<name>";
  if (key.type == Type::ObjectList) here += "[]";
  return here;
}

void table(const std::vector<Key>& rows, const std::string& path, std::string& out) {
  out += "\n| key | allowed | default | stages | status | meaning |\n|---|---|---|---|---|---|\n";
  for (const Key& key : rows) {
    if (is_section(key)) continue;
    out += "| " + name_words(key) + " | " + cell(allowed(key)) + " | " + cell(default_words(key)) + " | " + key.stages + " | " +
           cell(status_words(key)) + " | " + cell(key.doc) + " |\n";
  }
  for (const Key& key : rows) {
    if (!is_section(key)) continue;
    out += "\n" + std::string(path.empty() ? "## " : "### ") + "`" + section_path(path, key) + "`" + (key.text_numbers ? " †" : "") + "\n";
    std::string line = key.doc;
    for (const std::string& alias : key.aliases) line += (line.empty() ? "" : ". ") + std::string("Also written `") + alias + "`";
    if (!key.refusals.empty()) line += (line.empty() ? "" : ". ") + status_words(key) + " (" + key.refusals.front().advice + ")";
    if (!line.empty()) out += "\n" + line + ".\n";
    table(key.children, section_path(path, key), out);
  }
}

void params_tables(const std::string& title, const std::vector<ParamsSchema>& all, std::string& out) {
  for (const ParamsSchema& schema : all) {
    std::string names;
    for (const std::string& type : schema.types) names += (names.empty() ? "" : ", ") + type;
    out += "\n### `" + title + "` of " + names + "\n";
    table(schema.params.children, "-", out);
  }
}

}  // namespace

std::string documentation() {
  std::string out = kPreface;
  out += "\n## Top level\n";
  table(training_schema().children, "", out);
  out += "\n## Parameters of the built-in optimizers and schedulers\n";
  params_tables("optimizer.params", optimizer_schemas(), out);
  params_tables("scheduler.params", scheduler_schemas(), out);
  return out;
}

}  // namespace ds::config
