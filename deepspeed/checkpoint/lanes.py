# SPDX-License-Identifier: Apache-2.0
"""What a rank writes, divided among threads. Each has a file of its own, since the system lets one thread at a time add to a file."""
from concurrent.futures import ThreadPoolExecutor

LEAST_BYTES = 64 << 20   # less is not worth a file and a thread
_ALIGN_NUMEL = 1024       # where a piece may be cut


def lanes_of(pieces, count):
    """`pieces` cut into at most `count` lists of about equally many bytes, in the same order."""
    total = bytes_of(pieces)
    count = max(1, min(count, total // LEAST_BYTES))
    lanes, room = [[]], -(-total // count)
    left = room
    for piece in pieces:
        done, numel = 0, piece.data.numel()
        while numel - done > left // piece.data.element_size() and len(lanes) < count:
            here = left // piece.data.element_size() // _ALIGN_NUMEL * _ALIGN_NUMEL
            if here:
                lanes[-1].append(piece._replace(begin=piece.begin + done, data=piece.data[done:done + here]))
            done += here
            lanes.append([])
            left = room
        lanes[-1].append(piece._replace(begin=piece.begin + done, data=piece.data[done:]) if done else piece)
        left -= (numel - done) * piece.data.element_size()
    return [lane for lane in lanes if lane]


def lane_name(name, number):
    return name if number == 0 else name.replace(".safetensors", f".{number}.safetensors")


def bytes_of(pieces):
    return sum(p.data.numel() * p.data.element_size() for p in pieces)


def abreast(work, arguments, threads):
    """[work(*a) for a in arguments], in that many threads; all have ended when the first error is raised."""
    if threads == 1 or len(arguments) == 1:
        return [work(*a) for a in arguments]
    with ThreadPoolExecutor(threads, thread_name_prefix="deepspeed-checkpoint-writer") as pool:
        return list(pool.map(lambda a: work(*a), arguments))
