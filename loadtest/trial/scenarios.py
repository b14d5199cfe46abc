"""The scenarios: what each does, in the conductor's words, and which of them another broker can play."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from loadtest.trial.conductor import Conductor, Rate

BROADCAST_SHARE: Final = 0.002  # of the pushes of a mixed day
TAG_SHARE: Final = 0.02
NIGHT: Final = 0.1  # the quietest moment of a mixed day, against the mean
MINUTE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Scenario:
    what: str
    rate_of: str  # what --rate is a rate of; nothing: there is none
    rate: float  # the default
    play: Callable[[Conductor], None]
    why_not_foreign: str = ""  # why another broker cannot play it


def even(rate: float) -> Rate:
    return lambda _: rate


def diurnal(mean: float, day: float) -> Rate:
    """Night at the beginning and the end of a day that is `day` seconds long; the mean over it is `mean`."""
    return lambda seconds: mean * (1 - (1 - NIGHT) * math.cos(2 * math.pi * seconds / day))


def idle(conductor: Conductor) -> None:
    plan = conductor.plan
    conductor.connect(plan.connect_rate)
    conductor.hold(plan.seconds)


def connect_storm(conductor: Conductor) -> None:
    conductor.connect(conductor.plan.rate, "storm")
    conductor.hold(conductor.plan.seconds)


def broadcast(conductor: Conductor) -> None:
    plan = conductor.plan
    conductor.connect(plan.connect_rate)
    conductor.push(plan.seconds, [conductor.to_all(even(plan.rate))])
    conductor.settle()


def targeted(conductor: Conductor) -> None:
    plan = conductor.plan
    conductor.connect(plan.connect_rate)
    conductor.push(plan.seconds, [conductor.to_devices(even(plan.rate))])
    conductor.settle()


def tags(conductor: Conductor) -> None:
    plan = conductor.plan
    conductor.connect(plan.connect_rate)
    conductor.push(plan.seconds, [conductor.to_groups(even(plan.rate))])
    conductor.settle()


def mixed_day(conductor: Conductor) -> None:
    plan, swarms = conductor.plan, conductor.swarms
    conductor.connect(plan.connect_rate)
    breaks = plan.churn * plan.devices / MINUTE / swarms.processes
    swarms.ask("send_receipts", plan.receipts)
    swarms.ask("take_breaks", breaks, plan.away)
    shares = (BROADCAST_SHARE, TAG_SHARE, 1 - BROADCAST_SHARE - TAG_SHARE)
    kinds = (conductor.to_all, conductor.to_groups, conductor.to_devices)
    day = [kind(diurnal(plan.rate * share, plan.seconds)) for kind, share in zip(kinds, shares, strict=True)]
    conductor.push(plan.seconds, day, "day")
    swarms.ask("take_breaks", 0.0, 0.0)
    conductor.wait_for_devices(2 * plan.away + plan.patience)
    conductor.settle()


def offline_backlog(conductor: Conductor) -> None:
    plan = conductor.plan
    pushes = plan.waiting * plan.devices
    conductor.push(pushes / plan.rate, [conductor.to_devices_in_turn(even(plan.rate))], "pile up")
    conductor.wait_for_answers()
    conductor.connect(plan.connect_rate)
    conductor.settle()


def soak(conductor: Conductor) -> None:
    targeted(conductor)


NEEDS_APP: Final = "another broker has no tags"
SCENARIOS: Final[Mapping[str, Scenario]] = {
    "idle": Scenario("Devices connect, and only their keep-alives come for --duration.", "", 0.0, idle),
    "connect-storm": Scenario(
        "All devices connect, whatever the server does, and stay for --duration.",
        "connects",
        1000.0,
        connect_storm,
    ),
    "broadcast": Scenario("Pushes to all devices.", "pushes to all", 1.0, broadcast),
    "targeted": Scenario("Pushes to one device each.", "pushes", 100.0, targeted),
    "tags": Scenario(
        "Pushes to the tenth of the devices that has a tag.", "pushes to a tag", 2.0, tags, NEEDS_APP
    ),
    "mixed-day": Scenario(
        "A day in --duration: night, noon and night again; pushes of all kinds, devices that go and come back, "
        "receipts.",
        "pushes, on average",
        50.0,
        mixed_day,
        NEEDS_APP + " and no receipts",
    ),
    "offline-backlog": Scenario(
        "Pushes wait for each device (--waiting of them), then all devices connect.",
        "pushes, while nobody is there",
        500.0,
        offline_backlog,
        "its devices have clean sessions here, for which nothing waits",
    ),
    "soak": Scenario("As targeted, for long: what counts is how memory grows.", "pushes", 10.0, soak),
}
