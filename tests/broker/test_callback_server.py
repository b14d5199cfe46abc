"""Callbacks end to end: a running server, a device that acknowledges and clicks, a receiver; and a crash between."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
import pytest

from clients.local_server import AppKeys, LocalServer
from gateway.mqtt import Puback, Publish
from tests.conftest import StartServer
from tests.gateway.peer import Peer, accounts, call, connect_packet, eventually, push_body
from tests.patience import PATIENCE


class Receiver:
    """Takes what is POSTed to it; while it is not `free`, it says nothing."""

    def __init__(self) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.posts = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.posts.release()
                receiver.free.wait(PATIENCE)
                for event in body["events"]:
                    receiver.events.put(event)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A server of ours that was killed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/told"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next(self) -> dict[str, Any]:
        return self.events.get(timeout=PATIENCE)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@contextmanager
def device(server: LocalServer, app: AppKeys, name: str) -> Iterator[Peer]:
    with Peer(server.addresses.mqtt) as peer:
        peer.connect(connect_packet(app, name))
        yield peer


def push(server: LocalServer, app: AppKeys, name: str, **callback: Any) -> str:
    body = {**push_body([name]), **({"callback": callback} if callback else {})}
    status, answer = call(server, app, "POST", "/v3/push", body)
    assert status == 200, answer
    return str(answer["msg_id"])


def acknowledge(peer: Peer) -> None:
    peer.send(Puback(peer.expect(Publish).packet_id))


def test_deliveries_and_clicks_are_told(start_server: StartServer, receiver: Receiver) -> None:
    server = start_server("--callbacks-private-addresses", "true", "--callbacks-first-pause", "0.1")
    app = server.app
    with device(server, app, "phone") as phone:
        msg_id = push(server, app, "phone", url=receiver.url, params={"order": 1}, type=3)
        acknowledge(phone)
        told = receiver.next()
        assert (told["msg_id"], told["event"], told["registration_ids"]) == (msg_id, "delivered", ["phone"])
        assert told["params"] == {"order": 1}
        phone.send(Publish("receipt", orjson.dumps({"msg_id": msg_id, "event": "clicked"}), 1, packet_id=9))
        assert phone.expect(Puback).packet_id == 9
        assert receiver.next()["event"] == "clicked"

        # The app's own callback, for pushes without one.
        settings = {"callback": {"url": receiver.url, "events": ["delivered"]}}
        assert call(server, app, "PUT", "/v1/settings", settings)[0] == 200
        msg_id = push(server, app, "phone")
        acknowledge(phone)
        assert receiver.next()["msg_id"] == msg_id

        # A receiver that hangs holds up nothing.
        receiver.free.clear()
        first = push(server, app, "phone")
        acknowledge(phone)
        for _ in range(4):  # the fourth POST hangs
            assert receiver.posts.acquire(timeout=PATIENCE)
        later = [push(server, app, "phone") for _ in range(20)]
        for _ in later:
            acknowledge(phone)
        eventually(lambda: all(accounts(server, app, msg_id)["delivered"] for msg_id in later))
    server.kill()  # in the middle of the POST
    receiver.free.set()
    server.start()
    missing = {first, *later}
    while missing:
        missing.discard(receiver.next()["msg_id"])


def test_without_the_setting_nothing_private_is_called(server: LocalServer, receiver: Receiver) -> None:
    app = server.app
    with device(server, app, "careful") as peer:
        push(server, app, "careful", url=receiver.url)
        acknowledge(peer)
        eventually(lambda: call(server, app, "GET", "/v1/callbacks")[1]["parked"] == 1)
    status, answer = call(server, app, "GET", "/v1/callbacks/parked")
    assert status == 200
    assert "not a public address" in answer["events"][0]["error"]
    assert receiver.events.empty()


def test_a_wrong_callback_is_refused(server: LocalServer) -> None:
    for callback in ({"url": "ftp://x"}, {"url": "https://example.com", "events": ["sent"]}, {"type": 1}, 5):
        status, answer = call(
            server, server.app, "POST", "/v3/push", {**push_body("all"), "callback": callback}
        )
        assert (status, answer["error"]["code"]) == (400, 1003), answer
