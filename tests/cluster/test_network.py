"""Which interface ranks listen on. That ranks on different hosts find each other: faults.py, host_cut_off."""

from __future__ import annotations

import os

import pytest

from xlc_ray.cluster import network


def test_an_address_has_its_interface():
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("203.0.113.9") is None, "an address for documentation, of no host"


@pytest.mark.parametrize(
    ("address", "chosen", "used"),
    [("127.0.0.1", None, "lo"), ("127.0.0.1", "eth7", "eth7"), ("203.0.113.9", None, None)],
)
def test_gloo_listens_where_the_node_does_unless_the_user_chose(monkeypatch, address, chosen, used):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": chosen} if chosen else {})
    network.listen_on_nodes_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == used
