"""One ordinary topic with thousands of subscribers, beside a broadcast to the same devices.

An open app; the devices have clean sessions and one QoS 1 subscription, and one MQTT connection publishes at QoS 1
or 0. A run is as of `broadcast`: the next one or four are published when the last device has got the last of those
before. The topic's name and the payload are as long as a push's, so the bytes on the wire are as many, and each turn
measures all kinds in a row, so that the ratio of two is of the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from loadtest.ledger import Ledger
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.rounds import Rounds
from loadtest.scenarios.broadcast import Volley
from loadtest.stage import Cast, Meter, Stage, cast
from loadtest.topic_publisher import TopicPublisher, payload, publisher_connect, subscribe_packet

TOPIC: Final = "news"  # as long as "push"


class TopicVolley(Rounds):
    """Ordinary messages instead of broadcasts, to any MQTT server."""

    def __init__(
        self,
        reactor: Reactor,
        ledger: Ledger,
        publisher: TopicPublisher,
        devices: int,
        at_once: int,
        qos: int,
    ) -> None:
        super().__init__(reactor, ledger, devices, at_once)
        self._publisher = publisher
        self._qos = qos

    def finish(self) -> None:
        self._reactor.run_until(lambda: not self._ledger.missing, "all messages arrived")
        self._publisher.wait_for_answers()

    def _post(self, serial: int) -> None:
        self._publisher.publish(TOPIC, payload(serial), self._qos)


@dataclass(slots=True)
class _Kind:
    """One way to reach everybody, and what it measured."""

    name: str
    volley: Rounds
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def measure(self, stage: Stage, cast_: Cast) -> None:
        meter = Meter(cast_.server.pid)
        profile = self.name.replace(", ", "-").replace(" ", "-")
        with stage.profiled(cast_.server, f"topics-{profile}-{len(self.rates)}"), meter.running():
            seconds = self.volley.run(stage.plan.broadcasts)
        deliveries = self.volley.posted * stage.plan.subscribers
        self.rates.append(deliveries / seconds)
        self.costs.append(meter.server_cpu / deliveries * 1e6)
        self.loads.append(meter.load)
        stage.say(f"topics: {self.name}: {self.rates[-1]:,.0f} deliveries/s")

    def rows(self, devices: int, note: str) -> list[Row]:
        name = f"topics: {devices:,} devices, {self.name}"
        return [
            Row(name, "/s", self.rates, loads=self.loads, note=note),
            Row(f"{name}: server CPU for each delivery", "µs", self.costs),
        ]


def topics(stage: Stage) -> list[Row]:
    devices = stage.plan.subscribers
    population = stage.population(devices, is_open=True)
    with (
        stage.server(population) as server,
        cast(server, population, devices, clean_start=True) as cast_,
    ):
        cast_.fleet.connect(range(devices))
        cast_.fleet.subscribe(dict.fromkeys(range(devices), subscribe_packet([TOPIC])))
        publisher = TopicPublisher(cast_.reactor, server.address("mqtt"), publisher_connect(population))
        kinds = _kinds(cast_, publisher, devices)
        for kind in kinds:
            kind.volley.run(2)  # warm
        for _ in range(stage.plan.runs):
            for kind in kinds:
                kind.measure(stage, cast_)
        publisher.close()
    note = cast_.ledger.errors() or "none lost"
    rows = [row for kind in kinds for row in kind.rows(devices, note)]
    return [*rows, _ratio(kinds[0], kinds[1]), _ratio(kinds[2], kinds[3])]


def _kinds(cast_: Cast, publisher: TopicPublisher, devices: int) -> list[_Kind]:
    def topic(at_once: int, qos: int) -> _Kind:
        volley = TopicVolley(cast_.reactor, cast_.ledger, publisher, devices, at_once, qos)
        return _Kind(f"topic at QoS {qos}, {at_once} at once", volley)

    def push(at_once: int) -> _Kind:
        return _Kind(f"push broadcast, {at_once} at once", Volley(cast_, devices, at_once))

    return [push(1), topic(1, 1), push(4), topic(4, 1), topic(1, 0), topic(4, 0)]


def _ratio(push: _Kind, topic: _Kind) -> Row:
    ratios = [mine / other for mine, other in zip(topic.rates, push.rates, strict=True)]
    return Row(f"topics: {topic.name} / {push.name}", "", ratios, at_least=0.95)
