# SPDX-License-Identifier: Apache-2.0
"""The Python face of the configuration. What is allowed where is tested in tests/cpp/config."""
import base64
import collections
import copy
import json
import logging
import pathlib
import pickle
import random
import re
import subprocess
import sys

import pytest

from deepspeed.config import Config, DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedConfigWriter, documentation, find_world, load_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
MINIMAL = {"train_micro_batch_size_per_gpu": 2}


def load(source=None, **more):
    more.setdefault("world_size", 2)
    return load_config({**MINIMAL, **(source or {})}, **more)


@pytest.fixture
def remarks():
    """What is logged, from a process that has said nothing yet."""
    from deepspeed.telemetry.logs import logger
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    said, logger._said = logger._said, set()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger._said = said


def test_importing_needs_no_torch():
    code = "import sys; import deepspeed.config as c; c.load_config({'train_batch_size': 1}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_documentation_is_in_step_with_the_schema():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == documentation(), "run: python -m deepspeed.config"


def test_error_is_a_value_error_and_an_assertion_error():
    with pytest.raises(ValueError):
        load_config({}, world_size=1)
    with pytest.raises(AssertionError):
        load_config({}, world_size=1)
    error = pickle.loads(pickle.dumps(DeepSpeedConfigError("x")))
    assert type(error) is DeepSpeedConfigError and str(error) == "x"


class TestSources:
    DOCUMENT = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}

    def check(self, source):
        config = load_config(source, world_size=2)
        assert config.train_micro_batch_size_per_gpu == 4 and config.zero_optimization.stage == 2
        return config

    def test_dict_stays_the_same_object_and_unchanged(self):
        document = copy.deepcopy(self.DOCUMENT)
        assert self.check(document).raw is document
        assert document == self.DOCUMENT

    def test_mapping(self):
        assert self.check(collections.OrderedDict(self.DOCUMENT)).source == "config"

    def test_path(self, tmp_path):
        path = tmp_path / "c.json"
        path.write_text(json.dumps(self.DOCUMENT) + " // that is all")
        assert self.check(str(path)).raw == self.DOCUMENT
        assert self.check(path).source == str(path)

    def test_base64(self):
        for encode in (base64.urlsafe_b64encode, base64.b64encode):
            assert self.check(encode(json.dumps(self.DOCUMENT).encode()).decode()).raw == self.DOCUMENT

    def test_json_text(self):
        self.check(json.dumps(self.DOCUMENT))

    def test_config_is_handed_back(self):
        config = self.check(self.DOCUMENT)
        assert load_config(config) is config

    def test_missing_file(self):
        with pytest.raises(DeepSpeedConfigError, match="^file not found: no_such_config.json"):
            load_config("no_such_config.json")

    @pytest.mark.parametrize("source", [None, 1, [1], ("a", 1), b"{}"])
    def test_other_types(self, source):
        with pytest.raises(TypeError, match="config must be a dict, a path"):
            load_config(source)


