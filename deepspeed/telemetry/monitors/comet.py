# SPDX-License-Identifier: Apache-2.0
"""Events to Comet (package comet_ml)."""
from deepspeed.telemetry.monitors.sink import Monitor, need_package, number


class CometMonitor(Monitor):
    """An experiment as comet_ml.start finds or makes it; keys that are null are left to Comet's own configuration.

    Of each measure a point is sent at most every `samples_log_interval` samples.
    """

    def __init__(self, comet_config):
        super().__init__(comet_config)
        self.samples_log_interval = comet_config.samples_log_interval
        self.experiment = None
        self._sent_at = {}
        if self.writes:
            comet_ml = need_package("comet_ml", "comet_ml", "comet")
            keys = ("api_key", "workspace", "project", "experiment_key", "mode", "online")
            given = {key: getattr(comet_config, key) for key in keys if getattr(comet_config, key) is not None}
            self.experiment = comet_ml.start(**given)
            if comet_config.experiment_name is not None:
                self.experiment.set_name(comet_config.experiment_name)

    def write_events(self, event_list):
        if not self.writes:
            return
        for name, value, step in event_list:
            step, last = number(step), self._sent_at.get(name)
            if last is None or step - last >= self.samples_log_interval:
                self._sent_at[name] = step
                self.experiment.log_metric(name, number(value), step=step)

    def close(self):
        if self.experiment is not None:
            self.experiment.flush()
