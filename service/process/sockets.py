"""Listening sockets: a port that belongs to one service from its start, shared by its workers with SO_REUSEPORT."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from service.settings import SettingsError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound at once, so that a taken address is an error before models load; uvicorn makes it listen.

    Raises SettingsError for an address that is taken, or is none of this machine's.
    """
    listener = _open(host)
    try:
        listener.bind((host, port))
    except OSError as err:
        listener.close()
        raise _unusable(host, port, err) from None
    return listener


@contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """The port, chosen if it was 0, for `bind_shared` until the block ends. Raises SettingsError."""
    # Bound without SO_REUSEPORT, which would not notice another service of ours, and opened to our workers after that.
    # It never listens, so no connection waits here.
    with bind(host, port) as holder, socket.socket(socket.AF_UNIX) as claim:
        port = holder.getsockname()[1]
        try:
            # Nor does the kernel notice two services while neither listens yet. A name can only be bound once, is of
            # the same network namespace as ports are, and goes with the process.
            claim.bind(f"\0clickserve {host} {port}")
        except OSError as err:
            raise _unusable(host, port, err) from None
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield port


def bind_shared(host: str, port: int) -> socket.socket:
    """One more socket on a reserved address: the kernel spreads new connections over those that listen."""
    listener = _open(host)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


def _open(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


def _unusable(host: str, port: int, err: OSError) -> SettingsError:
    return SettingsError(f"settings host and port: cannot listen on {host}:{port}: {err.strerror or err}")
