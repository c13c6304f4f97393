# SPDX-License-Identifier: Apache-2.0
"""Events to Weights & Biases (package wandb)."""
from deepspeed.telemetry.monitors.sink import Monitor, need_package, number


class WandbMonitor(Monitor):
    """A run of the project; one that the script has started already is used as it is."""

    def __init__(self, wandb_config):
        super().__init__(wandb_config)
        self.group, self.team, self.project = wandb_config.group, wandb_config.team, wandb_config.project
        self.run = None
        if self.writes:
            wandb = need_package("wandb", "wandb", "wandb")
            self.run = wandb.init(project=self.project, group=self.group, entity=self.team)

    def log(self, data, step=None, commit=None, sync=None):
        """wandb's own call. `sync` belongs to old versions of wandb and is not passed on."""
        if self.writes:
            self.run.log(data, step=step, commit=commit)

    def write_events(self, event_list):
        if not self.writes:
            return
        of_step = {}  # wandb takes all values of a step together, and no step twice
        for name, value, step in event_list:
            of_step.setdefault(number(step), {})[name] = number(value)
        for step, values in of_step.items():
            self.run.log(values, step=step)