class TestFacade:
    def test_attributes_aliases_and_is_set(self):
        config = load({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1e6}, "bfloat16": {"enabled": True}})
        zero = config.zero_optimization
        assert zero.prefetch_bucket_size == zero.stage3_prefetch_bucket_size == 1_000_000
        assert type(zero.prefetch_bucket_size) is int
        assert config.bf16.enabled is config.bfloat16.enabled is True
        assert zero.offload_param.device == "none"
        assert config.is_set("zero_optimization.prefetch_bucket_size") and config.is_set("bfloat16.enabled")
        assert not config.is_set("zero_optimization.offload_param.device")
        with pytest.raises(KeyError, match="zero_optimization.stag"):
            config.is_set("zero_optimization.stag")
        with pytest.raises(AttributeError, match="no key zero_optimization.stag in"):
            zero.stag

    def test_frozen(self):
        config = load()
        with pytest.raises(AttributeError, match="frozen"):
            config.train_batch_size = 3
        with pytest.raises(AttributeError, match="zero_optimization.stage"):
            config.zero_optimization.stage = 3
        with pytest.raises(AttributeError, match="frozen"):
            del config.zero_optimization.stage

    def test_free_form_parts_are_copies(self):
        given = {"type": "Adam", "params": {"lr": 0.1, "betas": (0.8, 0.9), "eps": "auto"}}
        config = load({"optimizer": given})
        assert config.optimizer.params == {"lr": 0.1, "betas": [0.8, 0.9]}
        config.optimizer.params["lr"] = 5
        config.optimizer.params["betas"].append(1)
        assert config.optimizer.params == {"lr": 0.1, "betas": [0.8, 0.9]}
        assert given["params"]["eps"] == "auto"

    def test_python_objects_pass_through(self):
        marker = object()
        config = load({"optimizer": {"type": "RMSprop", "params": {"foo": marker, "bar": [marker]}}})
        assert config.optimizer.params["foo"] is marker and config.optimizer.params["bar"][0] is marker
        with pytest.raises(DeepSpeedConfigError, match=r"gradient_clipping: found builtins.object \(Python object\)"):
            load({"gradient_clipping": marker})

    def test_numpy_and_torch_values(self):
        numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
        config = load({"train_micro_batch_size_per_gpu": numpy.int64(4), "gradient_clipping": numpy.float32(0.5),
                       "fp16": {"enabled": numpy.bool_(True)}, "torch_autocast": {"dtype": torch.float16}})
        assert config.train_batch_size == 8 and config.gradient_clipping == 0.5
        assert config.fp16.enabled is True and config.torch_autocast.dtype == "fp16"

    def test_infinity(self):
        config = load({"steps_per_print": float("inf")})
        assert config.steps_per_print == float("inf")

    def test_dict_repr_and_copies(self):
        config = load({"zero_optimization": {"stage": 1}})
        assert config.to_dict()["zero_optimization"]["stage"] == 1
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
        assert "zero_optimization.stage=1" in repr(config)
        assert "stage=1" in repr(config.zero_optimization)
        assert copy.deepcopy(config) is config
        again = pickle.loads(pickle.dumps(config))
        assert type(again) is Config and again == config and again.is_set("zero_optimization.stage") and again.raw == config.raw
        section = pickle.loads(pickle.dumps(config.zero_optimization))
        assert section == config.zero_optimization and section.stage3_max_live_parameters == 10**9
        assert "stage" in config.zero_optimization and config.zero_optimization.get("nope", 7) == 7

    def test_auto_everywhere(self):
        config = load({"gradient_clipping": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "fp16": "auto"})
        assert config.gradient_clipping == 1.0 and config.zero_optimization.reduce_bucket_size == 500_000_000


def readers():
    """Words of the library's code, but for what only describes configurations or hands their values on to a caller."""
    words = set()
    described = ("csrc/config/", "deepspeed/config/", "deepspeed/engine/accessors.py", "deepspeed/_config_keys.py")
    for folder, kinds in (("deepspeed", ("py",)), ("csrc", ("cpp", "h"))):
        for kind in kinds:
            for path in (ROOT / folder).rglob(f"*.{kind}"):
                if not str(path.relative_to(ROOT)).startswith(described):
                    words.update(re.findall(r"[A-Za-z_0-9]+", path.read_text(encoding="utf-8")))
    return words


# Read where configurations are resolved (csrc/config), or by deepspeed/config for everybody.
RESOLVED = {"strict", "train_batch_size", "sequence_parallel_size", "data_parallel_size"}


def test_a_key_that_is_implemented_has_a_reader():
    """What no code reads changes nothing: its row in the schema must say accepted."""
    rows = re.findall(r"^\| (`[^|]*`) \|.*\| (implemented|refused: [^|]*) \|", documentation(), re.MULTILINE)
    found = readers()
    implemented = [re.findall("`([^`]+)`", names) for names, status in rows if status == "implemented"]
    assert len(implemented) > 60
    unread = [names[0] for names in implemented if not found.intersection(names) and not RESOLVED.intersection(names)]
    assert not unread


