"""The device SDK against a real server, through a network that can be made bad."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trustme

from clients.device import Credentials, Device, DeviceError, DeviceStopped, LinkSettings, Push
from clients.journal import Journal, JournalError
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Audience, Notification, Options, Publisher, PushRequest
from clients.session import MAX_PUSH, _inflated, _read_push
from gateway.mqtt import Publish, Reason
from tests.patience import PATIENCE

QUICK = LinkSettings(backoff_base=0.05, backoff_cap=0.2, answer_timeout=PATIENCE)


class Network:
    """A proxy in front of the server's MQTT port. A new connection finds the line good again."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.deaf = False  # what devices say is lost
        self.mute = False  # what the server says is lost
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> tuple[str, int]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.deaf = self.mute = False
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, there_writer}
        await asyncio.gather(
            self._pump(reader, there_writer, lambda: self.deaf),
            self._pump(there_reader, writer, lambda: self.mute),
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: Callable[[], bool]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not lost():
                    writer.write(data)
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()


@pytest.fixture
async def network(server: LocalServer) -> AsyncIterator[Network]:
    network = Network(server.addresses.mqtt)
    yield network
    await network.close()


@pytest.fixture
async def publisher(server: LocalServer) -> AsyncIterator[Publisher]:
    async with Publisher(server.app.app_key, server.app.master_secret, server.addresses.http) as publisher:
        yield publisher


class Inbox:
    def __init__(self) -> None:
        self.pushes: list[int] = []
        self._arrived: asyncio.Queue[Push] = asyncio.Queue()

    def take(self, push: Push) -> None:
        self.pushes.append(push.msg_id)
        self._arrived.put_nowait(push)

    async def next(self) -> Push:
        return await asyncio.wait_for(self._arrived.get(), PATIENCE)


def make_device(server: LocalServer, name: str, **more: object) -> Device:
    host, port = server.addresses.mqtt
    options: dict[str, object] = {"host": host, "port": port, "settings": QUICK, **more}
    if not {"token", "device_key", "journal"} & options.keys():
        options["device_key"] = server.app.device_key
    return Device(server.app.app_key, name, **options)  # type: ignore[arg-type]


async def online(device: Device) -> None:
    await asyncio.wait_for(device.connected(), PATIENCE)


async def send(publisher: Publisher, name: str, text: str = "x") -> int:
    return (await publisher.push(PushRequest(Audience([name]), Notification(text)))).msg_id


async def delivered(publisher: Publisher, msg_id: int) -> None:
    """Returns when the server has recorded it."""
    async with asyncio.timeout(PATIENCE):
        while (await publisher.received_detail([msg_id]))[0].delivered != 1:
            pass


# The main job


async def test_a_device_registers_gets_a_push_and_reports(server: LocalServer, publisher: Publisher) -> None:
    inbox = Inbox()
    async with make_device(server, "main-job", on_push=inbox.take) as device:
        await online(device)
        await device.update(alias="mona", tags=["a", "b"])
        await device.update(add_tags=["c"], remove_tags=["a"], attributes={"app_version": "2.1", "level": 3})
        await device.update(attributes={"level": None, "vip": True})
        info = await publisher.device("main-job")
        assert (info.alias, info.tags) == ("mona", {"b", "c"})
        assert info.attributes == {"app_version": "2.1", "vip": True}
        accepted = await publisher.push(PushRequest(Audience(alias=["mona"]), Notification("Hi")))
        assert await inbox.next() == Push(accepted.msg_id, {"alert": "Hi"})
        await device.receipt(accepted.msg_id, "clicked")
        await device.event("opened", {"page": 1})
        await delivered(publisher, accepted.msg_id)
        assert (await publisher.received_detail([accepted.msg_id]))[0].clicked == 1


async def test_a_refused_report_says_why(server: LocalServer) -> None:
    async with make_device(server, "refused-report", on_push=print) as device:
        with pytest.raises(DeviceError, match="event: must be one of") as caught:
            await device.receipt(1, "eaten")  # type: ignore[arg-type]
        assert (caught.value.reason, caught.value.code) == (Reason.PAYLOAD_FORMAT_INVALID, 3004)
        with pytest.raises(DeviceError, match="tags") as caught:
            await device.update(add_tags=["not a tag"])
        assert caught.value.code == 7002


async def test_what_came_while_away_is_delivered_on_return(server: LocalServer, publisher: Publisher) -> None:
    inbox = Inbox()
    async with make_device(server, "away", on_push=inbox.take) as device:
        await online(device)
    msg_ids = [await send(publisher, "away") for _ in range(50)]  # more than one window
    async with make_device(server, "away", on_push=inbox.take):
        assert [(await inbox.next()).msg_id for _ in msg_ids] == msg_ids


# Exactly once


async def test_a_lost_acknowledgement_repeats_no_push(
    server: LocalServer, publisher: Publisher, network: Network
) -> None:
    inbox = Inbox()
    host, port = await network.open()
    async with make_device(server, "lost-ack", on_push=inbox.take, host=host, port=port) as device:
        await online(device)
        network.deaf = True
        msg_id = await send(publisher, "lost-ack")
        await inbox.next()
        network.cut()
        await delivered(publisher, msg_id)
        assert (inbox.pushes, device.repeats) == ([msg_id], 1)


async def test_a_restarted_process_gets_no_push_again(
    server: LocalServer, publisher: Publisher, network: Network, tmp_path: Path
) -> None:
    inbox = Inbox()
    host, port = await network.open()
    options = {
        "journal": tmp_path / "journal",
        "device_key": server.app.device_key,
        "host": host,
        "port": port,
    }
    async with make_device(server, "restarted", on_push=inbox.take, **options) as device:
        await online(device)
        network.deaf = True
        msg_id = await send(publisher, "restarted")
        await inbox.next()
    async with make_device(server, "restarted", on_push=inbox.take, **options) as device:
        await delivered(publisher, msg_id)
        assert (inbox.pushes, device.repeats) == ([msg_id], 1)


async def test_a_push_that_on_push_rejects_comes_again_with_the_next_connection(
    server: LocalServer, publisher: Publisher, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    inbox, failures = Inbox(), 0

    async def fail_once(push: Push) -> None:
        nonlocal failures
        if not failures:
            failures += 1
            inbox._arrived.put_nowait(push)
            raise RuntimeError("no room")
        inbox.take(push)

    host, port = await network.open()
    async with make_device(server, "fails", on_push=fail_once, host=host, port=port) as device:
        await online(device)
        msg_id = await send(publisher, "fails")
        await inbox.next()
        network.cut()
        await inbox.next()
        await delivered(publisher, msg_id)
    assert inbox.pushes == [msg_id]
    assert "no room" in caplog.text


async def test_close_lets_on_push_finish_and_acknowledges(server: LocalServer, publisher: Publisher) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(push: Push) -> None:
        begun.set()
        await go_on.wait()

    device = make_device(server, "slow", on_push=slow)
    await device.start()
    await online(device)
    first, second = await send(publisher, "slow"), await send(publisher, "slow")
    await asyncio.wait_for(begun.wait(), PATIENCE)
    closing = asyncio.create_task(device.close())
    go_on.set()
    await closing
    await delivered(publisher, first)
    assert (await publisher.received_detail([second]))[0].pending == 1


async def test_finish_from_on_push_ends_the_device(server: LocalServer, publisher: Publisher) -> None:
    inbox = Inbox()

    def take_one(push: Push) -> None:
        inbox.take(push)
        device.finish()

    async with make_device(server, "one-only", on_push=take_one) as device:
        await online(device)
        msg_ids = [await send(publisher, "one-only") for _ in range(3)]
        await asyncio.wait_for(device.wait(), PATIENCE)
    assert inbox.pushes == msg_ids[:1]


# The connection


async def test_a_device_survives_the_servers_death(start_server: Callable[..., LocalServer]) -> None:
    server, inbox = start_server(), Inbox()
    app, http = server.app, server.addresses.http
    async with (
        Publisher(app.app_key, app.master_secret, http) as publisher,
        make_device(server, "survivor", on_push=inbox.take) as device,
    ):
        await online(device)
        first = await send(publisher, "survivor")
        await inbox.next()
        await delivered(publisher, first)
        await asyncio.to_thread(server.kill)
        event = asyncio.create_task(device.event("made-offline"))
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(event, PATIENCE)
        second = await send(publisher, "survivor")
        assert (await inbox.next()).msg_id == second
    assert inbox.pushes == [first, second]


async def test_a_dead_line_is_noticed_by_the_heartbeat(server: LocalServer, network: Network) -> None:
    host, port = await network.open()
    settings = LinkSettings(keep_alive=1, answer_timeout=1, backoff_base=0.01)
    async with make_device(
        server, "dead-line", on_push=print, host=host, port=port, settings=settings
    ) as device:
        await online(device)
        network.deaf = network.mute = True
        await asyncio.wait_for(device.event("back"), PATIENCE)
    assert network.connections > 1


@pytest.mark.parametrize("chance", [0.01, 0.6])
async def test_of_several_servers_the_next_is_tried(server: LocalServer, chance: float) -> None:
    host, port = server.addresses.mqtt
    servers = ["127.0.0.1:1", f"{host}:{port}"]
    async with make_device(
        server, "several", on_push=Inbox().take, servers=servers, jitter=lambda: chance
    ) as device:
        await online(device)


def test_a_server_without_a_port_number_is_a_mistake(server: LocalServer) -> None:
    with pytest.raises(ValueError, match="nine"):
        make_device(server, "mistaken", on_push=Inbox().take, servers=["127.0.0.1:nine"])


async def test_tls(start_server: Callable[..., LocalServer], tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    files = (
        "--mqtt-certificate",
        str(tmp_path / "cert.pem"),
        "--mqtt-private-key",
        str(tmp_path / "key.pem"),
    )
    server = start_server("--mqtts-port", "0", *files)
    assert server.addresses.mqtts is not None
    host, port = server.addresses.mqtts
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with make_device(server, "secret", on_push=print, host=host, port=port, tls=trust) as device:
        await online(device)
        await device.event("hello")


# Credentials


@pytest.fixture(scope="module")
def closed_app(server: LocalServer) -> AppKeys:
    return server.create_app("closed")


def closed_device(server: LocalServer, app: AppKeys, name: str | None, **more: object) -> Device:
    host, port = server.addresses.mqtt
    options: dict[str, object] = {"host": host, "port": port, "settings": QUICK, "on_push": print, **more}
    return Device(app.app_key, name, **options)  # type: ignore[arg-type]


async def test_a_device_registers_once_and_keeps_its_credentials(
    server: LocalServer, closed_app: AppKeys, tmp_path: Path
) -> None:
    journal, api = tmp_path / "journal", server.addresses.http
    first = closed_device(
        server, closed_app, None, device_key=closed_app.device_key, api=api, journal=journal, alias="kept"
    )
    async with first:
        await online(first)
    assert first.registration_id
    async with closed_device(server, closed_app, None, journal=journal) as second:
        await online(second)
        assert second.registration_id == first.registration_id
    async with Publisher(closed_app.app_key, closed_app.master_secret, api) as publisher:
        assert (await publisher.device(first.registration_id)).alias == "kept"


async def test_wrong_credentials_stop_the_device(server: LocalServer, closed_app: AppKeys) -> None:
    async with closed_device(server, closed_app, "x", token="wrong" * 8) as device:
        report = asyncio.create_task(device.event("never"))
        with pytest.raises(DeviceStopped, match="does not fit"):
            await online(device)
        with pytest.raises(DeviceStopped):
            await report
        with pytest.raises(DeviceStopped):
            await device.event("never")


async def test_a_refused_registration_stops_the_device(server: LocalServer, closed_app: AppKeys) -> None:
    api = server.addresses.http
    async with closed_device(server, closed_app, "x", device_key="wrong", api=api) as device:
        with pytest.raises(DeviceStopped) as caught:
            await online(device)
        assert caught.value.code == 7004


async def test_a_revoked_token_is_renewed_by_the_hook(server: LocalServer, closed_app: AppKeys) -> None:
    async with Publisher(closed_app.app_key, closed_app.master_secret, server.addresses.http) as publisher:
        asked: list[Credentials] = []

        async def renew(old: Credentials) -> Credentials:
            asked.append(old)
            if len(asked) == 1:
                raise ConnectionError("our backend is busy")
            fresh = await publisher.register_device(old.registration_id)
            return Credentials(old.app_key, old.registration_id, fresh.token, fresh.expires_at)

        token = (await publisher.register_device("renewed")).token
        async with closed_device(server, closed_app, "renewed", token=token, renew=renew) as device:
            await online(device)
            await publisher.revoke_tokens("renewed")
            await asyncio.wait_for(device.event("after"), PATIENCE)
        assert len(asked) == 2


async def test_a_token_is_renewed_before_it_expires(
    server: LocalServer, closed_app: AppKeys, tmp_path: Path
) -> None:
    api, journal = server.addresses.http, tmp_path / "journal"
    options = {"device_key": closed_app.device_key, "api": api, "journal": journal}
    async with closed_device(server, closed_app, None, **options) as device:
        await online(device)
    before = _credentials(journal)
    near_the_end = lambda: before.expires_at - 3600  # noqa: E731
    async with closed_device(server, closed_app, None, clock=near_the_end, **options) as device:
        await online(device)
    assert _credentials(journal).registration_id == before.registration_id
    assert _credentials(journal).expires_at >= before.expires_at


def _credentials(journal: Path) -> Credentials:
    opened = Journal(journal, 1)
    found = opened.credentials()
    opened.close()
    assert found is not None
    return found


async def test_a_journal_of_another_device_is_refused(tmp_path: Path) -> None:
    opened = Journal(tmp_path / "journal", 1)
    opened.keep(Credentials("app", "phone-1", "t", 1.0))
    opened.close()
    with pytest.raises(JournalError, match="belongs to phone-1 of app app"):
        await Device("app", "phone-2", journal=tmp_path / "journal", on_push=print).start()


@pytest.mark.parametrize(
    "options", [{}, {"registration_id": "x"}, {"token": "t"}, {"device_key": "k"}], ids="+".join
)
def test_what_is_missing_is_said_at_once(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give"):
        Device("app", on_push=print, **options)  # type: ignore[arg-type]


async def test_a_device_is_told_what_is_replaced_and_what_to_remove(
    server: LocalServer, publisher: Publisher
) -> None:
    inbox, long = Inbox(), "Good morning. " * 100
    async with make_device(server, "told", on_push=inbox.take) as device:
        await online(device)
        audience = Audience(registration_id=["told"])
        first = await publisher.push(PushRequest(audience, Notification(long)))
        assert await inbox.next() == Push(first.msg_id, {"alert": long})  # it came compressed
        options = Options(override_msg_id=first.msg_id)
        second = await publisher.push(PushRequest(audience, Notification("Better"), options=options))
        assert await inbox.next() == Push(second.msg_id, {"alert": "Better"}, override=first.msg_id)
        await delivered(publisher, second.msg_id)
        await publisher.withdraw(second.msg_id)
        notice = await inbox.next()
        assert notice == Push(notice.msg_id, recall=second.msg_id)


def test_a_push_that_blows_up_is_not_a_push() -> None:
    bomb = zlib.compress(b'{"msg_id":"1","notification":"' + b"x" * (1 << 24))
    assert isinstance(_read_push(Publish("push", bomb, 1, packet_id=1)), str)
    assert len(_inflated(bomb)) == MAX_PUSH
