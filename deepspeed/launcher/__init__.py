# SPDX-License-Identifier: Apache-2.0
"""Starting a job: one process per GPU (or per CPU share) of this host. Imports neither torch nor anything slow."""
