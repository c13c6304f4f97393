# SPDX-License-Identifier: Apache-2.0
"""The engine: a model that trains as its configuration says. Thin: the work is in csrc/zero and deepspeed.zero."""
import contextlib
import gc
import weakref

import torch
import torch.distributed as dist

from deepspeed.comm import configure, flight, groups, watch
from deepspeed.device import get_accelerator
from deepspeed.engine import arguments, build, optimizers
from deepspeed.engine.accessors import ConfigAccessors
from deepspeed.engine.batch import BatchSizes
from deepspeed.engine.compiling import Compilation
from deepspeed.engine.data import DataMethods
from deepspeed.engine.inputs import autocast_context, cast_positional
from deepspeed.engine.join import Join
from deepspeed.engine.layout import layout_of
from deepspeed.engine.reduction import GradientReduction
from deepspeed.engine.reporting import Reporting
from deepspeed.engine.saving import CheckpointMethods
from deepspeed.engine.states import StateMethods
from deepspeed.engine.weights import WeightMethods
from deepspeed.zero.offload import DeepSpeedZeRoOffload
from deepspeed.zero.offload_config import FOR_BACKWARD

_DESTROYED = ("this engine was destroyed: pass its model to deepspeed.initialize() again. (The Hugging Face Trainer destroys its engine when train() "
              "begins, and goes on using it where there was one already, from evaluate(), predict() or an earlier train(): say "
              "`trainer.model_wrapped = trainer.model` before train(), or train with a new Trainer)")


