# SPDX-License-Identifier: Apache-2.0
"""Events as TensorBoard scalars (package tensorboard, through torch.utils.tensorboard)."""
from deepspeed.telemetry.monitors.sink import Monitor, need_package, number, own_folder, release_folder


class TensorBoardMonitor(Monitor):
    """Event files under `<output_path>/<job_name>`; the step of a scalar is the number of samples seen."""

    def __init__(self, tensorboard_config):
        super().__init__(tensorboard_config)
        self.output_path, self.job_name = tensorboard_config.output_path, tensorboard_config.job_name
        self.summary_writer = self.log_dir = None
        if self.writes:
            self.get_summary_writer()

    def get_summary_writer(self):
        """The SummaryWriter, made at the first call; None where nothing is written."""
        if self.writes and self.summary_writer is None:
            need_package("tensorboard", "tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter
            self.log_dir = self.log_dir or own_folder(self, "tensorboard")
            self.summary_writer = SummaryWriter(log_dir=self.log_dir)
        return self.summary_writer

    def write_events(self, event_list, flush=True):
        if not self.writes:
            return
        writer = self.get_summary_writer()
        for name, value, step in event_list:
            writer.add_scalar(name, number(value), number(step))
        if flush:
            writer.flush()

    def flush(self):
        if self.summary_writer is not None:
            self.summary_writer.flush()

    def close(self):
        if self.summary_writer is not None:
            self.summary_writer.close()
            self.summary_writer = None
        release_folder(self)
