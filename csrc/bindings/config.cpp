// SPDX-License-Identifier: Apache-2.0
// deepspeed._core.config: Python objects to the configuration reader and back. Conversion only; deepspeed/config gives it a face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "config/config.h"
#include "config/docs.h"
#include "config/opaque.h"
#include "config/relaxed_json.h"
#include "config/source.h"
#include "config/values.h"

namespace py = pybind11;

namespace {

using ds::config::Config;
using ds::config::ConfigError;
using ds::config::Json;

// Python objects that JSON has no form for, in the order of their placeholders (config/opaque.h).
using Objects = std::vector<py::object>;

std::string to_text(py::handle value) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (data == nullptr) {
    PyErr_Clear();
    throw ConfigError("config: a string holds characters that are not Unicode");
  }
  return std::string(data, static_cast<size_t>(size));
}

Json to_integer(py::handle value) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow == 0) return static_cast<int64_t>(number);
  const double rounded = PyLong_AsDouble(value.ptr());
  if (PyErr_Occurred() == nullptr) return rounded;
  PyErr_Clear();
  return overflow * std::numeric_limits<double>::infinity();
}

class ToJson {
 public:
  explicit ToJson(Objects& objects) : objects_(objects) {}

  Json convert(py::handle value, int depth = 0) {
    PyObject* p = value.ptr();
    if (p == Py_None) return nullptr;
    if (PyBool_Check(p)) return p == Py_True;
    if (PyLong_Check(p)) return to_integer(value);
    if (PyFloat_Check(p)) return PyFloat_AS_DOUBLE(p);
    if (PyUnicode_Check(p)) return to_text(value);
    if (depth == ds::config::kMaxDepth) {
      throw ConfigError("config: nested deeper than " + std::to_string(ds::config::kMaxDepth) + " levels (does it contain itself?)");
    }
    if (PyDict_Check(p)) return members(value.attr("items")(), depth);
    if (PyList_Check(p) || PyTuple_Check(p) || PyAnySet_Check(p)) return items(value, depth);
    if (py::hasattr(value, "items") && py::hasattr(value, "keys")) return members(value.attr("items")(), depth);
    if (py::hasattr(value, "__fspath__")) return to_text(value.attr("__fspath__")());
    return other(value, depth);
  }

 private:
  Json members(const py::object& pairs, int depth) {
    Json result = Json::object();
    for (py::handle pair : pairs) {
      const auto both = py::reinterpret_borrow<py::tuple>(pair);
      if (!PyUnicode_Check(both[0].ptr())) {
        throw ConfigError("config: a key must be a string, found " + py::cast<std::string>(py::repr(both[0])));
      }
      ds::config::append_member(result, to_text(both[0]), convert(both[1], depth + 1));
    }
    return result;
  }

  Json items(py::handle values, int depth) {
    Json result = Json::array();
    for (py::handle value : values) result.push_back(convert(value, depth + 1));
    return result;
  }

  // numpy's scalars become numbers; anything else (a torch.dtype, a class, a process group) is carried along unread.
  Json other(py::handle value, int depth) {
    const py::handle type = py::type::handle_of(value);
    const auto module = py::cast<std::string>(py::str(py::getattr(type, "__module__", py::str(""))));
    if (module == "numpy" && py::hasattr(value, "item") && py::hasattr(value, "shape") && py::len(value.attr("shape")) == 0) {
      return convert(value.attr("item")(), depth + 1);
    }
    const auto name = py::cast<std::string>(type.attr("__qualname__"));
    const bool is_dtype = module == "torch" && name == "dtype";
    objects_.push_back(py::reinterpret_borrow<py::object>(value));
    return ds::config::make_opaque(objects_.size() - 1, is_dtype ? py::cast<std::string>(py::str(value)) : module + "." + name);
  }

  Objects& objects_;
};

py::object to_python(const Json& value, const Objects& objects) {
  switch (value.type()) {
    case Json::value_t::null: return py::none();
    case Json::value_t::boolean: return py::bool_(value.get<bool>());
    case Json::value_t::number_integer: return py::int_(value.get<int64_t>());
    case Json::value_t::number_unsigned: return py::int_(value.get<uint64_t>());
    case Json::value_t::number_float: return py::float_(value.get<double>());
    case Json::value_t::string: return py::str(value.get_ref<const std::string&>());
    case Json::value_t::array: {
      py::list result;
      for (const Json& item : value) result.append(to_python(item, objects));
      return std::move(result);
    }
    case Json::value_t::object: {
      py::dict result;
      for (const auto& [name, item] : value.items()) result[py::str(name)] = to_python(item, objects);
      return std::move(result);
    }
    case Json::value_t::binary: return objects.at(ds::config::opaque_number(value));
    default: return py::none();
  }
}

