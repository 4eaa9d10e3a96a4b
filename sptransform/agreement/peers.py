"""Which ranks' processes have ended, according to the operating system.

Every process listens on a socket it never accepts from, and publishes the address in the store. To watch a rank, a
process connects to it once and keeps the connection. The connection breaks when the rank's process ends, however it
ends, and at no other time. A process that is busy, stopped or compiling counts as alive. There is no thread and no
heartbeat, so nothing depends on when a process gets to run.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

_BACKLOG = 4096  # connections stay in it unaccepted, one for each peer
_CONNECT_TIMEOUT = 1.0


class Peers:
    """The processes of one default group, by global rank."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = dist.PrefixStore("sptransform/alive", store)
        self._connections: dict[int, socket.socket | None] = {}  # None: cannot be reached from here
        self._gone: set[int] = set()
        self._store.set(str(rank), json.dumps([_machine(), *_listener(_own_address(store)).getsockname()[:2]]))

    def gone(self, ranks: Iterable[int]) -> list[int]:
        """The ranks whose processes are known to have ended. A rank that does not answer counts as alive."""
        return [rank for rank in ranks if self._is_gone(rank)]

    def gone_within(self, ranks: Iterable[int], seconds: float) -> list[int]:
        """As :meth:`gone`, but waits up to ``seconds`` for a first one."""
        ranks, deadline = list(ranks), time.monotonic() + seconds
        while not (found := self.gone(ranks)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def connect(self, ranks: Iterable[int]) -> None:
        """Connect to ranks that are known to be alive; from then on their end is certain to be noticed."""
        for rank in ranks:
            if rank not in self._connections:
                self._connect(rank)

    def _is_gone(self, rank: int) -> bool:
        if rank not in self._connections:
            self._connect(rank)
        connection = self._connections.get(rank)
        if connection is None:
            return rank in self._gone
        try:
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _connect(self, rank: int) -> None:
        try:
            if not self._store.check([str(rank)]):
                return  # it has not published its address yet; ask again later
            machine, *address = json.loads(self._store.get(str(rank)))
        except dist.DistError:
            return  # the store's host may be gone, which proves nothing about this rank
        try:
            connection = socket.create_connection(tuple(address), timeout=_CONNECT_TIMEOUT)
        except OSError as error:
            self._connections[rank] = None
            # on another machine, a firewall may be what refuses
            if isinstance(error, ConnectionRefusedError) and machine == _machine():
                self._gone.add(rank)
            return
        connection.setblocking(False)
        self._connections[rank] = connection
        _open.append(connection)


_open: list[socket.socket] = []


@functools.cache
def _listener(address: tuple[socket.AddressFamily, str]) -> socket.socket:
    family, host = address
    listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    _open.append(listener)
    return listener


def _close_in_child() -> None:
    """A forked data loader that outlives its parent must not keep the parent's sockets open."""
    for each in _open:
        each.close()
    _open.clear()
    _listener.cache_clear()


os.register_at_fork(after_in_child=_close_in_child)


@functools.cache
def _machine() -> str:
    """Equal in two processes that see each other's loopback addresses."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def _own_address(store: dist.Store) -> tuple[socket.AddressFamily, str]:
    """This host's address as seen from the store's host; loopback if the store is not on a network."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        try:
            for family, kind, _, _, target in socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM):
                with socket.socket(family, kind) as probe:  # no packet is sent
                    probe.connect(target)
                    return family, probe.getsockname()[0]
        except OSError:
            pass
    return socket.AF_INET, "127.0.0.1"
