"""Ray Train's torch backend with workers that reach each other at the addresses that their nodes joined Ray with.

Gloo, which joins workers on CPUs, listens where the machine's own name leads. By Debian's /etc/hosts that is 127.0.1.1,
which no other node reaches; on a laptop it may be an address that everyone in the network does. NCCL finds its way.
"""

import os
import socket
import struct
import sys
from typing import Any

import ray
from ray.train.torch import TorchConfig

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Names the interface that Gloo listens on; a value that an operator set stays."""
_SIOCGIFADDR = 0x8915


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group to the end of the workers' processes, which is next: Ray would first wait half a
        minute for a worker that hangs to take its leave."""


class AddressedTorchConfig(TorchConfig):
    """Ray's settings of torch's process group."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What sets workers up."""
        return _Backend


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