ds::config::Device to_device(const std::string& name) {
  if (name == "cpu") return ds::config::Device::Cpu;
  if (name == "cuda") return ds::config::Device::Cuda;
  throw ds::ValueError(__FILE__, __LINE__, "device must be \"cpu\" or \"cuda\", got \"" + name + "\"");
}

py::dict load(const py::object& source, ds::config::World world, const std::string& device, std::optional<bool> strict,
              bool batch_required, bool accept_unbuilt) {
  Objects objects;
  ds::config::Document document;
  py::object raw = source;
  if (PyUnicode_Check(source.ptr())) {
    document = ds::config::read_document(to_text(source));
    raw = to_python(document.json, objects);
  } else {
    document = {ToJson(objects).convert(source), "config"};
  }
  ds::config::Options options;
  options.world = std::move(world);
  options.device = to_device(device);
  options.strict = strict;
  options.batch_required = batch_required;
  options.accept_unbuilt = accept_unbuilt;
  options.source = document.source;
  const Config config = ds::config::load(document.json, options);

  py::list remarks;
  for (const ds::config::Remark& remark : config.remarks) {
    remarks.append(py::make_tuple(remark.level == ds::config::Remark::Level::Warning ? "warning" : "info", remark.text));
  }
  py::dict result;
  result["values"] = to_python(config.values, objects);
  result["raw"] = raw;
  result["source"] = document.source;
  result["given"] = py::frozenset(py::cast(config.given));
  result["remarks"] = py::tuple(remarks);
  result["data_parallel_world_size"] = config.batch.data_parallel_size;
  return result;
}

// {"spelling": "canonical name"} of the keys that may be written otherwise, for each section path.
void collect_aliases(const ds::config::Key& section, const std::string& path, py::dict& out) {
  py::dict here;
  for (const ds::config::Key& child : section.children) {
    for (const std::string& alias : child.aliases) here[py::str(alias)] = child.name;
    if (child.type == ds::config::Type::Object) collect_aliases(child, ds::config::join(path, child.name), out);
  }
  if (!here.empty()) out[py::str(path)] = here;
}

// A ValueError, because the value is wrong; an AssertionError too, because that is what DeepSpeed raises for batch sizes.
py::object make_error_type() {
  const py::tuple bases = py::make_tuple(py::handle(PyExc_ValueError), py::handle(PyExc_AssertionError));
  return py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(
      "deepspeed.config.DeepSpeedConfigError",
      "The configuration is refused. The message names every problem by its path, what was found, and what is allowed.",
      bases.ptr(), nullptr));
}

}  // namespace

void bind_config(py::module_& core) {
  py::module_ module = core.def_submodule("config", "Reader of the JSON configuration");
  static PyObject* error_type = make_error_type().release().ptr();
  module.attr("DeepSpeedConfigError") = py::handle(error_type);
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const ConfigError& e) {
      PyErr_SetString(error_type, e.message.c_str());
    }
  });

  py::class_<ds::config::World>(module, "World")
      .def(py::init([](int64_t size, std::string size_source, int64_t ranks_per_sample, std::string ranks_per_sample_source) {
             return ds::config::World{size, std::move(size_source), ranks_per_sample, std::move(ranks_per_sample_source)};
           }),
           py::arg("size"), py::arg("size_source"), py::arg("ranks_per_sample") = 1, py::arg("ranks_per_sample_source") = "")
      .def_readonly("size", &ds::config::World::size)
      .def_readonly("ranks_per_sample", &ds::config::World::ranks_per_sample);
  module.def("load", &load, py::arg("source"), py::kw_only(), py::arg("world"), py::arg("device"), py::arg("strict"),
             py::arg("batch_required"), py::arg("accept_unbuilt") = false);
  module.def("documentation", &ds::config::documentation);
  module.def("canonical_path", &ds::config::canonical_path, py::arg("path"));
  module.def("aliases", [] {
    py::dict result;
    collect_aliases(ds::config::training_schema(), "", result);
    return result;
  });
}
