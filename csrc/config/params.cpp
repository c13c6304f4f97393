// SPDX-License-Identifier: Apache-2.0
// optimizer.params and scheduler.params. They stay the user's own object: known ones are typed in place, no defaults are added
// (those belong to the constructors), and what another library's class takes is that library's to check.
#include <algorithm>

#include "config/resolve.h"
#include "config/suggest.h"
#include "config/values.h"

namespace ds::config {

namespace {

constexpr int64_t kMinWarmupSteps = 2;  // log(1) is 0: the curve needs two points

const ParamsSchema* find_schema(const std::vector<ParamsSchema>& all, std::string& type) {
  for (const ParamsSchema& schema : all) {
    for (const std::string& name : schema.types) {
      if (lower(name) == lower(type)) {
        type = name;
        return &schema;
      }
    }
  }
  return nullptr;
}

const char* gone_optimizer(const std::string& type) {
  const std::string name = lower(type);
  if (name == "onebitadam" || name == "zerooneadam") return "use Adam: gradient compression is not part of this library";
  if (name == "onebitlamb") return "use Lamb: gradient compression is not part of this library";
  if (name == "muadam" || name == "muadamw" || name == "musgd") return "pass mup's optimizer to initialize(optimizer=...)";
  return nullptr;
}

// Whether "torch_adam" hands the whole of params to torch's class.
bool switchable(const ParamsSchema& schema) { return !schema.extra.empty() && schema.params.find("torch_adam") != nullptr; }

bool is_torch_class(const Json& params) {
  return params.contains("torch_adam") && as_bool(params["torch_adam"]).value_or(false);
}

bool passes_unchecked(const ParamsSchema& schema, const Json& params, const std::string& name) {
  if (switchable(schema)) return is_torch_class(params);
  return std::find(schema.extra.begin(), schema.extra.end(), name) != schema.extra.end();
}

void check_params(const ParamsSchema& schema, const std::string& path, Json& params, Findings& findings) {
  const bool torch_class = switchable(schema) && is_torch_class(params);
  for (auto& [name, item] : params.get_ref<Json::object_t&>()) {
    const std::string here = join(path, name);
    const Key* key = schema.params.find(name);
    if (key == nullptr) {
      if (!passes_unchecked(schema, params, name)) {
        const std::string hint = suggestion(schema.params, path, name);
        findings.problem(here, "unknown key" + (hint.empty() ? "" : "; " + hint) +
                                   (switchable(schema) ? "; torch's own switches pass with \"torch_adam\": true" : ""));
      }
      continue;
    }
    // A tensor as a learning rate is torch's business.
    if (item.is_null() || item.is_binary()) continue;
    const std::optional<Json> typed = typed_value(*key, item, here, findings);
    if (!typed) continue;
    for (const Refusal& refusal : key->refusals) {
      if (!torch_class && *typed == Json(refusal.when == When::True)) {
        findings.problem(here, "found " + show(item) + ", which cannot be honoured; " + refusal.advice);
      }
    }
    if (key->type == Type::Int || key->type == Type::Bool) item = *typed;
  }
}

void resolve_optimizer(Resolved& resolved, Findings& findings) {
  Json& section = resolved.values["optimizer"];
  Json& params = section["params"];
  if (section["type"].is_null()) {
    if (!params.empty()) findings.warn("optimizer.params is not used, because optimizer.type is not given");
    params = Json::object();
    return;
  }
  std::string type = section["type"];
  if (const char* advice = gone_optimizer(type)) {
    findings.problem("optimizer.type", "found " + in_quotes(type) + ", which cannot be honoured; " + advice);
    return;
  }
  if (params.contains("max_grad_norm")) {
    findings.problem("optimizer.params.max_grad_norm", "found " + show_typed(params["max_grad_norm"]) +
                                                           "; not a parameter of the optimizer, use the top-level key gradient_clipping");
    params.erase("max_grad_norm");
  }
  if (const ParamsSchema* schema = find_schema(optimizer_schemas(), type)) {
    section["type"] = type;
    check_params(*schema, "optimizer.params", params, findings);
  }
}

// `written`: what the user wrote, where "auto" still stands: a value that another library was to fill in is not a missing one.
void require(const Json& written, const std::vector<std::string>& names, const std::string& type, Findings& findings) {
  for (const std::string& name : names) {
    if (!written.contains(name)) findings.problem("scheduler.params." + name, "missing; " + type + " requires it");
  }
}

void resolve_scheduler(Resolved& resolved, const Json& document, Findings& findings) {
  Json& section = resolved.values["scheduler"];
  Json& params = section["params"];
  if (section["type"].is_null()) {
    if (!params.empty()) findings.warn("scheduler.params is not used, because scheduler.type is not given");
    params = Json::object();
    return;
  }
  std::string type = section["type"];
  const ParamsSchema* schema = find_schema(scheduler_schemas(), type);
  if (schema == nullptr) return;
  section["type"] = type;
  check_params(*schema, "scheduler.params", params, findings);
  const Json& user = document["scheduler"];
  const Json written = user.contains("params") && user["params"].is_object() ? user["params"] : Json::object();
  if (type == "WarmupDecayLR" || type == "WarmupCosineLR") require(written, {"total_num_steps"}, type, findings);
  if (type == "OneCycle") require(written, {"cycle_min_lr", "cycle_max_lr"}, type, findings);
  const auto warmup = params.find("warmup_num_steps");
  if (warmup != params.end() && warmup->is_number_integer()) {
    *warmup = std::max(warmup->get<int64_t>(), kMinWarmupSteps);
  }
}

}  // namespace

void resolve_params(Resolved& resolved, const Json& document, Findings& findings) {
  resolve_optimizer(resolved, findings);
  resolve_scheduler(resolved, document, findings);
}

}  // namespace ds::config
