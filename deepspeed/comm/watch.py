# SPDX-License-Identifier: Apache-2.0
"""Notices ranks that wait for each other in vain, says on rank 0 who waits for whom and where everybody is, and ends the job.

Note [The watch]: every rank has a thread that looks, about once a second, which collectives the rank's threads are blocked in. It
needs nothing from the training thread but Python's lock, which that gives up while it waits in C++. One question a second goes to
the rendezvous store (a connection of its own; TCP, so it works across hosts and with every backend): has somebody raised the
alarm? A rank that has waited in one collective for longer than the silence allowed raises it. Then every rank writes its flight
record to a file and its report into the store; rank 0 composes the diagnosis from the reports, prints it, and all leave with
EXIT_CODE. Ranks that cannot report (stopped, stuck with Python's lock) are killed by ranks of the same host.

Note [If rank 0 is the one that is stuck]: where the store outlives it (torchrun keeps it in its own process) the next rank that
has reported speaks instead. Where the store stops with it, each rank knows only what it waits in itself; one rank a host speaks.

Note [SIGTERM]: it keeps its default action. A handler in Python would run only after the C++ call that the rank is stuck in, so
ranks that a launcher ends after another's failure write their flight records when that one raises the alarm, just before it ends.

Note [Time that counts]: a suspended process must not count as silence, so a wait's age is summed over the turns of this thread,
none of which counts for much longer than it can last by itself.
"""
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from deepspeed._environment import read
from deepspeed.comm import flight, peer, verdict
from deepspeed.constants import default_pg_timeout
from deepspeed.telemetry.logs import logger

EXIT_CODE = 124  # as timeout(1) has it
STORE_PATIENCE_S = 5.0
AFTER_ERROR_S = 15.0  # how long ranks may wait for one that has failed, if the launcher does not end them


class StoreLost(RuntimeError):
    """The rendezvous store does not answer."""


