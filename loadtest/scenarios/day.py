"""All that happens on a day, at once: devices come and go, are pushed to singly and by tag, answer with receipts,
ping, and are tagged; how late does the event loop get?

Most devices stay; some come and go. What is sent goes to those that stay, so that none of it may be missing.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import orjson

from gateway.mqtt import Publish, encode
from loadtest.ledger import alert
from loadtest.publishing import check_accepted, quantile
from loadtest.report import Row
from loadtest.scenarios.steady import KEEP_ALIVE, PINGREQ, collector_row
from loadtest.scenarios.targeted import MS
from loadtest.stage import Cast, Meter, Stage, cast

VISITORS: Final = 0.1  # of the devices: these come and go
COMING: Final = 100.0  # a second, and as many go
PUSHES: Final = 500.0  # a second, to one device each
RECEIPTS: Final = 300.0  # a second
TAGGINGS: Final = 20.0  # a second, of one device each
BROADCASTS: Final = 0.5  # a second, to all that stay
TAG: Final = "stays"
IN_ONE_CALL: Final = 1000  # devices that are tagged
LATEST: Final = 0.999


def day(stage: Stage) -> list[Row]:
    plan = stage.plan
    population = stage.population(plan.devices)
    with (
        stage.server(population) as server,
        cast(server, population, plan.devices, keep_alive=KEEP_ALIVE) as cast_,
    ):
        morning = Day(cast_, plan.devices)
        morning.begin()
        before = server.histogram("event_loop_lag_seconds")
        meter = Meter(server.pid)
        with stage.profiled(server, "day"), meter.running():
            morning.run(plan.day)
        lags = server.histogram("event_loop_lag_seconds").since(before)
        latencies, errors = cast_.ledger.latencies, cast_.ledger.errors()
        name = f"day: {plan.devices:,} devices, {plan.day:g} s"
        return [
            Row(
                f"{name}: event-loop lag p99.9, at most",
                "ms",
                [lags.quantile(LATEST) * MS],
                at_most=20.0,
                loads=[meter.load],
                note=f"{lags.total():,} samples; worst {lags.quantile(1.0) * MS:g}",
            ),
            Row(f"{name}: a targeted push, p50", "ms", [quantile(latencies, 0.5) * MS]),
            Row(f"{name}: a targeted push, p99", "ms", [quantile(latencies, 0.99) * MS], note=errors),
            Row(f"{name}: deliveries", "", [float(cast_.ledger.arrived)], note=errors or "none lost"),
            collector_row("day", cast_),
        ]


class Every:
    """Something `rate` times a second, whatever else takes long."""

    def __init__(self, rate: float, act: Callable[[], None]) -> None:
        self._interval = 1 / rate
        self._act = act
        self._due = time.perf_counter()

    def catch_up(self) -> float:
        """Seconds until the next."""
        while (left := self._due - time.perf_counter()) <= 0:
            self._act()
            self._due += self._interval
        return left


class Day:
    def __init__(self, cast_: Cast, devices: int) -> None:
        self._cast = cast_
        self._random = random.Random(1)
        self._names = cast_.population.names
        visitors = int(devices * VISITORS)
        self._stay = range(visitors, devices)
        self._here = deque(range(visitors // 2))
        self._away = deque(range(visitors // 2, visitors))
        self._gone = 0  # visitors, so far
        self._shown: list[str] = []  # msg_ids of broadcasts

    def begin(self) -> None:
        fleet, pool = self._cast.fleet, self._cast.pool
        fleet.connect([*self._here, *self._stay])
        names = [self._names[device] for device in self._stay]
        for first in range(0, len(names), IN_ONE_CALL):
            added = {"registration_ids": {"add": names[first : first + IN_ONE_CALL]}}
            pool.call("POST", f"/v3/tags/{TAG}", added)
        self.broadcast()
        self._cast.reactor.run_until(lambda: bool(self._shown), "the first broadcast")

    def run(self, seconds: float) -> None:
        publisher = self._cast.open_loop(self._stay, PUSHES)
        events = [
            Every(COMING, self.come_and_go),
            Every(RECEIPTS, self.show),
            Every(TAGGINGS, self.tag),
            Every(BROADCASTS, self.broadcast),
            Every(len(self._stay) / KEEP_ALIVE, self.ping),
        ]
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._cast.reactor.turn(min(publisher.send_due(), *(event.catch_up() for event in events)))
        self._cast.reactor.run_until(lambda: not self._cast.ledger.missing, "all pushes arrived")

    def come_and_go(self) -> None:
        fleet = self._cast.fleet
        going, coming = self._here.popleft(), self._away.popleft()
        fleet.disconnect([going])
        self._gone += 1
        fleet.begin([coming], wave=self._gone // 1000 % 256)
        self._here.append(coming)
        self._away.append(going)

    def show(self) -> None:
        """A receipt."""
        content = orjson.dumps({"msg_id": self._random.choice(self._shown), "event": "shown"})
        receipt = Publish("receipt", content, qos=1, packet_id=1)
        self._cast.fleet.send(self._random.choice(self._stay), encode(receipt, 4))

    def tag(self) -> None:
        name = self._names[self._random.choice(self._stay)]
        body = {"tags": {"add": [f"day{self._random.randrange(50)}"]}}
        self._post(f"/v3/devices/{name}", body, check_accepted)

    def broadcast(self) -> None:
        cast_ = self._cast
        text = alert(cast_.ledger.add_broadcast(len(self._stay)), cast_.msg_id_digits)
        body = {"platform": "all", "audience": {"tag": [TAG]}, "notification": {"alert": text}}
        self._post("/v3/push", body, self._pushed)

    def _pushed(self, status: int, body: bytes) -> None:
        check_accepted(status, body)
        self._shown.append(orjson.loads(body)["msg_id"])

    def _post(self, path: str, body: object, done: Callable[[int, bytes], None]) -> None:
        pool = self._cast.pool
        pool.send(pool.build("POST", path, orjson.dumps(body)), done)

    def ping(self) -> None:
        self._cast.fleet.send(self._random.choice(self._stay), PINGREQ)
