"""Nodes that are hosts of their own as far as the network goes: each in a network namespace, on one bridge. Needs root.

The head and the drivers are outside, at the bridge's own address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import ray

from tests.cluster.conftest import RAY
from tests.cluster.nodes import Nodes, wait_for

SUBNET = "10.199.77"
TRIES = 5


def ip(*words: str) -> str:
    """What the command `ip` says. Raises where it may not."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def allowed() -> bool:
    """Whether this process may make network namespaces, and the links between them."""
    name = f"xlc{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("netns", "del", name)  # its link goes with it
        ip("link", "add", f"{name}b", "type", "bridge")
        ip("link", "del", f"{name}b")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@dataclass(frozen=True)
class Host:
    """A namespace, its address, and the process that keeps its Ray node."""

    name: str
    address: str
    process: subprocess.Popen

    def joins(self) -> bool:
        """Whether it comes to be there: Ray gives up after 30 s, which a busy machine may need."""
        wait_for(f"host {self.address}", lambda: self._alive() or self.process.poll() is not None)
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
        self.bridge, self.made, self.cut = f"xlcb{os.getpid()}", 0, []
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        super().__init__(count, node_ip_address=f"{SUBNET}.1")

    def add(self) -> Host:
        """One more host."""
        self.made += 1
        name, address = f"xlc{os.getpid()}n{self.made}", f"{SUBNET}.{self.made + 1}"
        outside = f"v{os.getpid()}n{self.made}"
        ip("netns", "add", name)
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", outside, "master", self.bridge, "up")
        inside = ("netns", "exec", name, "ip")
        ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "link", "set", "lo", "up")
        for _ in range(TRIES):
            host = Host(name, address, self._start(name, address))
            if host.joins():  # one after another: they choose names in one folder
                return host
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
        ip("link", "del", self.bridge)

    def _take(self, node_id: str) -> Host:
        (host,) = [host for host in self.others if host.node_id == node_id]
        self.others.remove(host)
        return host

    def _end(self, host: Host) -> None:
        while pids := ip("netns", "pids", host.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        host.process.wait()
        ip("netns", "del", host.name)
