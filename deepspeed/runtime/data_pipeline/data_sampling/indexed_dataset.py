# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.data."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.data.indexed_dataset",
            "IndexedCachedDataset", "IndexedDataset", "IndexedDatasetBuilder", "MMapIndexedDataset", "MMapIndexedDatasetBuilder", "code",
            "create_doc_idx", "data_file_path", "dataset_exists", "get_available_dataset_impl", "index_file_path", "infer_dataset_impl",
            "make_builder", "make_dataset"),
})
