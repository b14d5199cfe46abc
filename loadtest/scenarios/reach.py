"""Audiences over an app with a million devices, ten tags and five attributes each: how long it takes to find out whom
a push is for, to change that, and what it costs to keep it.

The devices are imported once, as a team that moves here would. Everything is asked over HTTP, as a publisher would;
the times are those of whole calls. What was never used since the start is read from the disk first: such a call has
a row of its own.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest.http_pool import HttpPool
from loadtest.population import Population
from loadtest.publishing import check_accepted, keep_in_flight, quantile
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.server import Server, run_holdfast
from loadtest.stage import HTTP_CONNECTIONS, Meter, Stage

IMPORTED: Final = 1000  # devices in one call
IMPORTS_IN_FLIGHT: Final = 4
TAGS: Final = 1000
TAGS_OF_DEVICE: Final = 10
HALF: Final = "half"  # a tag that every second device has, at random
VERSIONS: Final = tuple(f"{a}.{b}.{c}" for a in range(1, 5) for b in range(12) for c in range(5))
LANGUAGES: Final = ("en", "de", "zh", "fr", "es", "ja")
REGIONS: Final = ("DE", "US", "CN", "FR", "JP")
EXPRESSIONS: Final = 40  # of each kind, in one run
PUSHES: Final = 20
TAGGED_AT_ONCE: Final = 1000
BOUNDARY: Final = "reach"
MS: Final = 1000
MB: Final = 1 << 20
LONG: Final = 120.0  # seconds that one call may take

SEGMENTS: Final[dict[str, Any]] = {
    "a version": {"attribute": "app_version", "op": ">=", "value": "2.3"},
    "a range of numbers": {"attribute": "age", "op": "between", "value": [18, 30]},
    "eight conditions": {
        "and": [
            {"attribute": "app_version", "op": ">=", "value": "2.3"},
            {"attribute": "language", "op": "in", "value": ["en", "de"]},
            {"not": {"attribute": "region", "op": "=", "value": "CN"}},
            {"attribute": "age", "op": "between", "value": [18, 30]},
            {"or": [{"platform": "ios"}, {"tag": "tag3"}]},
            {"attribute": "paying", "op": "=", "value": False},
            {"last_active": {"before": 30}},
        ]
    },
}


def reach(stage: Stage) -> list[Row]:
    population, imported = _import(stage)
    rows = [imported, _start_up(stage, population)]
    reactor = Reactor()
    with stage.server(population) as server:
        pool = population.pool(reactor, server, HTTP_CONNECTIONS)
        scene = Scene(stage, server, pool, population.names, random.Random(1))
        rows += [
            *_memory(scene),
            *_expressions(scene),
            *_segments(scene),
            *_broadcasts(scene),
            *_file(scene),
            *_tagging(scene),
        ]
        pool.close()
    reactor.close()
    return rows


@dataclass(frozen=True, slots=True)
class Scene:
    """A server, and who asks it."""

    stage: Stage
    server: Server
    pool: HttpPool
    names: tuple[str, ...]
    random: random.Random

    def time(self, method: str, path: str, body: object) -> float:
        """Milliseconds of one call that has to succeed."""
        return self.time_request(self.pool.build(method, path, orjson.dumps(body)))

    def time_request(self, request: bytes) -> float:
        answers: list[bytes] = []

        def take(status: int, body: bytes) -> None:
            check_accepted(status, body)
            answers.append(body)

        started = time.perf_counter()
        self.pool.send(request, take)
        self.pool.reactor.run_until(lambda: bool(answers), "the answer", limit=LONG)
        return (time.perf_counter() - started) * MS

    def tags(self, count: int) -> list[str]:
        return [f"tag{n}" for n in self.random.sample(range(TAGS), count)]


Asked = tuple[str, object]  # path and body of a call
Make = Callable[[Scene], Asked]
ESTIMATE: Final = "/v1/audience/estimate"


# The devices


def _import(stage: Stage) -> tuple[Population, Row]:
    count = stage.plan.reachable
    directory = stage.directory / "reach" / "data"
    directory.parent.mkdir(parents=True)
    app = run_holdfast("app", "create", "reach", "--data-dir", str(directory), source=stage.source)
    server = Server(directory, core=stage.server_core, source=stage.source)
    server.start()
    names = tuple(f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in range(count))
    population = Population(directory, app["app_key"], app["master_secret"], app["device_key"], names, ())
    try:
        reactor = Reactor()
        pool = population.pool(reactor, server, IMPORTS_IN_FLIGHT)
        meter = Meter(server.pid)
        with stage.profiled(server, "reach-import"), meter.running():
            calls, seconds = keep_in_flight(pool, _imports(pool, names), check_accepted, IMPORTS_IN_FLIGHT)
        pool.close()
        reactor.close()
    finally:
        server.stop()
    stage.say(f"reach: imported {count:,} devices in {seconds:.0f} s")
    assert calls == -(-count // IMPORTED)
    return population, Row("reach: devices imported", "/s", [count / seconds], loads=[meter.load])


def _imports(pool: HttpPool, names: tuple[str, ...]) -> Iterator[bytes]:
    some = random.Random(0)
    for start in range(0, len(names), IMPORTED):
        numbers = range(start, min(start + IMPORTED, len(names)))
        devices = [_device(n, names[n], some) for n in numbers]
        yield pool.build("POST", "/v1/devices/import", orjson.dumps({"devices": devices}))


def _device(number: int, name: str, some: random.Random) -> dict[str, Any]:
    """Some tags are on a tenth of all devices, most on some thousands."""
    tags = {f"tag{int(TAGS * some.random() ** 2)}" for _ in range(TAGS_OF_DEVICE)}
    return {
        "registration_id": name,
        "platform": some.choice(("android", "android", "ios", "hmos")),
        "alias": f"user{number // 2}",
        "tags": [*tags, HALF] if some.random() < 0.5 else list(tags),
        "attributes": {
            "app_version": some.choice(VERSIONS),
            "language": some.choice(LANGUAGES),
            "region": some.choice(REGIONS),
            "age": some.randint(12, 90),
            "paying": some.random() < 0.1,
        },
    }


# What it costs to keep


def _start_up(stage: Stage, population: Population) -> Row:
    values = []
    for _ in range(stage.plan.runs):
        server = Server(population.directory, core=stage.server_core, source=stage.source)
        started = time.perf_counter()
        server.start()
        try:
            reactor = Reactor()
            pool = population.pool(reactor, server, 1)
            pool.call("POST", "/v1/audience/estimate", {"platform": "all", "audience": "all"})
            values.append(time.perf_counter() - started)
            pool.close()
            reactor.close()
        finally:
            server.stop()
    return Row("reach: from start to the first answer", "s", values, at_most=20)


def _memory(scene: Scene) -> list[Row]:
    """Every tag and attribute is used once: from then on they are kept, as far as the store keeps them."""
    before = scene.server.steady_rss()
    first = scene.time("POST", *_random_tags(scene))
    for start in range(0, TAGS, 20):
        scene.time(
            "POST", "/v1/audience/estimate", _tagged(tag=[f"tag{n}" for n in range(start, start + 20)])
        )
    for rule in SEGMENTS.values():
        scene.time("POST", "/v1/segments/estimate", {"rule": rule})
    used = scene.server.steady_rss() - before
    devices = len(scene.names)
    return [
        Row(
            "reach: memory of registry and index, all in use", "bytes a device", [used / devices], at_most=300
        ),
        Row("reach: 20 tag, 20 tag_and, 20 tag_not, tags not used since the start", "ms", [first]),
    ]


# Whom a push is for


def _tagged(**audience: list[str]) -> dict[str, Any]:
    return {"platform": "all", "audience": audience}


def _random_tags(scene: Scene) -> Asked:
    tags = scene.tags(60)
    return ESTIMATE, _tagged(tag=tags[:20], tag_and=tags[20:40], tag_not=tags[40:])


def _used_tags(_: Scene) -> Asked:
    tags = [f"tag{n}" for n in range(40)]
    return ESTIMATE, _tagged(tag=tags[:20], tag_and=tags[:1], tag_not=tags[20:])


def _half(scene: Scene) -> Asked:
    return ESTIMATE, _tagged(tag=[HALF], tag_not=scene.tags(20))


def _expressions(scene: Scene) -> list[Row]:
    kinds = {
        "20 tag, 20 tag_and, 20 tag_not": _random_tags,
        "20 tag, 1 tag_and, 20 tag_not, the most used": _used_tags,
        "half of all, less 20 tags": _half,
    }
    return [_row(scene, f"reach: {what}", make, at_most=5) for what, make in kinds.items()]


def _segments(scene: Scene) -> list[Row]:
    return [
        _row(
            scene,
            f"reach: a segment over {what}",
            _always("/v1/segments/estimate", {"rule": rule}),
            at_most=50,
        )
        for what, rule in SEGMENTS.items()
    ]


def _always(path: str, body: object) -> Make:
    return lambda _: (path, body)


def _row(scene: Scene, what: str, make: Make, *, at_most: float, count: int = EXPRESSIONS) -> Row:
    """The 95th percentile of each run's calls, one after the other."""
    values: list[float] = []
    loads: list[Load] = []
    cpu = 0.0
    for _ in range(scene.stage.plan.runs):
        calls = [make(scene) for _ in range(count)]
        meter = Meter(scene.server.pid)
        with meter.running():
            times = [scene.time("POST", path, body) for path, body in calls]
        values.append(quantile(times, 0.95))
        loads.append(meter.load)
        cpu += meter.server_cpu
    each = cpu * MS / (count * len(values))
    scene.stage.say(f"{what}: {values[-1]:.1f} ms, {each:.2f} ms of CPU")
    return Row(f"{what}, p95", "ms", values, at_most=at_most, loads=loads, note=f"{each:.2f} ms of CPU each")


