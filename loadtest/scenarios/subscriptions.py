"""What the subscriptions that do not match cost those that do.

Two servers, alike but for the number of subscriptions in the app: FEW, and `plan.subscriptions`. A third each are
exact, with `+` and with `#`, all different and all beside each other in the tree of topics. The messages go to topics
that three subscriptions match, the same three on both, each in a session of its own. Each turn measures first one
server, then the other: publishes a second with AT_ONCE outstanding, each done when its third subscriber has it; then
the time that takes, at RATE publishes a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

from loadtest.fleet import Fleet
from loadtest.population import Population
from loadtest.publishing import quantile
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.server import Server
from loadtest.stage import Meter, Stage
from loadtest.topic_publisher import TopicPublisher, payload, publisher_connect, subscribe_packet

FEW: Final = 99
MATCHES: Final = 3
AT_ONCE: Final = 32
RATE: Final = 500.0
IN_ONE_PACKET: Final = 50
MS: Final = 1000.0


def topic(place: int) -> str:
    """All are of the same length."""
    return f"site/{place:06d}/room/{place:06d}/state"


def topic_filter(number: int) -> str:
    """Filters 3n, 3n+1 and 3n+2 match topic n, and no other."""
    place, kind = divmod(number, MATCHES)
    exact = topic(place)
    return (exact, exact.replace(f"site/{place:06d}", "site/+"), f"site/{place:06d}/#")[kind]


@dataclass(slots=True)
class _Measured:
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)


class Market:
    """A server with subscriptions, and a publisher that follows each message to its last subscriber."""

    def __init__(self, server: Server, population: Population, sessions: int) -> None:
        self.server = server
        self.measured = _Measured()
        self.strays = 0
        self.subscribed = 0
        self._sessions = sessions
        self.reactor = Reactor()
        packets = population.connect_packets(sessions, clean_start=True)
        self.fleet = Fleet(self.reactor, server.address("mqtt"), packets, self._take, topic=topic(0))
        self.fleet.connect(range(sessions))
        self.publisher = TopicPublisher(self.reactor, server.address("mqtt"), publisher_connect(population))
        self._serial = 0
        self._open: dict[int, tuple[float, set[int]]] = {}  # when it was due, who has yet to get it
        self._latencies: list[float] = []
        self._until = 0.0  # the closed loop publishes the next for each that is done, until then

    def close(self) -> None:
        self.publisher.close()
        self.fleet.close()
        self.reactor.close()

    def subscribe(self, count: int) -> None:
        """Up to `count` subscriptions in all, spread over the sessions."""
        filters: dict[int, list[str]] = {}
        for number in range(self.subscribed, count):
            filters.setdefault(number % self._sessions, []).append(topic_filter(number))
        for first in range(0, max(map(len, filters.values())), IN_ONE_PACKET):
            parts = {session: names[first : first + IN_ONE_PACKET] for session, names in filters.items()}
            self.fleet.subscribe({s: subscribe_packet(names) for s, names in parts.items() if names})
        self.subscribed = count

    def measure(self, seconds: float) -> None:
        meter = Meter(self.server.pid)
        with meter.running():
            count = self._publish_at_once(seconds)
        self.measured.rates.append(count / meter.seconds)
        self.measured.costs.append(meter.server_cpu / count * 1e6)
        self.measured.loads.append(meter.load)
        latencies = self._publish_at_rate(seconds)
        self.measured.medians.append(quantile(latencies, 0.5) * MS)
        self.measured.worst.append(quantile(latencies, 0.99) * MS)

    def _publish_at_once(self, seconds: float) -> int:
        """How many, each with all it led to."""
        before = self._serial
        self._until = time.perf_counter() + seconds
        for _ in range(AT_ONCE):
            self._publish(time.perf_counter())
        self._finish()
        return self._serial - before

    def _publish_at_rate(self, seconds: float) -> list[float]:
        self._until = 0.0
        self._latencies.clear()
        due = time.perf_counter()
        end = due + seconds
        while due < end:
            while due <= time.perf_counter():
                self._publish(due)
                due += 1 / RATE
            self.reactor.turn(due - time.perf_counter())
        self._finish()
        return self._latencies

    def _finish(self) -> None:
        self.reactor.run_until(lambda: not self._open, "all messages arrived")
        self.publisher.wait_for_answers()

    def _publish(self, due: float) -> None:
        self._serial += 1
        place = self._serial % (FEW // MATCHES)
        first = MATCHES * place
        self._open[self._serial] = (
            due,
            {number % self._sessions for number in range(first, first + MATCHES)},
        )
        self.publisher.publish(topic(place), payload(self._serial), 1)

    def _take(self, session: int, serial: int) -> None:
        due, missing = self._open.get(serial, (0.0, frozenset[int]()))
        if session not in missing:
            self.strays += 1
            return
        missing -= {session}
        if missing:
            return
        now = time.perf_counter()
        del self._open[serial]
        self._latencies.append(now - due)
        if now < self._until:
            self._publish(now)


def subscriptions(stage: Stage) -> list[Row]:
    plan = stage.plan
    with ExitStack() as stack:
        few = stack.enter_context(_market(stage))
        many = stack.enter_context(_market(stage))
        few.subscribe(FEW)
        many.subscribe(plan.subscriptions // 10)  # warm: what is made only once does not count
        before = many.server.steady_rss()
        many.subscribe(plan.subscriptions)
        each = (many.server.steady_rss() - before) / (plan.subscriptions - plan.subscriptions // 10)
        for market in (few, many):
            market.measure(0.5)
            market.measured = _Measured()
        for _ in range(plan.runs):
            for market in (few, many):
                market.measure(plan.seconds / 2)
                what = f"{market.measured.rates[-1]:,.0f} publishes/s, p99 {market.measured.worst[-1]:.2f} ms"
                stage.say(f"subscriptions: {market.subscribed:,}: {what}")
    rows = [row for market in (few, many) for row in _rows(market)]
    ratios = [mine / other for mine, other in zip(many.measured.rates, few.measured.rates, strict=True)]
    return [
        *rows,
        Row(f"subscriptions: publishes with {plan.subscriptions:,} / with {FEW}", "", ratios, at_least=0.9),
        Row(f"subscriptions: RSS for each, {plan.sessions:,} clean sessions", "bytes", [each]),
    ]


@contextmanager
def _market(stage: Stage) -> Iterator[Market]:
    sessions = stage.plan.sessions
    most = stage.plan.subscriptions // sessions + 1
    population = stage.population(sessions, is_open=True)
    with stage.server(population, {"HOLDFAST_MQTT_MAX_SUBSCRIPTIONS": str(most)}) as server:
        market = Market(server, population, sessions)
        try:
            yield market
        finally:
            market.close()


def _rows(market: Market) -> list[Row]:
    measured = market.measured
    name = f"subscriptions: {market.subscribed:,}, {MATCHES} match"
    note = f"{market.strays:,} stray" if market.strays else "none lost"
    pace = f"at {RATE:,.0f} a second"
    return [
        Row(f"{name}: publishes, {AT_ONCE} at once", "/s", measured.rates, loads=measured.loads, note=note),
        Row(f"{name}: server CPU for each publish", "µs", measured.costs),
        Row(f"{name}: p50 until the last has it, {pace}", "ms", measured.medians),
        Row(f"{name}: p99 until the last has it, {pace}", "ms", measured.worst),
    ]
