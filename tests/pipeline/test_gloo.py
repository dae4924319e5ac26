"""Where Gloo listens: at the address that a node joined Ray with, whatever the machine's own name leads to."""

import os
import socket
import sys
import threading

import pytest
from ray.train import WorkerGroupError
from ray.train.torch import TorchConfig

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


def test_workers_that_do_not_meet_are_given_up_and_what_they_raise_is_passed_on() -> None:
    never = threading.Event()

    def hang() -> None:
        never.wait(60)

    with pytest.raises(WorkerGroupError, match=r"have not met within 0\.05 s"):
        gloo.within(0.05, hang)
    never.set()

    def fail() -> None:
        raise ZeroDivisionError("of a worker")

    with pytest.raises(ZeroDivisionError, match="of a worker"):
        gloo.within(60.0, fail)
    met: list[int] = []
    gloo.within(60.0, lambda: met.append(1))
    assert met == [1]


def test_backend_bounds_the_meeting_by_the_patience_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        """Of one worker that does what it is told once it is released."""

        released = threading.Event()

        def execute(self, function: object) -> None:
            assert function is gloo.get_ready
            assert self.released.wait(60)

    joined: list[object] = []
    monkeypatch.setattr(TorchConfig().backend_cls, "on_start", lambda self, group, config: joined.append(group))
    monkeypatch.setattr(gloo, "IMPORT_SECONDS", 0.05 - 1)
    config, group = gloo.AddressedTorchConfig(timeout_s=1), Group()
    with pytest.raises(WorkerGroupError, match=r"within 0\.05 s"):
        config.backend_cls().on_start(group, config)
    assert not joined
    group.released.set()
    monkeypatch.setattr(gloo, "IMPORT_SECONDS", 60.0)
    other = Group()
    config.backend_cls().on_start(other, config)
    assert other in joined  # by Ray's own part, which makes the process group
