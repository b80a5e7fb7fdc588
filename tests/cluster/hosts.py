"""Nodes that are hosts of their own as far as the network goes: each in a network namespace, on one bridge. Needs root.

The head and the drivers are at the bridge's own address, in a namespace of theirs too (`APART`): no bridge that an
earlier run left, and no rule of this machine's firewall, stands in their way. As a script it exits with 0 where all
this can be done, and hosts reach the head.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it must find the tests' other modules

from tests.cluster.conftest import RAY
from tests.cluster.nodes import Nodes

SUBNET = "10.199.77"
HEAD = f"{SUBNET}.1"
TRIES = 5
JOINS = 60.0
"""Seconds in which a host that runs has joined; else it is started anew."""
APART = ("unshare", "--net", "--pid", "--mount-proc", "--kill-child")
"""What the command of a process begins with that uses hosts: with it, whatever its end, all of them end."""


def ip(*words: str) -> str:
    """What the command `ip` says. Raises where it may not."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def bridge() -> str:
    """The name of a new one, at the head's address."""
    name = f"xlcb{os.getpid()}"
    ip("link", "set", "lo", "up")
    ip("link", "add", name, "type", "bridge")
    ip("addr", "add", f"{HEAD}/24", "dev", name)
    ip("link", "set", name, "up")
    return name


def plugged(number: int, into: str) -> tuple[str, str]:
    """The names of a new namespace on the bridge `into`: its own, and its address."""
    name, address = f"xlc{os.getpid()}n{number}", f"{SUBNET}.{number + 1}"
    outside = f"v{os.getpid()}n{number}"
    ip("netns", "add", name)
    ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", outside, "master", into, "up")
    inside = ("netns", "exec", name, "ip")
    ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    ip(*inside, "link", "set", "eth0", "up")
    ip(*inside, "link", "set", "lo", "up")
    return name, address


def allowed() -> bool:
    """Whether this process may make hosts, and their packets arrive."""
    try:
        return subprocess.run([*APART, sys.executable, __file__], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def reach() -> None:
    """A packet from a host to the head. Raises where it does not arrive."""
    name, _ = plugged(1, bridge())
    try:
        with socket.create_server((HEAD, 0)) as server:
            call = f"import socket; socket.create_connection({server.getsockname()!r}, 5)"
            subprocess.run(["ip", "netns", "exec", name, sys.executable, "-c", call], check=True)
    finally:
        ip("netns", "del", name)


@dataclass(frozen=True)
class Host:
    """A namespace, its address, and the process that keeps its Ray node."""

    name: str
    address: str
    process: subprocess.Popen

    def joins(self) -> bool:
        """Whether it comes to be there: on a busy machine Ray may give up, or wait for ever."""
        until = time.monotonic() + JOINS
        while not self._alive() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        return bool(self._alive())

    @cached_property
    def node_id(self) -> str:
        """Ray's name of it."""
        return self._alive()[0]

    def _alive(self) -> list[str]:
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == self.address]


class Hosts(Nodes):
    """As Nodes, with a network between them that can be cut."""

    def __init__(self, count: int) -> None:
        self.bridge, self.made, self.cut = bridge(), 0, []
        super().__init__(count, node_ip_address=HEAD)

    def add(self) -> Host:
        """One more host."""
        self.made += 1
        name, address = plugged(self.made, self.bridge)
        for _ in range(TRIES):
            host = Host(name, address, self._start(name, address))
            if host.joins():  # one after another: they choose names in one folder
                return host
            self._stop(host)
        ip("netns", "del", name)
        raise TimeoutError(f"host {address} did not join in {TRIES} tries")

    def _start(self, name: str, address: str) -> subprocess.Popen:
        node = [RAY, "start", "--block", f"--address={self.cluster.address}", f"--node-ip-address={address}"]
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *node, "--num-cpus=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def cut_off(self, node_id: str) -> None:
        """Pull a host's plug: its processes live, and reach nobody."""
        host = self._take(node_id)
        ip("netns", "exec", host.name, "ip", "link", "set", "eth0", "down")
        self.cut.append(host)

    def kill(self, node_id: str) -> None:
        """End all processes of a host at once."""
        self._end(self._take(node_id))

    def close(self) -> None:
        """The end of all hosts."""
        for host in self.others + self.cut:
            self._end(host)
        super().close()

    def _take(self, node_id: str) -> Host:
        (host,) = [host for host in self.others if host.node_id == node_id]
        self.others.remove(host)
        return host

    def _end(self, host: Host) -> None:
        self._stop(host)
        ip("netns", "del", host.name)

    def _stop(self, host: Host) -> None:
        while pids := ip("netns", "pids", host.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        host.process.wait()


if __name__ == "__main__":
    reach()
