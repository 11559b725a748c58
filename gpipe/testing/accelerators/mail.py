"""Messages between processes with simulated accelerators: buffered, in order, over sockets of this machine."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from typing import Any

Receiver = Callable[[Any], None]


class PostOffice:
    """This process's end of all messages.

    Attributes:
        address: What other processes send to it with: host, port and a key, as text.
    """

    def __init__(self) -> None:
        key = secrets.token_hex(16)
        self._listener = Listener(("127.0.0.1", 0), authkey=key.encode())
        host, port = self._listener.address
        self.address = f"{host} {port} {key}"
        self._sending = threading.Lock()
        self._lines: dict[str, SimpleQueue[tuple[str, Any]]] = {}
        self._receiving = threading.Lock()  # another one: a receiver may hold up who sends
        self._boxes: dict[str, Receiver] = {}
        self._unclaimed: dict[str, list[Any]] = {}
        _background(self._accept)

    def send(self, address: str, box: str, message: object) -> None:
        """Send to a box of another process, without waiting; what a process that is gone was sent is lost."""
        with self._sending:
            line = self._lines.get(address)
            if line is None:
                line = self._lines[address] = SimpleQueue()
                _background(_deliver, address, line)
            line.put((box, message))

    def open(self, box: str, receiver: Receiver) -> None:
        """Call ``receiver`` with every message to a box, in order, also with those that came before."""
        with self._receiving:
            for message in self._unclaimed.pop(box, []):
                receiver(message)
            self._boxes[box] = receiver

    def close(self, box: str) -> None:
        """Forget a box."""
        with self._receiving:
            self._boxes.pop(box, None)
            self._unclaimed.pop(box, None)

    def _accept(self) -> None:
        while True:
            _background(self._receive, self._listener.accept())

    def _receive(self, connection: Connection[Any, tuple[str, Any]]) -> None:
        while True:
            try:
                box, message = connection.recv()
            except (EOFError, OSError):
                return
            with self._receiving:
                receiver = self._boxes.get(box)
                if receiver is None:
                    self._unclaimed.setdefault(box, []).append(message)
                else:
                    receiver(message)


@functools.cache
def post_office() -> PostOffice:
    """The one of this process, which opens when it is first asked for."""
    return PostOffice()


def _deliver(address: str, line: SimpleQueue[tuple[str, Any]]) -> None:
    host, port, key = address.split()
    try:
        connection = Client((host, int(port)), authkey=key.encode())
        while True:
            connection.send(line.get())
    except (EOFError, OSError):
        return


def _background(function: Callable[..., None], *args: object) -> None:
    threading.Thread(target=function, args=args, name=f"simccl {function.__name__.strip('_')}", daemon=True).start()