class TestMessages:
    def test_remarks_are_logged_once(self, remarks):
        for _ in range(3):
            config = load({"zero_optimisation": {}, "aio": {"thread_count": 1}})
        assert len(config.warnings) == 2
        assert [level for level, _ in remarks] == ["WARNING", "WARNING"]
        assert "zero_optimization" in remarks[0][1]

    def test_strict(self):
        with pytest.raises(DeepSpeedConfigError, match="zero_optimisation: unknown key; nearest known key: zero_optimization"):
            load({"zero_optimisation": {}}, strict=True)
        with pytest.raises(DeepSpeedConfigError):
            load({"zero_optimisation": {}, "strict": True})
        load({"zero_optimisation": {}, "strict": True}, strict=False)

    def test_device(self):
        offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
        for device in ("cpu", "cuda"):
            assert load(offload, device=device).zero_optimization.offload_optimizer.device == "cpu"
        with pytest.raises(ValueError, match="device must be"):
            load(device="tpu")

    def test_gradients_are_accumulated_in_fp32(self):
        load({"data_types": {"grad_accum_dtype": "float32"}})
        with pytest.raises(DeepSpeedConfigError, match="data_types.grad_accum_dtype.*accumulated in fp32"):
            load({"data_types": {"grad_accum_dtype": "bfloat16"}})

    def test_batch_not_required(self):
        assert load_config({"zero_optimization": {"stage": 3}}, world_size=2, batch_required=False).train_batch_size is None
        with pytest.raises(DeepSpeedConfigError, match="both missing"):
            load_config({"zero_optimization": {"stage": 3}}, world_size=2)

    @pytest.mark.parametrize("document", [{1: 2}, {"zero_optimization": {None: 1}}])
    def test_keys_must_be_strings(self, document):
        with pytest.raises(DeepSpeedConfigError, match="a key must be a string"):
            load_config(document)

    def test_dict_that_contains_itself(self):
        document = dict(MINIMAL)
        document["optimizer"] = {"type": "X", "params": document}
        with pytest.raises(DeepSpeedConfigError, match="nested deeper"):
            load_config(document)

    def test_surrogates(self):
        for document in ({"\ud800": 1}, {"wandb": {"project": "\ud800"}}):
            with pytest.raises(DeepSpeedConfigError, match="not Unicode"):
                load(document)

    def test_huge_integers(self):
        with pytest.raises(DeepSpeedConfigError, match="train_batch_size"):
            load({"train_batch_size": 10**30})
        with pytest.raises(DeepSpeedConfigError, match="train_batch_size"):
            load({"train_batch_size": 10**400})


def test_random_documents_end_in_a_config_or_a_config_error():
    random.seed(3)
    from deepspeed.config.native import reader  # the names of the schema, as seeds
    names = sorted({name for line in documentation().split("`")[1::2] for name in line.replace("<name>", "x").split(".") if name.isidentifier()})
    leaves = [None, True, 0, -1, 2.5, 10**20, "", "auto", "cpu", "x" * 300, float("nan"), float("-inf"), [], [[1]], {}, ["a", 1], object()]

    def value(depth):
        kind = random.random()
        if depth < 4 and kind < 0.5:
            return {random.choice(names): value(depth + 1) for _ in range(random.randrange(5))}
        return [value(depth + 1)] if depth < 4 and kind < 0.55 else random.choice(leaves)

    for _ in range(3000):
        document = {random.choice(names): value(1) for _ in range(6)}
        try:
            load_config({**document, **MINIMAL}, world_size=1)
        except DeepSpeedConfigError as error:
            assert str(error)
    assert reader.canonical_path("zero_optimization")


