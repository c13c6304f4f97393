# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that others wrote: torch's pickled files, DeepSpeed's folders of them, and its universal format."""
