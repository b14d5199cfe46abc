"""Connect, do something, leave, a million times: does the memory of the server return to where it was?

Clients of all kinds (see loadtest/visitors.py) with few names: sessions that are clean, kept, expired and taken over,
subscriptions of all kinds, messages of all QoS, retained ones set and removed, wills, connections that just end.
The first WARM of the cycles fills what the server fills only once. Then, and at the end, nobody is there, all
sessions have expired and all retained messages are removed: the growth is the difference between these two. One pass
per command, whatever `--runs` says, and no longer than `plan.churn_limit`.
"""

from __future__ import annotations

import time
from typing import Final

from loadtest.population import Population
from loadtest.reactor import Reactor
from loadtest.report import Load, Row
from loadtest.server import Server
from loadtest.stage import Meter, Stage
from loadtest.topic_publisher import TopicPublisher, publisher_connect
from loadtest.visitors import RETAINED, Programme, Visitors

AT_ONCE: Final = 32
WARM: Final = 0.05
TENTHS: Final = 10
SESSION_EXPIRY: Final = 3  # seconds, the most that a session or a will is kept
REST: Final = SESSION_EXPIRY + 2.0  # until the server has noticed
MANY: Final = 100_000  # cycles from which on the growth says something
MB: Final = 1 << 20
SETTINGS: Final = {
    "HOLDFAST_MQTT_SESSION_EXPIRY_MAX": str(SESSION_EXPIRY),
    "HOLDFAST_SERVER_LOG_LEVEL": "warning",  # two lines for each cycle are not what is measured
}


def churn(stage: Stage) -> list[Row]:
    plan = stage.plan
    population = stage.population(1, is_open=True)
    started = time.perf_counter()
    deadline = started + plan.churn_limit
    with stage.server(population, SETTINGS) as server:
        reactor = Reactor()
        programme = Programme(population, SESSION_EXPIRY)
        visitors = Visitors(reactor, server.address("mqtt"), iter(programme))
        visitors.run(int(plan.cycles * WARM), AT_ONCE, started + plan.churn_limit * WARM)
        warmed = visitors.finished
        before = _rest(reactor, server, population)
        stage.say(f"churn: RSS {before / MB:.1f} MB at rest after {warmed:,} cycles")
        meter = Meter(server.pid)
        with meter.running():
            between = _run(stage, server, visitors, deadline)
        after = _rest(reactor, server, population)
        stage.say(f"churn: RSS {after / MB:.1f} MB at rest after {visitors.finished:,} cycles")
        visitors.close()
        reactor.close()
    cycles = visitors.finished - warmed
    return _rows(stage, visitors, between, (after - before, cycles), cycles / meter.seconds, meter.load)


def _run(stage: Stage, server: Server, visitors: Visitors, deadline: float) -> list[float]:
    """RSS in MB at each tenth."""
    plan, warmed, between = stage.plan, visitors.finished, []
    for tenth in range(1, TENTHS + 1):
        until = warmed + (plan.cycles - warmed) * tenth // TENTHS
        visitors.run(until, AT_ONCE, deadline)
        between.append(server.rss() / MB)
        stage.say(f"churn: RSS {between[-1]:.1f} MB after {visitors.finished:,} cycles")
        if visitors.finished < until:
            break
    return between


def _rest(reactor: Reactor, server: Server, population: Population) -> int:
    """RSS when nothing is kept for anybody."""
    reactor.run_for(REST)
    publisher = TopicPublisher(reactor, server.address("mqtt"), publisher_connect(population))
    for number in range(RETAINED):
        publisher.publish(f"r/{number}", b"", 1, retain=True)
        publisher.wait_for_answers()
    publisher.close()
    return server.steady_rss()


def _rows(
    stage: Stage, visitors: Visitors, between: list[float], growth: tuple[int, int], rate: float, load: Load
) -> list[Row]:
    grown, cycles = growth
    name = f"churn: {visitors.finished:,} cycles"
    notes = [f"{visitors.cut:,} ended by the server, {visitors.refused:,} refused"]
    if visitors.finished < stage.plan.cycles:
        notes.append(f"stopped after {stage.plan.churn_limit:,.0f} s, before {stage.plan.cycles:,}")
    enough = cycles >= MANY
    shown = ", ".join(f"{value:.1f}" for value in between)
    return [
        Row(f"{name}: RSS at each tenth", "MB", between, note=shown),
        Row(f"{name}: RSS, grown since {WARM:.0%} of them", "MB", [grown / MB], note="; ".join(notes)),
        Row(f"{name}: for each", "bytes", [grown / max(cycles, 1)], at_most=8.0 if enough else None),
        Row(f"{name}: {AT_ONCE} at once", "/s", [rate], loads=[load]),
    ]
