"""Where Gloo listens: at the address that a node joined Ray with, whatever the machine's own name leads to."""

import os
import socket
import sys

import pytest

from pipeline import gloo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds interfaces on Linux")
(LOOPBACK,) = (name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))


def test_interface_is_the_one_with_the_address() -> None:
    assert gloo.interface_of("127.0.0.1") == LOOPBACK
    assert gloo.interface_of("192.0.2.99") is None
    assert gloo.interface_of("2001:db8::7") is None


def test_workers_listen_at_their_nodes_address_unless_an_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.delenv(gloo.VARIABLE, raising=False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.99")
    gloo.name_interface()
    assert gloo.VARIABLE not in os.environ
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    gloo.name_interface()
    assert os.environ.pop(gloo.VARIABLE) == LOOPBACK
    monkeypatch.setenv(gloo.VARIABLE, "ib0")
    gloo.name_interface()
    assert os.environ[gloo.VARIABLE] == "ib0"
