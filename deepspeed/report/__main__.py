# SPDX-License-Identifier: Apache-2.0
from deepspeed.report.command import cli_main

cli_main()
