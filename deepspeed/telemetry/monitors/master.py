# SPDX-License-Identifier: Apache-2.0
"""All monitors of a run behind one door. None of them can end the training."""
from deepspeed.telemetry.logs import current_rank, logger
from deepspeed.telemetry.monitors.comet import CometMonitor
from deepspeed.telemetry.monitors.csv_files import csvMonitor
from deepspeed.telemetry.monitors.sink import Monitor
from deepspeed.telemetry.monitors.tensorboard import TensorBoardMonitor
from deepspeed.telemetry.monitors.wandb import WandbMonitor

# attribute of MonitorMaster -> (section of the configuration, class)
_KINDS = {
    "tb_monitor": ("tensorboard", TensorBoardMonitor),
    "wandb_monitor": ("wandb", WandbMonitor),
    "csv_monitor": ("csv_monitor", csvMonitor),
    "comet_monitor": ("comet", CometMonitor),
}


class MonitorMaster(Monitor):
    """Hands events to every enabled monitor.

    monitor_config: an object with the attributes `tensorboard`, `wandb`, `csv_monitor`, `comet` (a `Config`, or
    `DeepSpeedConfig(...).monitor_config`). On ranks other than 0 no monitor is opened.

    A monitor that cannot be opened or written to is warned about once and training goes on. One that cannot be opened stays None; one
    that fails to write is tried again with the next events.
    """

    def __init__(self, monitor_config):
        self.monitor_config = monitor_config
        self.enabled = any(getattr(monitor_config, section).enabled for section, _ in _KINDS.values())
        self._failed = set()
        for attribute, (section, kind) in _KINDS.items():
            setattr(self, attribute, self._open(section, kind))

    def _open(self, section, kind):
        part = getattr(self.monitor_config, section)
        if not part.enabled or current_rank():
            return None
        try:
            return kind(part)
        except Exception as error:  # a missing package, a full disk, a refused login: none is worth a training run
            logger.warning(f"{section}: this monitor is off: {error}")
            return None

    def _each(self, action):
        for attribute, (section, _) in _KINDS.items():
            monitor = getattr(self, attribute)
            if monitor is None:
                continue
            try:
                action(monitor)
            except Exception as error:
                if section not in self._failed:
                    self._failed.add(section)
                    logger.warning(f"{section}: events were lost: {type(error).__name__}: {error}; training goes on, "
                                   "this is not said again")

    def write_events(self, event_list):
        """event_list: (name, value, step) triples."""
        self._each(lambda monitor: monitor.write_events(event_list))

    def close(self):
        self._each(lambda monitor: monitor.close())
