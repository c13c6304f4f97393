# SPDX-License-Identifier: Apache-2.0
"""Talking to the other ranks: `from deepspeed import comm as dist`. Group handles are torch ProcessGroups."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.comm.process_group", "init_distributed", "is_available", "is_initialized", "destroy_process_group",
            "new_group", "get_rank", "get_world_size", "get_local_rank", "get_global_rank", "get_world_group",
            "get_all_ranks_from_group", "initialize_mesh_device", "set_backend", "enable_symm_mem_for_group",
            "ProcessGroup", "NotInitializedError", "BackendError"),
    **names("deepspeed.comm.collectives", "broadcast", "broadcast_object_list", "reduce", "gather", "scatter", "all_reduce",
            "inference_all_reduce", "all_reduce_coalesced", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_fn",
            "all_gather", "all_gather_object", "all_gather_into_tensor", "allgather_fn", "all_gather_coalesced",
            "all_to_all_single", "all_to_all", "send", "recv", "isend", "irecv", "P2POp", "batch_isend_irecv", "barrier",
            "monitored_barrier", "has_all_gather_into_tensor", "has_reduce_scatter_tensor", "has_all_reduce_coalesced",
            "has_coalescing_manager"),
    **names("deepspeed.comm.recorder", "configure", "log_summary", "reset_log", "has_comm_data", "get_logged_comm_ops",
            "get_comm_operation_count"),
    **names("deepspeed.comm.reduce_op", "ReduceOp"),
    **names("deepspeed.comm.rendezvous", "RendezvousError"),
    **names("deepspeed.constants", "default_pg_timeout", "TORCH_DISTRIBUTED_DEFAULT_PORT"),
    **{name: f"deepspeed.comm.{name}"
       for name in ("comm", "torch", "utils", "constants", "config", "groups", "rendezvous", "process_group", "collectives",
                    "recorder")},
})