# Pushing to them


def _push(audience: object) -> dict[str, Any]:
    return {
        "platform": "all",
        "audience": audience,
        "notification": {"alert": "hello"},
        "options": {"time_to_live": 60},
    }


def _broadcasts(scene: Scene) -> list[Row]:
    audiences = {"all devices": "all", "a random half": {"tag": [HALF]}}
    return [
        _row(
            scene,
            f"reach: accepting a broadcast to {what}",
            _always("/v3/push", _push(audience)),
            at_most=20,
            count=PUSHES,
        )
        for what, audience in audiences.items()
    ]


def _file(scene: Scene) -> list[Row]:
    """The most that the server ever had in memory, against what it has before: nothing here may hold the list."""
    names = list(scene.names)
    scene.random.shuffle(names)
    upload = _form(scene.pool, "\n".join(names).encode())
    uploads, pushes, peaks = [], [], []
    for _ in range(scene.stage.plan.runs):
        before = max(scene.server.steady_rss(), _peak(scene.server))
        uploads.append(scene.time_request(upload) / MS)
        file_id = scene.pool.call("GET", "/v3/files")["files"][-1]["file_id"]
        pushes.append(scene.time("POST", "/v3/push/file", _push({"file": {"file_id": file_id}})) / MS)
        peaks.append((_peak(scene.server) - before) / MB)
        scene.pool.call("DELETE", f"/v3/files/{file_id}")
        scene.stage.say(f"reach: a file, {uploads[-1]:.1f} s up, {pushes[-1]:.1f} s to push")
    lines = f"{len(names):,} lines"
    return [
        Row(f"reach: uploading a file of {lines}", "s", uploads),
        Row(f"reach: accepting a push to a file of {lines}", "s", pushes, at_most=10),
        Row("reach: both together, memory above the highest before", "MB", peaks, at_most=32),
    ]


