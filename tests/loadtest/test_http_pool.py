"""The load generator's HTTP client where a server dies under it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from loadtest.http_pool import HttpError, HttpPool
from loadtest.reactor import Reactor

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Moody:
    """Closes its first connection when it was asked something, and answers on the second."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in (b"", ANSWER):
            connection, _ = self.listening.accept()
            with connection:
                self.asked.append(connection.recv(4096))
                connection.sendall(answer)

    def close(self) -> None:
        with socket.create_connection(self.listening.getsockname()) as last:
            last.sendall(b"end")
        self._thread.join()
        self.listening.close()


@pytest.fixture
def moody() -> Iterator[Moody]:
    server = Moody()
    yield server
    if len(server.asked) < 2:
        server.close()
    else:
        server._thread.join()
        server.listening.close()


def _pool(moody: Moody, *, again: bool) -> HttpPool:
    return HttpPool(Reactor(), moody.listening.getsockname(), 1, again=again)


def test_a_call_without_an_answer_is_an_error(moody: Moody) -> None:
    pool = _pool(moody, again=False)
    with pytest.raises(HttpError, match="instead of an answer"):
        pool.call("GET", "/a")
    pool.close()
    pool.reactor.close()


def test_a_call_without_an_answer_may_be_made_again(moody: Moody) -> None:
    pool = _pool(moody, again=True)
    assert pool.call("GET", "/a") == {}
    assert moody.asked[0] == moody.asked[1]
    assert moody.asked[0].startswith(b"GET /a ")
    pool.close()
    pool.reactor.close()


def test_what_is_made_again_goes_before_what_waits(moody: Moody) -> None:
    pool = _pool(moody, again=True)
    order: list[str] = []
    pool.send(pool.build("GET", "/first"), lambda *_: order.append("first"))
    pool.send(pool.build("GET", "/second"), lambda *_: order.append("second"))
    pool.reactor.run_until(lambda: bool(order), "the first answer")
    assert order == ["first"]
    pool.close()
    pool.reactor.close()
