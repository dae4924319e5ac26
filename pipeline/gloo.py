"""Ray Train's torch backend with workers that reach each other at the addresses that their nodes joined Ray with.

Gloo, which joins workers on CPUs, listens where the machine's own name leads. By Debian's /etc/hosts that is 127.0.1.1,
which no other node reaches; on a laptop it may be an address that everyone in the network does. NCCL finds its way.
"""

import importlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import WorkerGroupError
from ray.train.torch import TorchConfig

from pipeline import failpoints

IMPORT_SECONDS = 30.0
"""What workers may take beyond their patience with each other until they have met: they import torch first."""
VARIABLE = "GLOO_SOCKET_IFNAME"
"""Names the interface that Gloo listens on; a value that an operator set stays."""
_SIOCGIFADDR = 0x8915


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        def meet() -> None:
            worker_group.execute(get_ready)
            super(_Backend, self).on_start(worker_group, backend_config)

        within(backend_config.timeout_s + IMPORT_SECONDS, meet)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group to the end of the workers' processes, which is next: Ray would first wait half a
        minute for a worker that hangs to take its leave."""


class AddressedTorchConfig(TorchConfig):
    """Ray's settings of torch's process group."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What sets workers up."""
        return _Backend


def within(seconds: float, meet: Callable[[], None]) -> None:
    """Let workers that are up meet, but not for ever: Ray itself waits without end for one that hangs by then.

    For one that hangs while Ray starts its process Ray still waits; no setting of Ray 2.60 bounds that.

    Raises:
        WorkerGroupError: they have not met; Ray then ends all of them.
    """
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            meet()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, name="objdyn-meeting", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise WorkerGroupError(f"the workers have not met within {seconds:g} s (stall_seconds and their imports)", {})
    if raised:
        raise raised[0]


def get_ready() -> None:
    """Import in this worker what it is to run, for which Ray would wait without end, and name Gloo's interface."""
    failpoints.reach("meet")
    importlib.import_module("pipeline.train")
    name_interface()


def name_interface() -> None:
    """Tell Gloo in this worker the interface of its node's address; where none is found it does what it always did."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(VARIABLE, interface)


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address; None if there is none, or not on Linux."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
