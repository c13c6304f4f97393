# SPDX-License-Identifier: Apache-2.0
"""Events as CSV: one file a measure, `step,<last part of its name>` in the first line.

A run that is started again in the same directory appends; a second engine of the same process gets a directory of its own.
What it repeats after a resume stands there twice: `read_csv` takes the later.
"""
import csv
import os
import re

from deepspeed.telemetry.monitors.sink import Monitor, cannot_write, number, own_folder, release_folder


class csvMonitor(Monitor):
    """Files `<output_path>/<job_name>/<name with _ for />.csv`. Every call of `write_events` ends with all its rows in the files."""

    def __init__(self, csv_config):
        super().__init__(csv_config)
        self.output_path, self.job_name = csv_config.output_path, csv_config.job_name
        self.log_dir = None
        self._files = {}
        if self.writes:
            self.log_dir = own_folder(self, "csv_monitor")

    @property
    def filenames(self):
        return list(self._files)

    def write_events(self, event_list):
        if not self.writes:
            return
        touched = {}
        for name, value, step in event_list:
            stem = re.sub(r"[^\w.=+-]", "_", name)
            out = self._files.get(stem)
            if out is None:
                out = self._files[stem] = self._open(stem, name.rpartition("/")[2])
            csv.writer(out, lineterminator="\n").writerow([number(step), number(value)])
            touched[stem] = out
        for out in touched.values():
            out.flush()

    def _open(self, stem, measure):
        path = os.path.join(self.log_dir, stem + ".csv")
        try:
            return _open_for_rows(path, measure)
        except OSError as error:
            raise cannot_write("csv_monitor", path, error) from error

    def close(self):
        for out in self._files.values():
            out.close()
        self._files = {}
        release_folder(self)


def _open_for_rows(path, measure):
    """The file, at its end: with a header if it is new, without the row that a killed writer left unfinished."""
    with open(path, "ab+") as raw:
        end = raw.seek(0, os.SEEK_END)
        tail_at = max(0, end - 4096)
        raw.seek(tail_at)
        tail = raw.read()
        if tail and not tail.endswith(b"\n"):
            raw.truncate(tail_at + tail.rfind(b"\n") + 1)
        empty = raw.seek(0, os.SEEK_END) == 0
    out = open(path, "a", newline="", encoding="utf-8")
    if empty:
        csv.writer(out, lineterminator="\n").writerow(["step", measure])
    return out


def read_csv(path):
    """{step: value} of a file that csvMonitor wrote, by rising step; of a step written more than once, the last value."""
    points = {}
    with open(path, newline="", encoding="utf-8") as rows:
        for row in csv.reader(rows):
            if len(row) == 2 and row[0] != "step":  # DeepSpeed repeats the header at every start
                try:
                    points[int(float(row[0]))] = float(row[1])
                except ValueError:
                    raise ValueError(f"{path}: {','.join(row)!r} is not a row of step and value") from None
    return dict(sorted(points.items()))
