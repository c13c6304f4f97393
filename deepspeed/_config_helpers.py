# SPDX-License-Identifier: Apache-2.0
"""Small helpers around configuration dicts that callers import from runtime.config_utils."""
import collections
import json


def get_scalar_param(param_dict, param_name, param_default_value):
    return param_dict.get(param_name, param_default_value)


get_list_param = get_dict_param = get_scalar_param


def dict_raise_error_on_duplicate_keys(ordered_pairs):
    """An `object_pairs_hook` for json.load that refuses a key given twice."""
    counts = collections.Counter(key for key, _ in ordered_pairs)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"duplicate keys in a JSON object: {', '.join(map(repr, repeated))}")
    return dict(ordered_pairs)


class pp_int(int):
    """An int that prints as `custom_print_str`, or with thousands separated by commas."""

    def __new__(cls, value, custom_print_str=None):
        made = super().__new__(cls, value)
        made.custom_print_str = custom_print_str
        return made

    def __repr__(self):
        return self.custom_print_str or f"{int(self):,}"


class ScientificNotationEncoder(json.JSONEncoder):
    """JSON text in which numbers of 1000 and more are written as 1.000000e+03, indented by two."""

    def iterencode(self, o, _one_shot=False, level=0):
        if isinstance(o, bool) or o is None or isinstance(o, str):
            return json.dumps(o)
        if isinstance(o, (int, float)):
            return f"{o:e}" if o > 1e3 else f"{o}"
        inside, close = "\n" + "  " * (level + 1), "\n" + "  " * level
        if isinstance(o, collections.abc.Mapping):
            parts = [f"{json.dumps(str(key))}: {self.iterencode(value, level=level + 1)}" for key, value in o.items()]
            return "{" + ",".join(inside + part for part in parts) + close + "}" if parts else "{}"
        if isinstance(o, (list, tuple)):
            return "[" + ", ".join(self.iterencode(value, level=level) for value in o) + "]"
        return json.dumps(o)
