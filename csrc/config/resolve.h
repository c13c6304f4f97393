// SPDX-License-Identifier: Apache-2.0
// A document against the schema: every key typed, every default filled in.
#pragma once

#include <set>
#include <string>

#include "config/error.h"
#include "config/schema.h"

namespace ds::config {

struct Resolved {
  Json values;                  // every key of the schema under its own name
  std::set<std::string> given;  // paths that the user wrote, with a value other than null and "auto"
};

// `strict`: unknown and unused keys are problems also at the top level.
Resolved resolve(const Key& schema, const Json& document, bool strict, Findings& findings);

// What the schema says when nothing is given.
Json default_value(const Key& key);

// optimizer.params and scheduler.params of the built-in types; also gives `type` its usual spelling.
void resolve_params(Resolved& resolved, const Json& document, Findings& findings);

}  // namespace ds::config
