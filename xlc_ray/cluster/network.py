"""Process groups over the network by which Ray's nodes know each other.

gloo listens at the address that the host's own name has, unless GLOO_SOCKET_IFNAME names an interface: on many hosts
that is loopback, where ranks of other hosts wait for each other until they time out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

import ray
from ray.train.backend import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # the one place where something can run before the group is made

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""


class Torch(TorchConfig):
    """Ray Train's, whose ranks listen where their node does."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(listen_on_nodes_interface)
        super().on_start(worker_group, backend_config)


def listen_on_nodes_interface() -> None:
    """Let gloo use the interface of this node's address in Ray, unless the user chose one."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address; None if there is none."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                found = fcntl.ioctl(asking, _GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # it has no such address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None
