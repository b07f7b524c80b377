"""The host and port of a service: its own from the start, and shared by its workers only."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from service.settings import SettingsError


def bound(host: str, port: int) -> socket.socket:
    """Bound at once, so that a taken address is told before models load; it listens when there are answers.

    Raises SettingsError for an address that is taken, or is none of this machine's.
    """
    listener = _opened(host)
    try:
        listener.bind((host, port))
    except OSError as err:
        listener.close()
        raise _unusable(host, port, err) from None
    return listener


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """The port, chosen if it was 0, for `joined` to be used with until the block ends. Raises SettingsError."""
    # Bound without SO_REUSEPORT, which would not notice another service of ours, and opened to our workers after that.
    # It never listens, so no connection waits here.
    with bound(host, port) as holder, socket.socket(socket.AF_UNIX) as claim:
        port = holder.getsockname()[1]
        try:
            # Nor does the kernel notice two services while neither listens yet. A name can only be bound once, is of
            # the same network namespace as ports are, and goes with the process.
            claim.bind(f"\0clickserve {host} {port}")
        except OSError as err:
            raise _unusable(host, port, err) from None
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield port


def joined(host: str, port: int) -> socket.socket:
    """One more socket on a reserved address: the kernel spreads new connections over those that listen."""
    listener = _opened(host)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


def _opened(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


def _unusable(host: str, port: int, err: OSError) -> SettingsError:
    return SettingsError(f"settings host and port: cannot listen on {host}:{port}: {err.strerror or err}")
