// SPDX-License-Identifier: Apache-2.0
// What no single row can say: keys that depend on one another, and values that cannot be honoured yet.
#pragma once

#include "config/error.h"
#include "config/resolve.h"

namespace ds::config {

// Fills in defaults that depend on other keys, then checks the combinations.
void apply_rules(Resolved& resolved, Findings& findings);

// One problem for every value that a row refuses on this device.
void refuse_unbuilt(const Resolved& resolved, Device device, Findings& findings);

}  // namespace ds::config
