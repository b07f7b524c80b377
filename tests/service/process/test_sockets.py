"""Who may listen where: one service an address, and all of its workers."""

import socket
from contextlib import closing

import pytest

from service.process import sockets
from service.settings import SettingsError

HOST = "127.0.0.1"


def test_a_port_is_chosen_once_and_joined_by_many_who_all_get_connections() -> None:
    with sockets.reserve_port(HOST, 0) as port:
        joined = [sockets.bind_shared(HOST, port) for _ in range(2)]
        for listener in joined:
            listener.listen()
            listener.settimeout(10)
        clients = [socket.create_connection((HOST, port)) for _ in range(64)]
        accepted = [listener.accept()[0] for listener in joined]
    for each in (*joined, *clients, *accepted):
        each.close()


@pytest.mark.parametrize("listens", [False, True], ids=["which loads", "which listens"])
def test_another_service_with_workers_is_noticed(listens: bool) -> None:
    with sockets.reserve_port(HOST, 0) as port, closing(sockets.bind_shared(HOST, port)) as worker:
        if listens:
            worker.listen()

        taken = pytest.raises(SettingsError, match=f"cannot listen on {HOST}:{port}: Address already in use")
        with taken, sockets.reserve_port(HOST, port):
            pass


def test_a_service_alone_and_one_with_workers_notice_each_other() -> None:
    with closing(sockets.bind(HOST, 0)) as alone:
        alone.listen()
        with pytest.raises(SettingsError, match="cannot listen on"), sockets.reserve_port(HOST, alone.getsockname()[1]):
            pass
    with sockets.reserve_port(HOST, 0) as port, closing(sockets.bind_shared(HOST, port)) as worker:
        worker.listen()
        with pytest.raises(SettingsError, match="cannot listen on"):
            sockets.bind(HOST, port)


def test_an_address_is_free_again_as_soon_as_its_service_ended() -> None:
    with sockets.reserve_port(HOST, 0) as port, closing(sockets.bind_shared(HOST, port)) as worker:
        worker.listen()
        client = socket.create_connection((HOST, port))
        worker.accept()[0].close()  # which closes first waits: the address is in TIME_WAIT
        client.close()

    with sockets.reserve_port(HOST, port) as again:
        assert again == port


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(SettingsError, match="settings host and port: cannot listen on 192.0.2.1:1"):
        sockets.bind("192.0.2.1", 1)
