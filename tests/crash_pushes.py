"""The load of test_crash_pushes.py: three apps, all that a publisher can do with a push, and the ledger of it.

The app `plain` has no rules of its own: schedules, overrides, collapse keys. `quiet` has quiet hours that begin and
end again and again. `capped` has a frequency cap. Groups push to the first two. Publishers try each call until it is
answered, but for pushes without a cid: those they send once.

The ledger knows nothing of the server but its answers and what devices got. Times are Unix seconds of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from time import time
from typing import Any, Final

import aiohttp
import orjson
from aiohttp import web

from clients.local_server import AppKeys, LocalServer
from gateway.mqtt import Packet, Publish
from tests import crash_load
from tests.crash_load import AGAIN_AFTER, GONE

FLEETS: Final = {"plain": 24, "quiet": 14, "capped": 10}  # devices
TAGS: Final = ("red", "green", "blue", "big")
KEYS: Final = ("score", "weather")  # collapse keys
CAP: Final = 6  # pushes for a device of `capped`
SHORT_TTLS: Final = (0, 2)  # what may expire before a device is back
REFUSALS: Final = {1012, 8100}  # too many slow pushes; a schedule whose time is over


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    since: float  # when its connection was opened
    override: str | None


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A withdrawal, or the stop of a slow push."""

    asked: float
    answered: float  # from then on no connection that is opened gets it
    notifies: bool  # devices that have it are told to remove it


@dataclass(slots=True, eq=False)
class Push:
    """What one publisher sent once, or again and again under one cid; or what a schedule makes."""

    uid: str  # its alert
    world: World
    audience: object
    targets: frozenset[str]  # registration ids, by the ledger's own model
    options: dict[str, Any]
    cid: str | None = None
    events: tuple[str, ...] = ()  # of its callback
    replaces: Push | None = None
    begun: float = 0.0
    answered_at: float = 0.0
    refused: str = ""
    answers: set[str] = field(default_factory=set)  # msg_ids it was answered with
    msg_ids: set[str] = field(default_factory=set)  # under which devices got it, or its schedule's log has it
    arrivals: dict[str, list[Arrival]] = field(default_factory=dict)
    taken_back: list[TakenBack] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """What a push and an item of a batch have in common."""
        body: dict[str, Any] = {"platform": "all", "notification": {"alert": self.uid}}
        if self.options:
            body["options"] = self.options
        if self.events:
            body["callback"] = {"url": self.world.load.receiver.url, "events": self.events}
        return body

    def body(self) -> bytes:
        cid = {"cid": self.cid} if self.cid else {}
        return orjson.dumps(self.content() | {"audience": self.audience} | cid)

    @property
    def exists(self) -> bool:
        """Somebody knows that the server has it."""
        return bool(self.answers or self.msg_ids)

    @property
    def msg_id(self) -> str:
        return min(self.answers | self.msg_ids)

    @property
    def high(self) -> bool:
        return self.options.get("priority") == "high"

    @property
    def slow(self) -> bool:
        return "big_push_duration" in self.options

    @property
    def may_go_later(self) -> bool:
        """In parts: their place among other pushes is not that of its msg_id."""
        return self.slow or (self.world.name == "quiet" and not self.high)

    @property
    def may_expire(self) -> bool:
        return self.options.get("time_to_live") in SHORT_TTLS

    @property
    def collapse(self) -> str | None:
        return self.options.get("collapse_key")


@dataclass(slots=True, eq=False)
class Schedule:
    """It fires once while the test runs, also where it is a periodical one."""

    push: Push
    due: float
    trigger: dict[str, Any]
    id: str = ""
    created: float = 0.0  # not later than this
    delete_asked: float = 0.0
    deleted: float = 0.0


