# SPDX-License-Identifier: Apache-2.0
"""Directories of files to be written."""
import os


def ensure_directory_exists(filename):
    """Makes the directory that is to hold the file `filename`, and its parents."""
    os.makedirs(os.path.dirname(filename) or ".", exist_ok=True)
