"""Two hosts on one machine: network namespaces joined by a link with a delay and a limited bandwidth.

The link is a veth with ``tc netem`` where the kernel has that. Elsewhere it is a TUN device in each namespace and a
process between them that holds every packet as long as the link would.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

_TUN, _NO_PACKET_INFORMATION, _ATTACH = 0x0001, 0x1000, 0x400454CA  # linux/if_tun.h
_NETWORK = 0x40000000  # CLONE_NEWNET
_MTU = 65000  # bytes: TCP starts with ten packets, and few packets a second are no work for the relay


class Unavailable(RuntimeError):
    """This machine, or its user, cannot make namespaces with such a link; the message says why."""


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        name: Of its namespace.
        interface: Its end of the link.
        address: There.
        first: The first host's address.
    """

    name: str
    interface: str
    address: str
    first: str

    def enter(self) -> None:
        """Move the calling thread, and those it will start, there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.name}") as namespace:
            if libc.setns(namespace.fileno(), _NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {self.name}")


class Network(NamedTuple):
    """What there is."""

    hosts: list[Host]
    link: str  # how it is made
    processes: list[int]  # that carry packets


@contextmanager
def two_hosts(delay: float, bandwidth: float) -> Iterator[Network]:
    """Two hosts and their link, which last as long as the context.

    Args:
        delay: Seconds from one to the other.
        bandwidth: Bytes per second, in each direction.

    Raises:
        Unavailable: They cannot be made here.
    """
    names, first = (f"gp{os.getpid()}a", f"gp{os.getpid()}b"), "10.213.0.1"
    hosts = [Host(name, name, address, first) for name, address in zip(names, (first, "10.213.0.2"), strict=True)]
    relay: subprocess.Popen[str] | None = None
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        how = "veth and tc netem"
        try:
            _veth(hosts, delay, bandwidth)
        except Unavailable:
            relay, how = _relay(hosts, delay, bandwidth), "two TUN devices and a relay process"
        for host in hosts:
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "mtu", str(_MTU), "up")
        yield Network(hosts, how, [relay.pid] if relay else [])
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
            for pipe in (relay.stdin, relay.stdout):
                if pipe is not None:
                    pipe.close()
        for host in hosts:
            with suppress(Unavailable):
                _ip("netns", "del", host.name)


def _veth(hosts: list[Host], delay: float, bandwidth: float) -> None:
    a, b = hosts
    _ip("-n", a.name, "link", "add", a.interface, "type", "veth", "peer", "name", b.interface, "netns", b.name)
    try:
        for host in hosts:
            shape = ["delay", f"{delay * 1e3:g}ms", "rate", f"{bandwidth * 8:.0f}bit", "limit", "10000"]
            _run("tc", "-n", host.name, "qdisc", "add", "dev", host.interface, "root", "netem", *shape)
    except Unavailable:
        _ip("-n", a.name, "link", "del", a.interface)
        raise


def _relay(hosts: list[Host], delay: float, bandwidth: float) -> subprocess.Popen[str]:
    """Start the process between the two; it ends when this one does."""
    command = [sys.executable, __file__, *(host.interface for host in hosts), str(delay), str(bandwidth)]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    said = relay.stdout.readline()
    try:
        if said != "ready\n":
            raise Unavailable(f"tc has no netem here, and there are no TUN devices: {said.strip()}")
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
    except Unavailable:
        relay.communicate()
        raise
    return relay


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"there is no {command[0]} here") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {error.stderr.strip()}") from None


def _carry(names: list[str], delay: float, bandwidth: float) -> None:
    """Be the link between two TUN devices until stdin ends.

    A packet leaves when those before it have left, takes its bytes / bandwidth, and arrives ``delay`` later.
    """
    with suppress(OSError):
        os.nice(-10)  # late packets would be a slower link
    try:
        ends = [_tun(name) for name in names]
    except OSError as error:
        return print(f"/dev/net/tun: {error}", flush=True)
    print("ready", flush=True)
    stdin, count = sys.stdin.fileno(), 0
    free = dict.fromkeys(ends, 0.0)
    under_way: list[tuple[float, int, int, bytes]] = []
    while True:
        pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([stdin, *ends], [], [], pause)
        if stdin in readable:
            return None
        for end in readable:
            packet, count = os.read(end, 1 << 16), count + 1
            free[end] = max(time.monotonic(), free[end]) + len(packet) / bandwidth
            heapq.heappush(under_way, (free[end] + delay, count, ends[1 - ends.index(end)], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            with suppress(OSError):  # not up yet
                os.write(end, packet)


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _ATTACH, struct.pack("16sH22x", name.encode(), _TUN | _NO_PACKET_INFORMATION))
    return device


if __name__ == "__main__":
    _carry(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))