class TestWorld:
    def test_environment(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert load_config(MINIMAL).train_batch_size == 6
        with pytest.raises(DeepSpeedConfigError, match=r"world size = 3 \(WORLD_SIZE in the environment\)"):
            load_config({"train_batch_size": 4})

    def test_one_process(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert load_config(MINIMAL).train_batch_size == 2

    def test_mpu(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "8")

        class Megatron:
            get_data_parallel_world_size = staticmethod(lambda: 4)

        class Ulysses:
            get_sequence_parallel_world_size = staticmethod(lambda: 4)

        assert load_config(MINIMAL, mpu=Megatron()).train_batch_size == 8
        # The unit has already left out the ranks that share a sequence.
        assert load_config({**MINIMAL, "sequence_parallel_size": 2}, mpu=Megatron()).train_batch_size == 8
        assert load_config(MINIMAL, mpu=Ulysses()).train_batch_size == 4
        with pytest.raises(DeepSpeedConfigError, match=r"2 \(8 ranks \(WORLD_SIZE in the environment\) / 4 \(mpu.get_sequence"):
            load_config({"train_batch_size": 3}, mpu=Ulysses())

    def test_mesh(self):
        class Mesh:
            mesh_dim_names = ("data_parallel", "sequence_parallel")

            def size(self, dimension):
                return (3, 2)[dimension]

        assert load_config({**MINIMAL, "sequence_parallel_size": 2}, mesh_device=Mesh()).data_parallel_world_size == 3
        Mesh.mesh_dim_names = ("x", "y")
        with pytest.raises(ValueError, match="data_parallel"):
            find_world(mesh_device=Mesh())


class TestLegacy:
    def test_flat_names(self, capsys):
        config = DeepSpeedConfig({"train_batch_size": 4, "zero_optimization": {"stage": 2}, "fp16": {"enabled": True},
                                  "optimizer": {"type": "adamW", "params": {"lr": 1}}, "checkpoint": {"tag_validation": "fail"}})
        assert config.train_batch_size == 4 and config.gradient_accumulation_steps == 1
        assert config.zero_enabled and config.zero_optimization_stage == 2 and config.zero_config.stage == 2
        assert config.float16_config.enabled and not config.bfloat16_config.enabled
        assert config.optimizer_name == "adamw" and config.optimizer_params == {"lr": 1}
        assert config.scheduler_name is None and config.scheduler_params is None
        assert config.checkpoint_tag_validation_enabled and config.checkpoint_tag_validation_fail
        assert config.gradient_clipping == 1.0 and config.monitor_config.enabled is False
        assert config.flops_profiler_config.profile_step == 1 and config.pipeline["stages"] == "auto"
        assert config.global_rank == 0 and config.world_size == 1
        with pytest.raises(AttributeError):
            config.nonsense
        config.print("DeepSpeedConfig")
        printed = capsys.readouterr().out
        assert printed.startswith("DeepSpeedConfig:\n") and '"train_batch_size": 4' in printed

    def test_every_renamed_attribute_exists(self):
        from deepspeed.config import legacy
        config = DeepSpeedConfig(MINIMAL)
        for name in legacy._RENAMED:
            getattr(config, name)

    def test_writer(self, tmp_path):
        writer = DeepSpeedConfigWriter()
        writer.add_config("train_batch_size", 4)
        writer.write_config(tmp_path / "c.json")
        other = DeepSpeedConfigWriter()
        other.load_config(str(tmp_path / "c.json"))
        assert other.data == {"train_batch_size": 4}


def test_auto_in_place_of_the_batch_says_who_would_have_filled_it_in():
    with pytest.raises(DeepSpeedConfigError, match=r"both missing.*\"auto\" \(train_batch_size\) counts as not given: Hugging Face's Trainer"):
        load_config({"train_batch_size": "auto", "gradient_accumulation_steps": 2}, world_size=1)
    with pytest.raises(DeepSpeedConfigError, match="both missing") as error:
        load_config({"gradient_accumulation_steps": 2}, world_size=1)
    assert "auto" not in str(error.value)