class Ledger:
    """Every push, what became of it, and whatever broke a guarantee on the way."""

    def __init__(self) -> None:
        self.pushes: dict[tuple[str, str], Push] = {}  # by world and uid
        self.by_msg_id: dict[str, Push] = {}
        self.schedules: list[Schedule] = []
        self.notices: dict[str, set[str]] = {}  # msg_id -> devices that were told to remove it
        self.notice_ids: set[str] = set()  # of the notices themselves
        self.kills: list[float] = []
        self.starts: list[float] = []
        self.wrong: list[str] = []
        self.copies = 0
        self.looks = 0  # at reports
        self.on_answer: Callable[[], None] | None = None  # called once, at the next answer
        self.on_call: Callable[[], None] | None = None  # called once, when the next call of that kind begins
        self.on_kind = ""  # in "METHOD /path"
        self.fates: Counter[str] = Counter()  # of deliveries, as the server tells them in the end

    def add(self, push: Push) -> Push:
        push.begun = time()
        self.pushes[push.world.name, push.uid] = push
        return push

    def called(self, what: str) -> None:
        if self.on_call is not None and self.on_kind in what:
            act, self.on_call = self.on_call, None
            act()

    def answered(self, push: Push, msg_id: str) -> None:
        if self.on_answer is not None:
            act, self.on_answer = self.on_answer, None
            act()
        push.answered_at = time()
        push.answers.add(msg_id)
        self.by_msg_id[msg_id] = push

    def arrived(self, world: World, device: str, uid: str, msg_id: str, arrival: Arrival) -> Push:
        self.copies += 1
        push = self.pushes[world.name, uid]
        push.msg_ids.add(msg_id)
        push.arrivals.setdefault(device, []).append(arrival)
        self.by_msg_id[msg_id] = push
        return push


class World:
    """One app with its fleet. What crash_load.Device needs of a load."""

    def __init__(self, load: Load, name: str, app: AppKeys) -> None:
        self.load = load
        self.name = name
        self.app = app
        self.server = load.server
        self.ledger = load.ledger
        self.draining = load.draining
        self.recorded = load.recorded
        self.patient = False
        self.names = [f"{name}-{n}" for n in range(FLEETS[name])]
        self.tokens: dict[str, bytes] = {}
        self.tags = {device: set(load.random.sample(TAGS, 2)) for device in self.names}

    def alias(self, device: str) -> str:
        return f"alias{self.names.index(device) % (len(self.names) // 2)}"

    def having(self, tag: str) -> set[str]:
        return {device for device in self.names if tag in self.tags[device]}

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with self.load.session(self.app.app_key, self.app.master_secret) as http:
            yield http

    async def register(self) -> None:
        async with self.session() as http:
            for device in self.names:
                body = {
                    "registration_id": device,
                    "tags": sorted(self.tags[device]),
                    "alias": self.alias(device),
                }
                async with http.post("/v1/devices", data=orjson.dumps(body)) as answer:
                    self.tokens[device] = orjson.loads(await answer.read())["token"].encode()

    def audience(self, random: Random) -> tuple[object, set[str]]:
        kind = random.choice(("few", "few", "many", "alias", "tag", "tag_not", "all"))
        if kind == "all":
            return "all", set(self.names)
        if kind in ("few", "many"):
            names = random.sample(self.names, random.randint(1, 3 if kind == "few" else 9))
            return {"registration_id": names}, set(names)
        if kind == "alias":
            alias = self.alias(random.choice(self.names))
            return {"alias": [alias]}, {name for name in self.names if self.alias(name) == alias}
        first, second = random.sample(TAGS, 2)
        targets = self.having(first) - (self.having(second) if kind == "tag_not" else set())
        audience = {"tag": [first]} | ({"tag_not": [second]} if kind == "tag_not" else {})
        return (audience, targets) if targets else self.audience(random)

    def draft(self, random: Random, audience: object, targets: set[str]) -> Push:
        """A push with some of the options."""
        options: dict[str, Any] = {}
        if random.random() < 0.15:
            options["priority"] = "high"
        if random.random() < 0.15:
            options["time_to_live"] = random.choice(SHORT_TTLS)
        if random.random() < 0.12:
            options["big_push_duration"] = 1
        push = Push(self.load.uid(), self, audience, frozenset(targets), options)
        if self.name == "plain":
            if random.random() < 0.2:
                options["collapse_key"] = random.choice(KEYS)
            elif random.random() < 0.15 and (known := self.load.known(self, random)) is not None:
                push.replaces, options["override_msg_id"] = known, known.msg_id
        if random.random() < 0.4:
            push.events = ("delivered", "recalled", "suppressed")
        if random.random() < 0.6:
            push.cid = f"cid-{push.uid}"
        return push