class DeepSpeedEngine(ConfigAccessors, BatchSizes, DataMethods, GradientReduction, Compilation, CheckpointMethods, Reporting,
                      StateMethods, WeightMethods, torch.nn.Module):
    """What initialize() returns. Call it like the model; then backward(loss) and step() for every micro-batch.

    `module` is the caller's own model, whose parameters now live in the engine's buffers. Unknown attributes are looked up
    on it.
    """

    def __init__(self, args=None, model=None, optimizer=None, model_parameters=None, training_data=None, lr_scheduler=None, mpu=None,
                 collate_fn=None, config=None, raw_config=None):
        super().__init__()
        self._config = config
        self.config = config.raw if config.raw is not None else raw_config
        self.mpu = mpu
        self.collate_fn = collate_fn
        self.client_optimizer, self.client_lr_scheduler = optimizer, lr_scheduler
        self._place(args)
        self._start_counters()
        watch.start(section=config.hang_detection)
        if config.is_set("comms_logger"):
            configure(config)
        self._layout = layout_of(config, self.dp_world_size)
        arguments.check_device(self.device, self.local_rank)
        arguments.refuse_unbuilt(config, self.device)
        if lr_scheduler is not None and not callable(lr_scheduler) and optimizer is None and config.optimizer.type is None:
            raise AssertionError("initialize: a scheduler object was passed without an optimizer; pass the optimizer it was made for")
        self.module = model
        self._managed = None
        self._build(model, optimizer, model_parameters)
        if self._managed is not None:
            weakref.finalize(self, _settle, self._managed, weakref.ref(model)).atexit = False
        self._make_scheduler(lr_scheduler)
        self._data_schedules = self._make_data_schedules()
        self.random_ltd_initialize()
        self.training_dataloader = self.deepspeed_io(training_data) if training_data is not None else None
        self._prepare_saving()
        self._say_state()
        if config.disable_python_gc:
            gc.collect()
            gc.disable()

    # ---- construction

    def _place(self, args):
        accelerator = get_accelerator()
        self.local_rank = arguments.local_rank_of(args)
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu") if accelerator.device_name() == "cpu" else torch.device(accelerator.device_name(), self.local_rank)
        if self.device.type == "cuda":
            accelerator.set_device(self.local_rank)
        if self.mpu is not None and hasattr(self.mpu, "get_data_parallel_group"):
            groups.mpu = self.mpu
            self.data_parallel_group = self.mpu.get_data_parallel_group()
        else:
            self.data_parallel_group = dist.group.WORLD
        self.seq_data_parallel_group = self.data_parallel_group
        self.dp_world_size = dist.get_world_size(self.data_parallel_group)
        self.mp_world_size = self.mpu.get_model_parallel_world_size() if hasattr(self.mpu, "get_model_parallel_world_size") else 1

    def _start_counters(self):
        cfg = self._config
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = self._backwards = 0
        self.losses = None
        self.optimizer = self.basic_optimizer = self.lr_scheduler = None
        self.checkpoint_engine = self._frozen_file = self._background_saver = self._unfinished = self._half_loaded_guard = None
        self.enable_backward_allreduce = True
        self._boundary = None
        self._step_applied = False
        self._global_grad_norm = None
        self._no_sync_depth = 0
        self._gas = cfg.gradient_accumulation_steps
        self._micro = cfg.train_micro_batch_size_per_gpu
        self._data_post_process = self._data_schedules = self.training_dataloader = None
        self._scaled = self._destroyed = False
        self._joining = None
        self._open_telemetry()

    def _build(self, model, optimizer, model_parameters):
        cfg, layout = self._config, self._layout
        self.param_names = {parameter: name for name, parameter in model.named_parameters()}
        if model_parameters is not None:
            model_parameters = list(model_parameters)   # read twice
        basic, from_client = optimizers.choose(cfg, model, optimizer, model_parameters)
        stage = cfg.zero_optimization.stage
        if basic is None:
            if stage in (1, 2):
                raise AssertionError(f"zero_optimization.stage {stage} shards the optimizer's state, but there is no optimizer: pass one to "
                                     "initialize(), add an optimizer section, or use stage 0 or 3")
            if layout.shard_params:
                self._managed = build.manage(model, cfg, layout, self.device, self.data_parallel_group, trained=set())
                self._managed.watch_backward(None)
                self.optimizer = DeepSpeedZeRoOffload(model, self._managed)
            else:
                build.cast_only(model, layout, self.device)
            build.cast_buffers(model, cfg)
            return
        trained = {id(p) for group in basic.param_groups for p in group["params"] if p.requires_grad}
        if not trained:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        arguments.check_dtypes(model, trained, layout.compute_dtype)
        self._managed = build.manage(model, cfg, layout, self.device, self.data_parallel_group, trained)
        self._managed.refuse_to_unfreeze(arguments.listed_parameters(model, basic, from_client, model_parameters))
        offload = DeepSpeedZeRoOffload(model, self._managed) if layout.shard_params else None
        counter = _StepNumber(self)
        self.basic_optimizer = basic
        self.optimizer = build.connect(self._managed, layout, cfg, basic, counter, offload)
        build.cast_buffers(model, cfg)
        self._set_default_scale()

    def _set_default_scale(self):
        """A plain loss.backward(): the engine divides by the accumulation steps itself; fp16 needs engine.scale() first."""
        reducer = self._managed.reducer
        reducer.set_post_scale(self._layout.post_scale / self._gas)
        fp16 = self._config.fp16.enabled
        away = self._managed.refusal_while_away("backward", *FOR_BACKWARD)
        reducer.set_refusal(away or ("fp16: loss.backward() was called without loss scaling: use engine.backward(loss), or "
                                     "engine.scale(loss).backward()" if fp16 and not self._scaled else ""))

    def _make_scheduler(self, client):
        if client is not None:
            is_object = hasattr(client, "step")
            self.lr_scheduler = client if is_object else client(self.basic_optimizer)
        elif self.basic_optimizer is not None and self._config.scheduler.type is not None:
            from deepspeed.schedules import build_scheduler
            self.lr_scheduler = build_scheduler(self._config.scheduler, self.basic_optimizer)

    # ---- forward, backward, step

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise AttributeError(f"neither DeepSpeedEngine nor {type(module).__name__} has an attribute {name!r}") from None

    def forward(self, *inputs, **kwargs):
        """The module's own output."""
        if self._destroyed and (self._layout.shard_params or (self.training and torch.is_grad_enabled())):
            raise RuntimeError(_DESTROYED)
        if self._half_loaded is not None:
            self._refuse_half_loaded()
        if self._config.fp16.auto_cast and self._layout.compute_dtype is not None:
            inputs = cast_positional(inputs, self._layout.compute_dtype)
        watched = self._watching and self.training
        if self.training:
            self.tput_timer.start()
            if self._data_schedules is not None:
                self._data_schedules.before_forward(self.global_steps, kwargs)
        if watched:
            self._begin("forward")
        try:
            with autocast_context(self._config.torch_autocast, self.device):
                output = self.module(*inputs, **kwargs)
        except BaseException:
            if watched:
                self._break_off("forward")
            raise
        if watched:
            self._end("forward")
        return output

    @property
    def _half_loaded(self):
        """What has begun to change values everywhere and not ended ("loading FOLDER", "the update of step 3"); None otherwise."""
        if self._unfinished is None and getattr(self.optimizer, "torn", False):   # by optimizer.step() itself
            return f"the update of step {self.global_steps}"
        return self._unfinished

    @_half_loaded.setter
    def _half_loaded(self, what):
        self._unfinished = what
        if what is None and isinstance(self.optimizer, build.ShardedOptimizer):
            self.optimizer.torn = False
        if self._half_loaded_guard is not None:
            self._half_loaded_guard.remove()
        # The model called by itself refuses as well; the hook is there only then.
        self._half_loaded_guard = self.module.register_forward_pre_hook(_HalfLoadedGuard(self), prepend=True) if what is not None else None

    def _check_loss(self, loss):
        if not isinstance(self.optimizer, build.ShardedOptimizer):
            raise AssertionError("backward: this engine has no optimizer: pass one to initialize() or add an optimizer section to the "
                                 "configuration")
        if not isinstance(loss, torch.Tensor):
            raise AssertionError(f"backward: the loss must be a tensor, got {type(loss).__name__}: pass the loss, not the model's whole output")
        if loss.numel() != 1 or loss.dim() > 1:
            raise AssertionError(f"backward: the loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean()")
        if not loss.requires_grad:
            raise AssertionError("backward: the loss does not require a gradient: was the forward run under torch.no_grad()?")

    def backward(self, loss, retain_graph=False, scale_wrt_gas=True, **legacy):
        """Gradients of the loss, reduced over the ranks and added to what has been accumulated.

        The loss is divided by gradient_accumulation_steps unless scale_wrt_gas is False. Returns that loss, detached from
        loss scaling.
        """
        self._check_loss(loss)
        self._refuse_without_states("backward", *FOR_BACKWARD)
        managed = self._managed
        if self._watching:
            self._begin("backward")
        result = loss / self._gas if scale_wrt_gas and self._gas > 1 else loss
        self.losses = result.detach()
        if self._keep_loss:
            self._loss_sum = self.losses.float() if self._loss_sum is None else self._loss_sum + self.losses.float()
        scale = self.optimizer.loss_scale
        managed.reducer.set_post_scale(self._layout.post_scale)
        managed.reducer.set_refusal("")
        self.optimizer.expect_step(self.is_gradient_accumulation_boundary())
        managed.hooks.begin_manual()
        try:
            with self._joining.backward(self._layout.post_scale) if self._joining is not None else contextlib.nullcontext():
                self._run_backward(result.float() * scale if scale != 1.0 else result, retain_graph)
        except BaseException as error:
            managed.hooks.abort_backward(isinstance(error, Exception))   # somebody who interrupts does not want to wait
            raise
        finally:
            self._set_default_scale()
        self._backwards += 1
        self._refuse_unused()
        if self._watching:
            self._end("backward")
        return result

    def _run_backward(self, scaled, retain_graph):
        hooks, watching = self._managed.hooks, self._watching
        if watching:
            self._begin("backward_inner")
        scaled.backward(retain_graph=retain_graph)
        if watching:
            self._end("backward_inner")
            self._begin("backward_allreduce")  # what of the reductions is left when backward is through
        hooks.end_backward()
        if watching:
            self._end("backward_allreduce")

    def _refuse_unused(self):
        """zero_optimization.ignore_unused_parameters false: every trained parameter must get a gradient."""
        zero = self._config.zero_optimization
        if zero.ignore_unused_parameters or zero.stage not in (1, 2):
            return
        store, unused = self._managed.store, self._managed.reducer.unused()
        if unused:
            raise AssertionError("parameters without a gradient: " + ", ".join(repr(store.param_name(i)) for i in unused[:8]) +
                                 ("..." if len(unused) > 8 else "") + "; zero_optimization.ignore_unused_parameters is false")

    def scale(self, loss):
        """The loss times the fp16 loss scale, for a plain `.backward()` of one's own."""
        self._check_loss(loss)
        self._refuse_without_states("scale", *FOR_BACKWARD)
        self._scaled = True
        self._managed.reducer.set_refusal("")
        return loss * self.optimizer.loss_scale

    def is_gradient_accumulation_boundary(self):
        """Whether step() will update the parameters after this micro-batch."""
        if not self._config.managed_gradient_accumulation:
            return True
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self._gas == 0

    def set_gradient_accumulation_boundary(self, is_boundary):
        """From now on the caller says which micro-batch is the last one before an update."""
        if not self._config.managed_gradient_accumulation:
            raise AssertionError("set_gradient_accumulation_boundary: managed_gradient_accumulation is false, every step() is a boundary")
        self._boundary = bool(is_boundary)

    def step(self, lr_kwargs=None):
        """At a boundary: clips, updates, refreshes the parameters, steps the scheduler. Otherwise only counts."""
        if self._no_sync_depth:
            raise AssertionError("step: called inside no_sync()")
        if not isinstance(self.optimizer, build.ShardedOptimizer):
            raise AssertionError("step: this engine has no optimizer")
        if self._half_loaded is not None:
            self._refuse_half_loaded()
        self._refuse_without_states("step")
        boundary = self.is_gradient_accumulation_boundary()
        if self._joining is not None:
            self._joining.step(boundary, lr_kwargs)
        self._step(boundary, lr_kwargs)

    def _step(self, boundary, lr_kwargs=None):
        if self._watching:
            self._begin("step")
        self._step_applied = False
        if boundary:
            self._managed.store.set_step(self.global_steps)
            self._update()
            self._after_update(lr_kwargs)
        self._scaled = False
        self._set_default_scale()
        self.micro_steps += 1
        self.tput_timer.stop(global_step=boundary)
        if self._watching:
            self._end("step")
        if self._reporting:
            self._report(boundary)
        if boundary:
            self._collect_save()

    def _update(self):
        try:
            self.optimizer.step()
        except Exception:
            if self.optimizer.torn:
                self._half_loaded = f"the update of step {self.global_steps}"
            raise

    def _after_update(self, lr_kwargs):
        self._global_grad_norm = self.optimizer.get_global_norm()
        if self.optimizer.overflow:
            self.skipped_steps += 1
        else:
            self._step_applied = True
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        flight.state.step = self.global_steps  # what comes now belongs to the next step
        self._managed.store.set_step(self.global_steps)
        self.global_samples += self._samples_of_update()

    def was_step_applied(self):
        """Whether the last step() updated the parameters."""
        return self._step_applied

    def get_global_grad_norm(self):
        """The global gradient norm of the last step, before clipping; None before the first."""
        return self._global_grad_norm

    def zero_grad(self, set_to_none=True):
        """Forgets gradients: those accumulated by the engine, and any on parameters it does not train."""
        self._refuse_without_states("zero_grad", "lp_grads")
        for parameter in self.module.parameters():
            parameter.grad = None
        if self._managed is not None and self._managed.reducer is not None:
            self._managed.reducer.zero()

    def join(self):
        """Context for loops whose ranks have different numbers of batches: a rank that is done keeps taking part with zeros.

        Any number of forwards, backwards and steps a batch, also with the boundary set by the caller. RuntimeError on every rank when
        ranks that still have data do different things.
        """
        return Join(self)

    # ---- mode, life

    def train(self, mode=True):
        super().train(mode)
        return self

    def eval(self):
        return self.train(False)

    def empty_partition_cache(self):
        """Frees gathered units and the memory kept for gathering."""
        if self._managed is not None:
            self._managed.store.release_all()
            self._managed.store.trim_pool()

    def collect_python_gc(self):
        gc.collect()

    def destroy(self):
        """Takes the engine off the model and returns its memory. Parameters sharded at stage 3 stay so, held by the model. States
        that are away come back first. Collective."""
        self.reload_states()
        try:
            self._finish_save()
        finally:
            self._let_go()

    def _let_go(self):
        if self._managed is not None and not self._managed.closed:
            self._managed.transports.shard.barrier("destroy")  # nobody may still be gathering from this rank
        if isinstance(self.optimizer, build.ShardedOptimizer):
            self.optimizer.destroy()
        if self._managed is not None:
            self._managed.settle(self.module)
        self.optimizer = self.basic_optimizer = self.lr_scheduler = self.client_optimizer = self.client_lr_scheduler = None
        self.param_names = {}
        self._managed = self._half_loaded = None
        self._destroyed = True
        self.monitor.close()


def _settle(managed, module):
    """The engine was dropped without destroy(); the model may live on. Nothing of `managed` refers to the engine."""
    module = module()
    if module is not None:
        managed.settle(module)


class _HalfLoadedGuard:
    """A hook on the model, for as long as its engine lives. Copies and pickles of the model carry one that does nothing."""

    def __init__(self, engine=None):
        self._engine = weakref.ref(engine) if engine is not None else None

    def __call__(self, *_):
        engine = self._engine() if self._engine is not None else None
        if engine is not None:
            engine._refuse_half_loaded()

    def __reduce__(self):
        return _HalfLoadedGuard, ()


class _StepNumber:
    """Reads the engine's step without holding the engine."""

    def __init__(self, engine):
        self._engine = weakref.ref(engine)

    def __call__(self):
        engine = self._engine()
        return engine.global_steps if engine is not None else -1
