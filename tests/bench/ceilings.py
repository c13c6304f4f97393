# SPDX-License-Identifier: Apache-2.0
"""What this machine can do right now: one thread a rank, all ranks at once. Started by torchrun like train_step.py; rank 0 prints
JSON with the slowest rank's figures. copy: bytes read plus bytes written; sgemm: 2 flops a multiply-add, 1024 x 1024 matrices."""
import json
import os
import time

import torch
import torch.distributed as dist


def best(work, repeats=7):
    work()
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    source = torch.ones(128 * 2**20 // 4)
    target = torch.empty_like(source)
    copy_gbs = 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9
    a, b, c = torch.ones(1024, 1024), torch.ones(1024, 1024), torch.empty(1024, 1024)
    sgemm_gflops = 2 * 1024**3 / best(lambda: torch.mm(a, b, out=c)) / 1e9
    slowest = torch.tensor([copy_gbs, sgemm_gflops])
    dist.all_reduce(slowest, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"copy_gbs": slowest[0].item(), "sgemm_gflops": slowest[1].item(), "load": os.getloadavg()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