class Receiver:
    """Of callbacks; now and then it fails, or is slow."""

    def __init__(self, seed: int) -> None:
        self.url = ""
        self.told: dict[tuple[str, str], set[str]] = {}  # msg_id, event -> devices
        self.events: dict[str, object] = {}  # by event_id: what it said
        self.wrong: list[str] = []
        self._random = Random(seed)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/told", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/told"
            yield
        finally:
            await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        mood = self._random.random()
        if mood < 0.1:
            return web.Response(status=500)
        if mood < 0.2:
            await asyncio.sleep(self._random.random() * 0.5)
        for event in body["events"]:
            event_id, said = event["event_id"], (event["msg_id"], event["event"], event["registration_ids"])
            if self.events.setdefault(event_id, said) != said:
                self.wrong.append(f"callback event {event_id} said {self.events[event_id]}, then {said}")
            self.told.setdefault(said[:2], set()).update(said[2])
        return web.Response()


class Load(crash_load.Load):
    """The gate of crash_load.Load, and the worlds behind it."""

    ledger: Ledger

    def __init__(self, server: LocalServer, seed: int) -> None:
        super().__init__(server, seed)
        self.ledger = Ledger()
        self.receiver = Receiver(self.random.getrandbits(32))
        apps = {"plain": server.app} | {
            name: server.create_app(name, open=True) for name in ("quiet", "capped")
        }
        self.worlds = {name: World(self, name, app) for name, app in apps.items()}
        self.group_key, self.group_secret = server.create_group(
            "both", *(apps[name].app_key for name in ("plain", "quiet"))
        )
        self._count = 0

    def uid(self) -> str:
        self._count += 1
        return f"p{self._count}"

    def session(self, user: str = "", secret: str = "") -> aiohttp.ClientSession:
        login = b64encode(f"{user}:{secret}".encode()).decode()
        headers = {"Authorization": f"Basic {login}"}
        return aiohttp.ClientSession(self.server.addresses.http, headers=headers)

    def known(self, world: World, random: Random) -> Push | None:
        """One of the later pushes that the server has."""
        pushes = [
            p for p in list(self.ledger.pushes.values())[-60:] if p.world is world and len(p.answers) == 1
        ]
        return random.choice(pushes) if pushes else None

    def seeds(self) -> Iterator[int]:
        while True:
            yield self.random.getrandbits(32)


class Device(crash_load.Device):
    """Notes on which connection it got what."""

    _load: World
    _since: float

    async def _live(self) -> None:
        self._since = time()
        await super()._live()

    async def _stay(self) -> None:
        self._since = time()
        await super()._stay()

    def _take(self, packets: Sequence[Packet], last: int) -> tuple[int, list[int]]:
        ids = []
        for packet in packets:
            if isinstance(packet, Publish):
                ids.append(packet.packet_id)
                content = orjson.loads(packet.payload)
                msg_id = int(content["msg_id"])
                if self._note(content):
                    if msg_id <= last:
                        self._load.ledger.wrong.append(
                            f"{self.name}: {msg_id} came after {last} on one connection (G3)"
                        )
                    last = msg_id
        return last, ids

    def _note(self, content: dict[str, Any]) -> bool:
        """Whether its msg_id is that of a row, which have an order (G3)."""
        ledger = self._load.ledger
        if "recall" in content:
            ledger.notices.setdefault(content["recall"], set()).add(self.name)
            ledger.notice_ids.add(content["msg_id"])
            return True
        arrival = Arrival(time(), self._since, content.get("override"))
        uid = content["notification"]["alert"]
        push = ledger.arrived(self._load, self.name, uid, content["msg_id"], arrival)
        return not push.may_go_later


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any
    tries: int

    @property
    def code(self) -> int:
        """Of the error; 0: none."""
        return int(self.body["error"]["code"]) if self.status != 200 else 0


