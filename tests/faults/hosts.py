# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces each with its host name, processes, sshd and cable."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from tests.faults.job import ROOT, alive, marked


# What the launcher starts on a host does not see the processes of the others, so neither shared memory nor signals connect them.
_OWN_PROCESSES = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not():
    """What this machine lacks for it, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("sshd", "openssh-server"), ("ssh", "openssh-client"), ("unshare", "util-linux")):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            return f"{program} is not installed ({package})"
    if subprocess.run(["unshare", "--net", "--uts", *_OWN_PROCESSES, "true"], capture_output=True).returncode:
        return "this machine (a container?) does not let root create network namespaces"
    return None


class Hosts:
    """``names`` are what the hosts call each other. Use as a context manager."""

    def __init__(self, count=2):
        mark = uuid.uuid4().hex[:6]
        self.names = [f"ds{mark}{chr(ord('a') + i)}" for i in range(count)]
        self.addresses = [f"10.213.7.{i + 1}" for i in range(count)]
        self.folder = Path(tempfile.mkdtemp(prefix="deepspeed-hosts-"))
        self._servers = []

    def __enter__(self):
        try:
            self._keys()
            self._network()
            for name in self.names:
                self._serve(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for server in self._servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def switch(self):
        """The namespace that holds the other ends of all cables."""
        return self.names[0][:-1] + "sw"

    def _keys(self):
        for key in ("host_key", "user_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n")
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n")

    def _network(self):
        _do("ip", "netns", "add", self.switch)
        _do("ip", "-n", self.switch, "link", "add", "name", "sw0", "type", "bridge")
        _do("ip", "-n", self.switch, "link", "set", "sw0", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(self.addresses, self.names))
        for name, address in zip(self.names, self.addresses):
            Path(f"/etc/netns/{name}").mkdir(parents=True)
            Path(f"/etc/netns/{name}/hosts").write_text(table)
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", self.switch)
            _do("ip", "-n", self.switch, "link", "set", name, "master", "sw0", "up")
            _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _do("ip", "-n", name, "link", "set", link, "up")

    def _serve(self, name):
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
        command = [*self.inside(name, *_OWN_PROCESSES), sshd, "-D", "-e", "-f", self.folder / "sshd_config"]
        with open(self.folder / f"{name}.log", "w") as log:
            self._servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True))
        end = time.monotonic() + 10
        while subprocess.run(["ip", "netns", "exec", name, "ssh", "-F", self.folder / "ssh_config", name, "true"],
                             capture_output=True).returncode:
            assert time.monotonic() < end, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def inside(self, name, *more):
        """Command prefix that makes a program run on a host."""
        return ["ip", "netns", "exec", name, "unshare", "--uts", *more, "sh", "-c", 'hostname "$0"; exec "$@"', name]

    def cut(self, name):
        """Pull the cable of a host, at the end of the switch: the host itself notices nothing."""
        _do("ip", "-n", self.switch, "link", "set", name, "down")

    def mend(self, name):
        _do("ip", "-n", self.switch, "link", "set", name, "up")


def _do(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"


class HostsJob:
    """`deepspeed` on the first host, for a script on all of them. All its processes, and no others, carry DS_TEST_MARK."""

    def __init__(self, hosts, directory, script, flags=("--launcher", "ssh"), slots=1, env=(), timeout_s=4):
        self.hosts, self.directory, self.flags = hosts, Path(directory), flags
        (self.directory / "script.py").write_text(script)
        (self.directory / "hosts").write_text("".join(f"{name} slots={slots}\n" for name in hosts.names))
        self.mark = uuid.uuid4().hex
        self.env = dict(os.environ, PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", DS_TEST_MARK=self.mark, DS_HOST_TIMEOUT=str(timeout_s),
                        PDSH_SSH_ARGS_APPEND=f"-F {hosts.folder}/ssh_config", GLOO_SOCKET_IFNAME="eth0", **dict(env))
        (self.directory / ".deepspeed_env").write_text(f"# for the ranks\nTEST_DIR={self.directory}\n")

    def __enter__(self):
        flags = list(self.flags)
        if "ssh" in flags:
            flags = ["--launcher_args", f"-F {self.hosts.folder}/ssh_config", *flags]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "-H", "hosts", *flags, "script.py"]
        self.process = subprocess.Popen([*self.hosts.inside(self.hosts.names[0]), *command], cwd=self.directory, env=self.env, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.started = time.monotonic()
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def processes(self):
        """All living processes of the job, on every host."""
        return marked(self.mark)

    def survivors(self, within_s):
        end = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.02)
        return [(pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()) for pid in left if alive(pid)]

    def wait_for(self, pattern, count=1, timeout_s=40):
        """Until so many files of this pattern are in the directory."""
        end = time.monotonic() + timeout_s
        while len(list(self.directory.glob(pattern))) < count:
            if time.monotonic() > end or self.process.poll() is not None:
                self.process.kill()
                raise AssertionError(f"{pattern} did not come: {self.process.communicate()}")
            time.sleep(0.02)

    def finish(self, timeout_s=60):
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err
