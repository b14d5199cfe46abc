"""`python -m clients.demo`: a server, two devices and a publisher show the main job, and check each step.

Exits 0 only if everything it says was true.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

import click

from clients.device import Device, LinkSettings, Push
from clients.local_server import LocalServer, ServerFailed
from clients.publisher import (
    Audience,
    Everyone,
    Notification,
    Options,
    Publisher,
    PushError,
    PushRequest,
    Report,
    Single,
)

LIMIT: Final = 300.0  # seconds for the whole demo
STEP_LIMIT: Final = 60.0  # seconds for one thing to happen
QUICK: Final = LinkSettings(backoff_base=0.1, backoff_cap=0.5)  # people are watching
BERLIN: Final = ZoneInfo("Europe/Berlin")
METRICS: Final = ("connects", "deliver", "accept")


class DemoFailed(Exception):
    """A step was not true."""


class Phone:
    """A device that keeps what it got."""

    def __init__(self, server: LocalServer, name: str, folder: Path) -> None:
        self.name = name
        self.got: dict[int, int] = {}  # msg_id -> how often
        self.arrived: asyncio.Queue[Push] = asyncio.Queue()
        self._server = server
        self._journal = folder / f"{name}.journal"

    def take(self, push: Push) -> None:
        self.got[push.msg_id] = self.got.get(push.msg_id, 0) + 1
        self.arrived.put_nowait(push)

    @asynccontextmanager
    async def online(self) -> AsyncIterator[Device]:
        host, port = self._server.addresses.mqtt
        app = self._server.app
        device = Device(
            app.app_key,
            self.name,
            on_push=self.take,
            device_key=app.device_key,
            host=host,
            port=port,
            api=self._server.addresses.http,
            journal=self._journal,
            settings=QUICK,
        )
        async with device, asyncio.timeout(None) as limit:
            limit.reschedule(asyncio.get_running_loop().time() + STEP_LIMIT)
            await device.connected()
            limit.reschedule(None)
            yield device

    async def gets(self, msg_id: int, since: float) -> None:
        """Wait for this push; it must be the next one."""
        try:
            push = await asyncio.wait_for(self.arrived.get(), STEP_LIMIT)
        except TimeoutError:
            raise DemoFailed(f"{self.name} did not get push {msg_id}") from None
        if push.msg_id != msg_id:
            raise DemoFailed(f"{self.name} got {push.msg_id} instead of {msg_id}")
        ok(f"{self.name} got it after {1000 * (time.perf_counter() - since):.1f} ms")


def say(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def ok(text: str) -> None:
    click.echo(f"  ok  {text}")


def check(true: bool, text: str) -> None:
    if not true:
        raise DemoFailed(f"not true: {text}")
    ok(text)


async def demo(server: LocalServer, folder: Path) -> None:
    app, http = server.app, server.addresses.http
    anna, ben = Phone(server, "anna-phone", folder), Phone(server, "ben-phone", folder)
    async with Publisher(app.app_key, app.master_secret, http) as publisher:
        show = Show(server, publisher, anna, ben)
        async with anna.online() as device:
            await show.online(device)
        await show.away()
        await show.crash()
        await show.report()
        await show.withdraw()
        await show.slow()
        await show.later()
        show.exactly_once()
    show_metrics(server)


class Show:
    """The steps, in order."""

    def __init__(self, server: LocalServer, publisher: Publisher, anna: Phone, ben: Phone) -> None:
        self._server = server
        self._publisher = publisher
        self._anna = anna
        self._ben = ben
        self._last = 0

    async def push(self, audience: Audience | Everyone, text: str) -> tuple[int, float]:
        """The msg_id, and when the push was sent."""
        started = time.perf_counter()
        accepted = await self._publisher.push(PushRequest(audience, Notification(text)))
        ok(f"accepted as {accepted.msg_id} after {1000 * (time.perf_counter() - started):.1f} ms")
        self._last = accepted.msg_id
        return accepted.msg_id, started

    async def online(self, anna: Device) -> None:
        async with self._ben.online() as ben:
            say("Two devices registered, connected, and set alias and tags.")
            await anna.update(alias="anna", add_tags=["news"])
            await ben.update(alias="ben", add_tags=["news", "beta"])
            states = await self._publisher.devices_status([anna.registration_id, ben.registration_id])
            check(all(state.online for state in states.values()) and len(states) == 2, "both are online")

            say('A push to the alias "anna".')
            msg_id, since = await self.push(Audience(alias=["anna"]), "Hello Anna")
            await self._anna.gets(msg_id, since)
            await anna.receipt(msg_id, "clicked")
            ok("anna-phone reported that it was clicked")

            say('A push to the tag "beta".')
            await self._ben.gets(*await self.push(Audience(tag=["beta"]), "Hello testers"))

            say("A push to all.")
            msg_id, since = await self.push("all", "Hello everybody")
            await self._anna.gets(msg_id, since)
            await self._ben.gets(msg_id, since)

    async def away(self) -> None:
        say("Both devices are away. A push to anna-phone waits for it.")
        msg_id, _ = await self.push(Audience(registration_id=["anna-phone"]), "You were away")
        check((await self.account(msg_id)).pending == 1, "the report says: pending")
        since = time.perf_counter()
        async with self._anna.online():
            ok("anna-phone came back")
            await self._anna.gets(msg_id, since)

    async def crash(self) -> None:
        say("A push to all, then the server is killed with SIGKILL before any device has it.")
        msg_id, _ = await self.push("all", "Survives a crash")
        self._server.kill()
        check(not self._server.running, "it is dead; the devices keep trying while it is started again")
        since = time.perf_counter()
        await asyncio.gather(
            self._come_back(self._anna, msg_id, since),
            self._come_back(self._ben, msg_id, since),
            asyncio.to_thread(self._server.start),
        )

    @staticmethod
    async def _come_back(phone: Phone, msg_id: int, since: float) -> None:
        """Begins while the server is down."""
        async with phone.online() as device:
            await phone.gets(msg_id, since)
            await device.receipt(msg_id, "shown")

    async def report(self) -> None:
        say("What became of that push.")
        report = await self.account(self._last, lambda report: report.delivered == 2)
        check(report.adds_up, "the targets are all accounted for, each once")
        check(report.shown == 2, "both devices reported that it was shown")
        trace = await self._publisher.reports.trace(self._last, "anna-phone")
        check(trace.status == "delivered", "anna-phone: " + ", ".join(step.step for step in trace.steps))

    async def withdraw(self) -> None:
        say("A push that was a mistake is taken back while anna-phone is away.")
        mistake, _ = await self.push(Audience(alias=["anna"]), "Oops")
        await self._publisher.withdraw(mistake)
        report = await self._publisher.reports.push(mistake)
        check(report.recalled == 1, "the report says: recalled")
        msg_id, since = await self.push(Audience(alias=["anna"]), "What I meant")
        async with self._anna.online():
            await self._anna.gets(msg_id, since)

    async def slow(self) -> None:
        say("A push to all, spread over ten minutes, and stopped on its way.")
        request = PushRequest("all", Notification("Slowly"), options=Options(big_push_duration=10))
        accepted = await self._publisher.push(request)
        paused = await self._publisher.pause(accepted.msg_id)
        ok(f"paused after {paused.released} of {paused.total} devices")
        await self._publisher.stop(accepted.msg_id)
        report = await self._publisher.reports.push(accepted.msg_id)
        check(report.pending == 0 and report.adds_up, f"stopped: {report.recalled} will not get it")

    async def later(self) -> None:
        say('A push to the alias "anna" some seconds from now, said in Berlin\'s time.')
        request = PushRequest(Audience(alias=["anna"]), Notification("On time"))
        async with self._anna.online():
            when = Single.at(datetime.now(BERLIN) + timedelta(seconds=4))  # not over when the server reads it
            schedule_id = await self._publisher.schedules.create("demo", when, request)
            push = await asyncio.wait_for(self._anna.arrived.get(), STEP_LIMIT)
        [firing] = await self._publisher.schedules.log(schedule_id)
        check(firing.msg_id == push.msg_id, f"the schedule of {when.time} made it, and anna-phone got it")

    async def account(
        self, msg_id: int, until: Callable[[Report], bool] = lambda report: report.known
    ) -> Report:
        """The report, asked for until it is as wanted: acknowledgements are recorded in batches."""
        async with asyncio.timeout(STEP_LIMIT):
            while True:
                report = (await self._publisher.received_detail([msg_id]))[0]
                if until(report):
                    break
                await asyncio.sleep(0.02)
        ok(
            f"targets {report.target}: {report.delivered} delivered, {report.pending} pending, "
            f"{report.expired} expired, {report.evicted} evicted"
        )
        return report

    def exactly_once(self) -> None:
        times = [*self._anna.got.values(), *self._ben.got.values()]
        check(set(times) == {1}, f"{len(times)} pushes were handed over, each exactly once")


def show_metrics(server: LocalServer) -> None:
    say(f"Some of what Prometheus sees since the restart, at {server.addresses.admin}/metrics")
    for name, value in server.metrics().items():
        wanted = any(word in name for word in METRICS) and "_bucket" not in name and "_created" not in name
        if wanted and value:
            click.echo(f"      {name} {value:g}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as folder:
        server = LocalServer(Path(folder))
        try:
            say("A server starts, with nothing configured.")
            server.start()
            ok(f"it listens on {server.addresses.http}, and for MQTT on port {server.addresses.mqtt[1]}")
            asyncio.run(asyncio.wait_for(demo(server, Path(folder)), LIMIT))
            say("The server is asked to stop.")
            check(server.terminate() == 0, "it drained and exited with status 0")
        except (DemoFailed, ServerFailed, PushError, TimeoutError) as error:
            click.echo(f"\nFAILED: {error or 'a step took too long'}\n{server.log_text()[-2000:]}", err=True)
            return 1
        finally:
            server.kill()
    click.secho("\nAll of this was true.", bold=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
