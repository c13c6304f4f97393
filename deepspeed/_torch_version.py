# SPDX-License-Identifier: Apache-2.0
"""Which torch is installed."""
import torch


def required_torch_version(min_version=None, max_version=None):
    """Whether the installed torch is at least `min_version` and at most `max_version`; None sets no bound."""
    if min_version is None and max_version is None:
        raise ValueError("required_torch_version needs min_version, max_version or both")
    # Only the release counts: "2.11.0+cu130" is 2.11.0.
    installed = torch.torch_version.TorchVersion(torch.__version__.split("+")[0])
    if min_version is not None and installed < str(min_version):
        return False
    return max_version is None or installed <= str(max_version)
