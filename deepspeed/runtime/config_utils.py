# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed._config_helpers."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed._config_helpers",
            "get_scalar_param", "get_list_param", "get_dict_param", "dict_raise_error_on_duplicate_keys", "pp_int",
            "ScientificNotationEncoder"),
})