class Publisher:
    """Does one thing after the other to one app."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._load = world.load
        self._ledger = world.ledger
        self._random = Random(seed)
        self._actions = {
            self._single: 10, self._batch: 2, self._withdraw: 2, self._steer: 2, self._file: 1,
        }  # fmt: skip
        if world.name == "plain":
            self._actions |= {self._schedule: 2, self._change_schedule: 1, self._group: 2}
        if world.name == "quiet":
            self._actions |= {self._set_quiet_hours: 1}

    async def run(self) -> None:
        async with self._world.session() as http:
            while True:
                (action,) = self._random.choices(list(self._actions), weights=list(self._actions.values()))
                async with self._load.turn():
                    await action(http)
                await asyncio.sleep(self._random.random() * 0.15)

    async def call(
        self, http: aiohttp.ClientSession, method: str, path: str, body: bytes = b"", *, again: bool = True
    ) -> Answer | None:
        """None: the server went away, and it must not be tried again."""
        tries = 0
        while True:
            tries += 1
            self._ledger.called(f"{method} {path}")
            try:
                async with http.request(method, path, data=body) as answer:
                    raw = await answer.read()
            except GONE:
                if not again:
                    return None
                await asyncio.sleep(AGAIN_AFTER)
                continue
            if answer.status >= 500:
                self._ledger.wrong.append(f"{method} {path}: {answer.status} {raw[:200]!r}")
            return Answer(answer.status, orjson.loads(raw) if raw else {}, tries)

    # Pushes

    def _new_push(self) -> Push:
        return self._ledger.add(self._world.draft(self._random, *self._world.audience(self._random)))

    async def _single(self, http: aiohttp.ClientSession) -> None:
        await self._send(http, "/v3/push", self._new_push())

    async def _send(self, http: aiohttp.ClientSession, path: str, push: Push) -> None:
        answer = await self.call(http, "POST", path, push.body(), again=push.cid is not None)
        if answer is not None:
            self._take_result(push, answer.body, answer.tries)

    def _take_result(self, push: Push, result: dict[str, Any], tries: int) -> None:
        if "msg_id" in result and "error" not in result:
            self._ledger.answered(push, result["msg_id"])
            return
        error = result["error"]
        push.refused = f"{error} at the {tries}. attempt"
        if error["code"] not in REFUSALS and not (error["code"] == 1011 and not push.targets):
            self._ledger.wrong.append(f"push {push.uid} refused: {push.refused}")

    async def _batch(self, http: aiohttp.ClientSession) -> None:
        pushes = []
        for name in self._random.sample(self._world.names, self._random.randint(1, 8)):
            push = self._world.draft(self._random, None, {name})
            push.cid = f"cid-{push.uid}"
            pushes.append(self._ledger.add(push))
        items = {push.cid: push.content() | {"target": min(push.targets)} for push in pushes}
        nobody = {"nobody": {"platform": "all", "target": "nobody", "notification": {"alert": "nobody"}}}
        body = orjson.dumps({"pushlist": items | nobody})
        answer = await self.call(http, "POST", "/v3/push/batch/regid/single", body)
        assert answer is not None
        for push in pushes:
            self._take_result(push, answer.body[push.cid], answer.tries)

    async def _group(self, _: aiohttp.ClientSession) -> None:
        audience, both = {"tag": [self._random.choice(TAGS)]}, ("plain", "quiet")
        first, second = (self._load.worlds[name] for name in both)
        (tag,) = audience["tag"]
        push = first.draft(self._random, audience, first.having(tag))
        push.options.pop("override_msg_id", None)
        push.replaces, push.cid = None, f"cid-{push.uid}"
        other = Push(
            push.uid, second, audience, frozenset(second.having(tag)), push.options, push.cid, push.events
        )
        pushes = [self._ledger.add(push), self._ledger.add(other)]
        login = ("group-" + self._load.group_key, self._load.group_secret)
        async with self._load.session(*login) as http:
            answer = await self.call(http, "POST", "/v3/grouppush", push.body())
        assert answer is not None
        for one in pushes:
            self._take_result(one, answer.body[one.world.app.app_key], answer.tries)

    async def _file(self, http: aiohttp.ClientSession) -> None:
        """Upload a list, push to it, delete it."""
        names = self._random.sample(self._world.names, self._random.randint(1, len(self._world.names)))
        file_id = await self._upload(http, names)
        audience = {"file": {"file_id": file_id}}
        push = self._ledger.add(self._world.draft(self._random, audience, set(names)))
        await self._send(http, self._random.choice(("/v3/push", "/v3/push/file")), push)
        answer = await self.call(http, "DELETE", f"/v3/files/{file_id}")
        assert answer is not None
        if answer.status != 200 and answer.tries == 1:
            self._ledger.wrong.append(f"file {file_id} not deleted: {answer.body}")

    async def _upload(self, http: aiohttp.ClientSession, names: list[str]) -> str:
        while True:
            form = aiohttp.FormData()
            form.add_field("filename", "\n".join([*names, "nobody"]), filename="names.txt")
            try:
                async with http.post("/v3/files/registration_id", data=form) as answer:
                    raw = await answer.read()
                    if answer.status != 200:
                        self._ledger.wrong.append(f"upload: {answer.status} {raw[:200]!r}")
                    return str(orjson.loads(raw)["file_id"])
            except GONE:
                await asyncio.sleep(AGAIN_AFTER)

    # What is done to pushes

    async def _withdraw(self, http: aiohttp.ClientSession) -> None:
        push = self._load.known(self._world, self._random)
        if push is not None:
            await self.take_back(http, push, "DELETE", f"/v3/push/{push.msg_id}")

    async def _steer(self, http: aiohttp.ClientSession) -> None:
        """Pause, resume or stop a push that goes in parts."""
        push = self._load.known(self._world, self._random)
        if push is None or not push.may_go_later:
            return
        verb = self._random.choice(("pause", "resume", "resume", "stop", "stop"))
        if verb == "stop":
            await self.take_back(http, push, "POST", f"/v1/pushes/{push.msg_id}/stop")
            return
        answer = await self.call(http, "POST", f"/v1/pushes/{push.msg_id}/{verb}")
        assert answer is not None
        if answer.code not in (0, 1003):
            self._ledger.wrong.append(f"{verb} {push.msg_id}: {answer.body}")

    async def take_back(self, http: aiohttp.ClientSession, push: Push, method: str, path: str) -> None:
        """Until it is answered. A stop is refused where all of the push is sent."""
        asked, place = time(), len(push.taken_back)
        notifies = method == "DELETE"
        push.taken_back.append(TakenBack(asked, float("inf"), notifies))  # until it is answered
        answer = await self.call(http, method, path)
        assert answer is not None
        if answer.status == 200:
            push.taken_back[place] = TakenBack(asked, time(), notifies)
        elif method == "DELETE" or answer.code != 1003:
            self._ledger.wrong.append(f"{method} {path}: {answer.body}")

    # Schedules

    async def _schedule(self, http: aiohttp.ClientSession) -> None:
        push = self._new_push()
        push.cid = None
        due = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=self._random.randint(2, 4))
        schedule = Schedule(push, due.timestamp(), self._trigger(due))
        self._ledger.schedules.append(schedule)
        body = {"name": push.uid, "enabled": True, "trigger": schedule.trigger, "cid": f"schedule-{push.uid}"}
        body["push"] = push.content() | {"audience": push.audience}
        answer = await self.call(http, "POST", "/v3/schedules", orjson.dumps(body))
        assert answer is not None
        if answer.status == 200:
            schedule.id, schedule.created = answer.body["schedule_id"], time()
            return
        push.refused = f"{answer.body} at the {answer.tries}. attempt"
        if answer.code not in REFUSALS or time() < schedule.due:
            self._ledger.wrong.append(f"schedule {push.uid} refused: {push.refused}")

    def _trigger(self, due: datetime) -> dict[str, Any]:
        if self._random.random() < 0.6:
            return {"single": {"time": f"{due:%Y-%m-%d %H:%M:%S}", "zone": "UTC"}}
        end = due + timedelta(days=30)
        return {"periodical": {
            "start": f"{due:%Y-%m-%d} 00:00:00", "end": f"{end:%Y-%m-%d %H:%M:%S}", "time": f"{due:%H:%M:%S}",
            "time_unit": "day", "frequency": 2, "zone": "UTC",
        }}  # fmt: skip

    async def _change_schedule(self, http: aiohttp.ClientSession) -> None:
        """Delete one, or give it another name while it may be about to fire."""
        known = [one for one in self._ledger.schedules[-5:] if one.id and not one.delete_asked]
        if not known:
            return
        schedule = self._random.choice(known)
        path = f"/v3/schedules/{schedule.id}"
        if self._random.random() < 0.5:
            answer = await self.call(http, "PUT", path, orjson.dumps({"name": schedule.push.uid + " again"}))
            assert answer is not None
            if answer.code not in (0, 8100, 8104):  # it is over; somebody deleted it
                self._ledger.wrong.append(f"{path}: {answer.body}")
            return
        schedule.delete_asked = time()
        answer = await self.call(http, "DELETE", path)
        assert answer is not None
        schedule.deleted = time()
        if answer.code not in (0, 8104):
            self._ledger.wrong.append(f"{path}: {answer.body}")

    # Rules

    async def _set_quiet_hours(self, http: aiohttp.ClientSession) -> None:
        end = int(time()) + self._random.randint(2, 6)
        await self.set_rules(http, {"quiet_hours": quiet_hours(end)})

    async def set_rules(self, http: aiohttp.ClientSession, rules: dict[str, Any]) -> None:
        answer = await self.call(http, "PUT", "/v1/settings", orjson.dumps(rules))
        assert answer is not None
        if answer.status != 200:
            self._ledger.wrong.append(f"rules {rules}: {answer.body}")


# Quiet hours begin and end with a minute of their zone: zones that are some seconds off let them end in any second


def make_zones(directory: Path) -> None:
    """Zone files (RFC 8536) of UTC plus 0 to 59 seconds, as Crash/<seconds>."""
    (directory / "Crash").mkdir(parents=True)
    head = b"TZif" + bytes(16) + struct.pack(">6l", 0, 0, 0, 0, 1, 4)
    for seconds in range(60):
        zone = head + struct.pack(">lBB", seconds, 0, 0) + b"CRS\0"
        (directory / "Crash" / str(seconds)).write_bytes(zone)


def quiet_hours(end: int) -> dict[str, str]:
    """Quiet from up to two minutes before `end` (Unix seconds) on."""
    offset = -end % 60
    last = datetime.fromtimestamp(end + offset, UTC)
    first = last - timedelta(minutes=2)
    return {"start": f"{first:%H:%M}", "end": f"{last:%H:%M}", "zone": f"Crash/{offset}"}


class Auditor:
    """Looks at reports all the time: they add up (G4), and nothing comes undone across crashes."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._ledger = world.ledger
        self._random = Random(seed)
        self._seen: dict[str, dict[str, int]] = {}

    async def run(self) -> None:
        async with self._world.session() as http:
            while True:
                with contextlib.suppress(*GONE):
                    await self._look(http)
                await asyncio.sleep(0.05)

    async def _look(self, http: aiohttp.ClientSession) -> None:
        known = [i for i, push in self._ledger.by_msg_id.items() if push.world is self._world]
        if not known:
            return
        some = self._random.sample(known, min(20, len(known)))
        async with http.get("/v3/received/detail", params={"msg_ids": ",".join(some)}) as answer:
            rows = orjson.loads(await answer.read())
        async with http.get(f"/v1/pushes/{some[0]}") as answer:
            rows.append(orjson.loads(await answer.read()))
        for row in rows:
            self._ledger.wrong += self._mistakes(row)

    def _mistakes(self, row: dict[str, Any]) -> Iterator[str]:
        self._ledger.looks += 1
        msg_id = row["msg_id"]
        if wrong := sum_mistake(row, self._ledger.by_msg_id[msg_id]):
            yield wrong
            return
        now = {name: row[name] for name in ("delivered", "suppressed", "parts") if name in row}
        before = self._seen.get(msg_id, {})
        self._seen[msg_id] = before | now
        if any(now.get(name, count) < count for name, count in before.items()):
            yield f"{msg_id}: the report said {before}, now {now}"


STATES: Final = ("delivered", "pending", "expired", "evicted", "recalled", "suppressed")


def sum_mistake(row: dict[str, Any], push: Push) -> str | None:
    """G4."""
    if row["target"] is None or "error" in row:
        return f"{row['msg_id']} ({push.uid}): the report knows nothing of it"
    counts = {name: row[name] for name in STATES}
    if row["target"] != len(push.targets) or sum(counts.values()) != row["target"]:
        return f"{row['msg_id']} ({push.uid}): {counts} of {row['target']}, for {len(push.targets)}"
    return None