def _form(pool: HttpPool, content: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="filename"; filename="ids.txt"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    request = pool.build("POST", "/v3/files/registration_id", body)
    return request.replace(b"application/json", f"multipart/form-data; boundary={BOUNDARY}".encode(), 1)


def _peak(server: Server) -> int:
    """The most bytes that were resident."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# Changing it


def _tagging(scene: Scene) -> list[Row]:
    many = min(TAGGED_AT_ONCE, len(scene.names))

    def batches() -> Iterator[bytes]:
        for n in itertools.count():
            body = {"registration_ids": {"add": scene.random.sample(scene.names, many)}}
            yield scene.pool.build("POST", f"/v3/tags/new{n % 50}", orjson.dumps(body))

    def singles() -> Iterator[bytes]:
        for n in itertools.count():
            name = scene.random.choice(scene.names)
            yield scene.pool.build("POST", f"/v3/devices/{name}", b'{"tags":{"add":["one%d"]}}' % (n % 50))

    return [
        _rate(scene, f"reach: tags set, {many:,} devices a call", batches, many, IMPORTS_IN_FLIGHT),
        _rate(
            scene,
            f"reach: tags set, one device a call, {HTTP_CONNECTIONS} connections",
            singles,
            1,
            HTTP_CONNECTIONS,
        ),
    ]


def _rate(scene: Scene, what: str, make: Callable[[], Iterator[bytes]], devices: int, at_once: int) -> Row:
    values: list[float] = []
    loads: list[Load] = []
    cpu = 0.0
    for run in range(scene.stage.plan.runs):
        meter = Meter(scene.server.pid)
        with scene.stage.profiled(scene.server, f"reach-tags-{devices}-{run}"), meter.running():
            calls, seconds = keep_in_flight(
                scene.pool, make(), check_accepted, at_once, scene.stage.plan.seconds
            )
        values.append(calls * devices / seconds)
        loads.append(meter.load)
        cpu += meter.server_cpu / (calls * devices) / scene.stage.plan.runs
        scene.stage.say(f"{what}: {values[-1]:,.0f}/s")
    note = f"{cpu * 1e6:.0f} us of CPU each"
    return Row(what, "/s", values, at_least=5_000, loads=loads, note=note)
