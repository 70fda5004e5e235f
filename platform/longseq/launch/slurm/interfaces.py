"""The network interface that gloo takes. By itself it takes the address of the host's own name, which Debian and Ubuntu
give as 127.0.1.1 in /etc/hosts: no other node can reach that."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from contextlib import suppress

from torch._C._distributed_c10d import Store

from longseq.launch.slurm.place import Place

_VARIABLE = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
_IPV6_ADDRESSES = "/proc/net/if_inet6"


def choose_interface(place: Place, store: Store) -> None:
    """Have gloo take the interface on the way to rank 0; a variable that is set already stays.

    store: in which every rank has left its ``hello``. Rank 0's node is on the way to itself by no interface: it takes
    the one to a rank of another node.
    """
    if os.environ.get(_VARIABLE):
        return
    each = place.world // len(place.nodes)
    peer = place.address
    if place.rank < each < place.world:
        peer = json.loads(store.get(f"hello/{each}"))[2]
    name = interface_of(own_address(peer)) if each < place.world else "lo"
    if name:
        os.environ[_VARIABLE] = name


def own_address(peer: str) -> str:
    """The address of this machine that a packet to ``peer`` leaves with; empty where none would."""
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0]).partition("%")[0]
    return ""


def interface_of(address: str) -> str:
    """The interface with this address; empty if none has it as its own."""
    if not address:
        return ""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        with suppress(OSError), open(_IPV6_ADDRESSES) as table:  # noqa: PTH123
            return next((line.split()[5] for line in table if line.startswith(wanted)), "")
        return ""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""
