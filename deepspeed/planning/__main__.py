# SPDX-License-Identifier: Apache-2.0
from deepspeed.planning.command import main

main()
