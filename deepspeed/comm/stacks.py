# SPDX-License-Identifier: Apache-2.0
"""Where the threads of this process are in their Python code, for machines and for people. No torch.

The stacks are read by another thread: it needs the interpreter lock only, so it does not matter whether the thread it looks at
runs Python, sleeps in the kernel or waits in C++.
"""
import os
import sys
import threading
import traceback

MOST_FRAMES = 64


def all_stacks(leave_out=()):
    """[{"thread", "main", "frames": [[file, line, function, source text], ...]}], innermost frame last, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    mine = threading.get_ident()
    found = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, f"thread {ident}")
        if (ident == mine and ident != main) or name in leave_out or name.startswith("deepspeed-watch"):
            continue
        frames = [[f.filename, f.lineno, f.name, f.line or ""] for f in traceback.extract_stack(frame, limit=-MOST_FRAMES)]
        found.append({"thread": name, "main": ident == main, "frames": frames})
    return sorted(found, key=lambda stack: not stack["main"])


def innermost(stacks):
    """The frame of the main thread that runs, or None."""
    for stack in stacks:
        if stack["main"] and stack["frames"]:
            return stack["frames"][-1]
    return None


_LIBRARIES = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep, os.sep + "torch" + os.sep)
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STANDARD = os.path.dirname(os.path.abspath(threading.__file__)) + os.sep


def own_line(stacks):
    """"train.py:12 in main": the innermost line of the main thread that is the user's own, or the innermost of all."""
    for stack in stacks:
        if not stack["main"]:
            continue
        for file, line, function, _ in reversed(stack["frames"]):
            if not file.startswith((_OWN, _STANDARD, "<frozen")) and not any(part in file for part in _LIBRARIES):
                return f"{file}:{line} in {function}"
        if stack["frames"]:
            file, line, function, _ = stack["frames"][-1]
            return f"{file}:{line} in {function}"
    return "unknown"


def as_text(frames, indent, most=24):
    """The innermost frames as Python prints them, without the header that marks a traceback."""
    lines = []
    if len(frames) > most:
        lines.append(f"{indent}... {len(frames) - most} outer calls left out")
    for file, line, function, source in frames[-most:]:
        lines.append(f'{indent}File "{file}", line {line}, in {function}')
        if source:
            lines.append(f"{indent}  {source}")
    return "\n".join(lines)