class Courier:
    """Questions to the store from a thread of its own: some never return while the store's process is stopped."""

    def __init__(self, store):
        self._store = store
        self._work = queue.SimpleQueue()
        self._unanswered = None
        self._thread = threading.Thread(target=self._run, name="deepspeed-watch-store", daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            job = self._work.get()
            if job is None:
                return
            method, args, answer = job
            try:
                answer.put((True, getattr(self._store, method)(*args)))
            except Exception as error:
                answer.put((False, error))

    def ask(self, method, *args):
        if self._unanswered is not None and self._unanswered.empty():
            raise StoreLost(f"no answer in {STORE_PATIENCE_S:g} s")
        self._unanswered = None
        answer = queue.SimpleQueue()
        self._work.put((method, args, answer))
        try:
            ok, value = answer.get(timeout=STORE_PATIENCE_S)
        except queue.Empty:
            self._unanswered = answer
            raise StoreLost(f"no answer in {STORE_PATIENCE_S:g} s") from None
        if not ok:
            raise StoreLost(str(value).splitlines()[0] if str(value) else type(value).__name__)
        return value

    def get(self, key):
        """The value of a key as JSON, None while it is not there."""
        return json.loads(self.ask("get", key)) if self.ask("check", [key]) else None

    def set(self, key, value):
        self.ask("set", key, json.dumps(value))

    def close(self):
        self._work.put(None)
        self._thread.join(timeout=1.0)


class Settings:
    """silence_s 0: off. folder "": no flight records."""

    def __init__(self, pg_timeout=default_pg_timeout, section=None):
        own = 0.8 * pg_timeout.total_seconds()
        configured = own
        if section is not None and not section.enabled:
            configured = 0.0
        elif section is not None and section.silence_s is not None:
            configured = float(section.silence_s)
        asked = read("DS_HANG_SILENCE_S")
        self.silence_s = configured if asked is None else asked
        self.pg_timeout_s = pg_timeout.total_seconds()
        folder = read("DS_FLIGHT_RECORD")
        if folder is None:
            folder = section.flight_record if section is not None else None
        self.folder = flight.default_folder() if folder is None else folder
        if self.silence_s < 0:
            raise ValueError(f"DS_HANG_SILENCE_S must not be negative, got {self.silence_s:g}")

    @property
    def wait_limit_s(self):
        """When a blocked collective of the engine gives up by itself: after the watch would have ended the job."""
        return max(self.pg_timeout_s, 1.25 * self.silence_s)


class Watch(threading.Thread):

    def __init__(self, store, settings):
        super().__init__(name="deepspeed-watch", daemon=True)
        self.settings = settings
        self.me = flight.who()
        self.pid = os.getpid()
        self._courier = Courier(store)
        self._stopped = threading.Event()
        self._ages = {}         # wait -> seconds
        self._turn_at = time.monotonic()
        self._recorded = False
        self.answering = False  # an alarm was raised: this thread is about to end the process
        self._rank0 = None
        self._introduced = False

    @property
    def turn_s(self):
        busiest = min(5.0, max(1.0, self.me["world_size"] / 512))  # questions to the store: 512 a second at most
        return max(0.1, min(busiest, self.settings.silence_s / 10))

    def stop(self):
        self._stopped.set()
        if threading.current_thread() is not self and self.pid == os.getpid():
            self.join(timeout=STORE_PATIENCE_S)
            self._courier.close()

    # ---- every turn

    def run(self):
        while not self._stopped.is_set():  # the first turn at once: a rank that stops in its first second has said who it is
            oldest_s = 0.0
            try:
                oldest_s = self._oldest_wait_s()
                self._turn(oldest_s)
            except StoreLost as lost:
                if oldest_s >= self.settings.silence_s and not self._stopped.is_set():
                    self._end_alone(str(lost))
            except Exception as error:  # a broken watch must not end a healthy job
                if not self._stopped.is_set() and dist.is_initialized():
                    logger.warning(f"hang detection stops: {type(error).__name__}: {error}")
                return
            self._stopped.wait(self.turn_s)

    def _turn(self, oldest_s):
        if not self._introduced:
            self._courier.set(f"who/{self.me['rank']}", self.me)
            self._introduced = True
        if self._rank0 is None:
            self._rank0 = self._courier.get("who/0")
        alarm = self._courier.get("alarm")
        if alarm is not None and alarm["kind"] == "error":
            self.record(f"rank {alarm['rank']} failed: {alarm['text']}")
            self._courier.ask("set", f"recorded/{self.me['rank']}", "1")
        limit_s = self.settings.silence_s
        if alarm is not None and alarm["kind"] == "error":
            limit_s = min(limit_s, AFTER_ERROR_S)
        if oldest_s >= limit_s:
            self._courier.set("alarm", {"kind": "silence", "rank": self.me["rank"], "cause": alarm})
            alarm = {"kind": "silence"}
        if alarm is not None and alarm["kind"] == "silence":
            self._answer(limit_s)

    def _oldest_wait_s(self):
        now = time.monotonic()
        passed, self._turn_at = min(now - self._turn_at, 2 * self.turn_s + STORE_PATIENCE_S), now
        here = {(wait["group"], wait["seq"]) for wait in waits_of_this_rank()}
        self._ages = {wait: self._ages.get(wait, -passed) + passed for wait in here}
        return max(self._ages.values(), default=0.0)

    # ---- the alarm

    def record(self, reason):
        """Writes this rank's flight record, once."""
        if self._recorded or not self.settings.folder:
            return
        self._recorded = True
        try:
            flight.write(self.settings.folder, flight.snapshot(self.me, reason))
        except OSError as error:
            logger.warning(f"no flight record: {error}")

    def _answer(self, silence_s):
        rank = self.me["rank"]
        self.answering = True
        report = flight.snapshot(self.me, "hang", kept=flight.KEPT_IN_REPORT)
        report["waits"] = waits_of_this_rank()
        self._courier.set(f"report/{rank}", report)
        self.record("hang")
        patience_s = 3.0 + 2 * self.turn_s
        began = time.monotonic()
        while True:
            found = self._courier.get("verdict")
            if found is not None:
                self._leave(found)
            waited_s = time.monotonic() - began
            all_here = rank == 0 and self._reported() == self.me["world_size"]
            my_turn = all_here or waited_s > patience_s + (0 if rank == 0 else 2.0 + 0.2 * min(rank, 10))
            if my_turn and self._courier.ask("add", "speaker", 1) == 1:
                self._speak(silence_s)
            if self._stopped.wait(0.05):
                return

    def _reported(self):
        return sum(bool(self._courier.ask("check", [f"report/{r}"])) for r in range(self.me["world_size"]))

    def _speak(self, silence_s):
        reports, silent, processes = {}, {}, []
        for rank in range(self.me["world_size"]):
            report = self._courier.get(f"report/{rank}")
            if report is not None:
                reports[rank] = report
            else:
                who = self._courier.get(f"who/{rank}")
                silent[rank] = peer.why_silent(who)
                processes += [who] if who is not None else []
        cause = (self._courier.get("alarm") or {}).get("cause")
        if cause and cause["rank"] in silent:
            silent[cause["rank"]] = f"it failed: {cause['text']}"
        text = verdict.compose(reports, silent, silence_s, time.time(), self.settings.folder)
        say(text)
        self._courier.set("verdict", {"kill": processes, "reports": len(reports)})
        self._leave({"kill": processes, "reports": len(reports)}, speaker=True)

    def _leave(self, found, speaker=False):
        """All have heard the verdict before the first one goes: a rank that misses another would report that as its own failure."""
        try:
            left = self._courier.ask("add", "left", 1)
            end = time.monotonic() + 3.0
            while left < found["reports"] and time.monotonic() < end:
                time.sleep(0.05)
                left = self._courier.ask("add", "left", 0)
            if not speaker:
                time.sleep(0.5)  # the one who has spoken shall be the first to fail; the store may live in its process
        except StoreLost:
            pass
        for who in found["kill"]:
            peer.kill(who)
        leave()

    def _end_alone(self, why):
        """The store is gone. See Note [If rank 0 is the one that is stuck]."""
        self.answering = True
        self.record(f"the rendezvous store does not answer: {why}")
        claim = socket.socket(socket.AF_UNIX)
        key = self._rank0["start_ticks"] if self._rank0 else read("MASTER_PORT")
        try:
            claim.bind(f"\0deepspeed-hang-{os.getuid()}-{key}")
        except OSError:  # another rank of this host speaks
            time.sleep(0.5)
            leave()
        silent = {0: peer.why_silent(self._rank0)} if self.me["rank"] != 0 else {}
        report = flight.snapshot(self.me, "hang", kept=flight.KEPT_IN_REPORT)
        report["waits"] = waits_of_this_rank()
        say(verdict.compose({self.me["rank"]: report}, silent, self.settings.silence_s, time.time(), self.settings.folder)
            + f"\n  (the rendezvous store, in the process of rank 0, does not answer: {why}; this is what rank {self.me['rank']} knows)")
        time.sleep(3.0)  # the others notice by themselves, and shall see the claim
        if self._rank0 is not None and self.me["rank"] != 0:
            peer.kill(self._rank0)
        leave()

    # ---- an exception nobody caught

    def failed(self, text):
        """This rank is about to end: leaves its record, and time for the others to write theirs before the launcher ends them."""
        self.record(text)
        try:
            if self._courier.get("alarm") is None:
                self._courier.set("alarm", {"kind": "error", "rank": self.me["rank"], "text": text})
                end = time.monotonic() + 1.5 * self.turn_s + 0.2
                others = [r for r in range(self.me["world_size"]) if r != self.me["rank"]]
                while time.monotonic() < end and not all(self._courier.ask("check", [f"recorded/{r}"]) for r in others):
                    time.sleep(0.05)
        except StoreLost:
            pass


def say(text):
    os.write(2, ("\n[deepspeed] " + text + "\n").encode(errors="replace"))


def leave():
    """The training thread may be stuck in C++: no exception would reach it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed pipe or stream has nobody left to read it
                stream.flush()
    os._exit(EXIT_CODE)


# ---------------------------------------------------------------------------------------------- torch's own collectives
_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")


def waits_of_this_rank():
    """flight.waits(), and a collective of torch.distributed that the main thread has called directly."""
    found = flight.waits()
    main = threading.main_thread().ident
    if found or main in flight.state.open:
        return found
    frame = sys._current_frames().get(main)
    if frame is None or not frame.f_code.co_filename.endswith(_C10D):
        return found
    function, number = frame.f_code.co_name, _torch_number()
    ranks = list(range(dist.get_world_size()))
    return [dict(kind=f"torch.distributed.{function}", seq=number, order=0, step=-1, phase="", unit=-1, bytes=0, state="issued",
                 group="torch", label="called directly", ranks=ranks, since_s=time.time())]


def _torch_number():
    """Grows with every collective that torch's process groups carry."""
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            total += group._get_sequence_number_for_group()
        except RuntimeError:  # a backend that does not count
            pass
    return total


# --------------------------------------------------------------------------------------------------------- one a process
_watch = None
_settings = None
_hook_before = None


def settings():
    """What holds now; made from the environment alone before `start`."""
    global _settings
    if _settings is None:
        _settings = Settings()
    return _settings


def start(pg_timeout=None, section=None):
    """Starts the watch of this process, or changes its settings. Harmless when repeated, and without a process group."""
    global _settings, _watch
    before = _settings
    if pg_timeout is None:
        pg_timeout = timedelta(seconds=before.pg_timeout_s) if before is not None else default_pg_timeout
    if section is not None or before is None or _watch is None:
        _settings = Settings(pg_timeout, section)
    if not dist.is_initialized() or dist.get_world_size() == 1 or _settings.silence_s == 0:
        stop()
        return
    if _watch is not None and _watch.is_alive() and _watch.pid == os.getpid():
        _watch.settings = _settings
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        store = store.clone()
    except RuntimeError:
        logger.warning(f"hang detection is off: {type(store).__name__} cannot be used from two threads")
        return
    store.set_timeout(timedelta(seconds=STORE_PATIENCE_S))
    _watch = Watch(dist.PrefixStore("deepspeed/watch", store), _settings)
    _watch.start()
    _install_hook()


def stop():
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def _install_hook():
    global _hook_before
    if _hook_before is None:
        import atexit
        _hook_before = sys.excepthook
        sys.excepthook = _on_uncaught
        atexit.register(stop)  # a thread inside C++ must not outlive the interpreter


def _on_uncaught(kind, error, trace):
    mine = _watch is not None and _watch.pid == os.getpid()
    if mine and _watch.answering:
        _watch.join(timeout=15.0)  # a consequence of the hang; the watch ends the process
    _hook_before(kind, error, trace)
    if mine and not issubclass(kind, KeyboardInterrupt):
        sys.stderr.flush()
        first = str(error).splitlines()[0] if str(error) else ""
        _watch.failed(f"{kind.__name__}: {first}"[:400])

