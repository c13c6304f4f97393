# SPDX-License-Identifier: Apache-2.0
"""Weights out of checkpoints into the files other programs read, tensor by tensor, without torch."""
