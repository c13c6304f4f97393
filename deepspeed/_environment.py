# SPDX-License-Identifier: Apache-2.0
"""Every environment variable the Python side reads, in one table, and the only code that reads them."""
import os
from typing import NamedTuple


class Variable(NamedTuple):
    default: object
    convert: type
    meaning: str


VARIABLES = {
    "RANK": Variable(None, int, "number of this process among all"),
    "WORLD_SIZE": Variable(None, int, "number of processes"),
    "LOCAL_RANK": Variable(None, int, "number of this process on its host; chooses the device"),
    "LOCAL_SIZE": Variable(None, int, "number of processes on this host, as our launcher sets it"),
    "LOCAL_WORLD_SIZE": Variable(None, int, "the same, as torchrun sets it"),
    "MASTER_ADDR": Variable(None, str, "host of rank 0, where processes meet"),
    "MASTER_PORT": Variable(None, int, "port on that host"),
    "CROSS_RANK": Variable(None, int, "number of this host"),
    "CROSS_SIZE": Variable(None, int, "number of hosts"),
    "DEEPSPEED_TIMEOUT": Variable(10, int, "minutes after which a collective without an answer is an error"),
    "DS_ACCELERATOR": Variable(None, str, "cpu or cuda: overrides the detection of the device"),
    "DS_TRANSPORT": Variable("auto", str, "auto, shm or c10d: what carries the collectives of ZeRO"),
    "DS_HOST_TIMEOUT": Variable(20, int, "seconds of silence after which the launcher takes another host of the job for lost"),
    "DS_HANG_SILENCE_S": Variable(None, float, "seconds a collective may wait before the job is ended with a diagnosis; 0: for ever"),
    "DS_FLIGHT_RECORD": Variable(None, str, "folder for each rank's last collectives when the job fails"),
    "DS_ENV_FILE": Variable(".deepspeed_env", str, "file with KEY=VALUE lines the launcher exports"),
    "CUDA_VISIBLE_DEVICES": Variable(None, str, "the GPUs this process may see"),
}


class BadVariable(RuntimeError):
    """A variable holds a value that cannot be used."""


def read(name, environ=None):
    """The value of a variable of the table, converted; its default when it is unset or empty."""
    variable = VARIABLES[name]
    text = (os.environ if environ is None else environ).get(name)
    if text is None or text == "":
        return variable.default
    try:
        return variable.convert(text)
    except ValueError as error:
        raise BadVariable(f"environment variable {name}={text!r} is not {_article(variable.convert)} "
                                f"({variable.meaning})") from error


def _article(convert):
    return {int: "an integer", float: "a number"}.get(convert, f"a {convert.__name__}")
