"""The device's session and its heartbeat: what it asks, what it learns, when it takes a connection for dead; and
whole days of it behind a NAT that forgets, in simulated time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from collections.abc import Callable
from itertools import pairwise

import orjson
import pytest

from clients.device import Device
from clients.heartbeat import EARLY_LEAST, MARGIN, STEP, Bounds
from clients.local_server import AppKeys, LocalServer
from clients.publisher import Publisher
from clients.session import (
    EAGER,
    EAGER_TIMEOUT,
    HEARTBEAT_OVERDUE,
    SOON,
    Action,
    DeviceSession,
    Drop,
    LinkSettings,
    Offer,
    Offline,
    Open,
    Phase,
    Send,
)
from gateway.mqtt import (
    Connack,
    Connect,
    Packet,
    Pingreq,
    Pingresp,
    Properties,
    Puback,
    Publish,
    Reason,
    encode,
)
from tests.clients import session_story
from tests.clients.session_story import packets_of
from tests.patience import PATIENCE

LEARNS = LinkSettings()


class Story(session_story.Story):
    def __init__(self, settings: LinkSettings = LEARNS) -> None:
        super().__init__(settings)

    def greet(self) -> Connect:
        while self.wait() != [Open(None)]:
            pass
        (connect,) = packets_of(self.session.opened(self.now))
        assert isinstance(connect, Connect)
        return connect

    def connect(self, heartbeat: str | None = None, server_keep_alive: int | None = None) -> Connect:
        connect = self.greet()
        properties: Properties = {}
        if server_keep_alive is not None:
            properties["server_keep_alive"] = server_keep_alive
        if heartbeat is not None:
            properties["user_properties"] = (("heartbeat", heartbeat),)
        self.hear(Connack(True, Reason.SUCCESS, properties))
        return connect

    def beat(self, answer_after: float | None = 0.1) -> float:
        """The silence until the next heartbeat. None: it is not answered, and the session finds out."""
        before = self.now
        assert packets_of(self.wait()) == [Pingreq()]
        silence = self.now - before
        if answer_after is None:
            assert self.wait()[0] == Drop()
        else:
            self.now += answer_after
            self.hear(Pingresp())
        return silence


@pytest.fixture
def story() -> Story:
    return Story()


def push(msg_id: int, packet_id: int = 1) -> Publish:
    return Publish("push", orjson.dumps({"msg_id": str(msg_id)}), qos=1, packet_id=packet_id)


# What the server is told, and tells


def test_the_longest_heartbeat_is_asked_for_as_keep_alive(story: Story) -> None:
    assert story.connect().keep_alive == 1200
    assert story.beat() == 240


def test_the_next_connect_asks_for_the_most_that_the_server_said(story: Story) -> None:
    story.connect("100 50 300")
    story.session.lost("cable cut", story.now)
    assert story.connect().keep_alive == 300


def test_the_servers_heartbeat_is_begun_with(story: Story) -> None:
    story.connect("100 50 300")
    assert [story.beat() for _ in range(4)] == pytest.approx([100, 120, 144, 172.8], abs=1)
    for _ in range(6):
        story.beat()
    assert story.beat() == 300


@pytest.mark.parametrize("told", ["", "soon", "100", "100 50", "10 50 300", "nan 1 2", "100 50 300 9"])
def test_a_heartbeat_that_is_not_understood_was_not_said(story: Story, told: str) -> None:
    story.connect(told)
    assert story.beat() == 240


def test_what_was_learned_goes_before_the_servers_start(story: Story) -> None:
    story.connect("100 50 300")
    story.beat()
    story.session.lost("cable cut", story.now)
    story.connect("60 50 300")
    assert story.beat() == pytest.approx(120, abs=1)


def test_the_servers_keep_alive_is_never_passed(story: Story) -> None:
    story.connect(server_keep_alive=70)
    for _ in range(5):
        assert story.beat() <= 70


def test_a_device_that_only_listens_stays_within_the_keep_alive_as_well(story: Story) -> None:
    """What the server counts is what we send."""
    story.connect(server_keep_alive=100)
    sent_at = story.now
    story.now += 90
    story.hear(Publish("push", push(1).payload))  # QoS 0: nothing is answered
    assert packets_of(story.wait()) == [Pingreq()]
    assert story.now == sent_at + 100


def test_carrier_and_link_are_told_where_they_are_known(story: Story) -> None:
    assert story.connect().properties["user_properties"] == (("compression", "deflate"),)
    story.session.enter_network(None, story.now, link="cellular", carrier="46000")
    told = story.connect().properties["user_properties"]
    assert told == (("compression", "deflate"), ("carrier", "46000"), ("link", "cellular"))


def test_a_fixed_keep_alive_is_not_learned() -> None:
    story = Story(LinkSettings(keep_alive=50))
    assert story.connect("100 50 300").keep_alive == 50
    assert [story.beat() for _ in range(3)] == pytest.approx([50, 50, 50], abs=0.2)


def test_a_fixed_keep_alive_of_zero_means_no_heartbeat() -> None:
    story = Story(LinkSettings(keep_alive=0))
    assert story.connect("100 50 300").keep_alive == 0
    assert story.session.deadline is None


# What it learns


def test_an_answered_silence_makes_the_next_one_longer(story: Story) -> None:
    story.connect()
    assert [round(story.beat()) for _ in range(3)] == [240, 288, 346]


def test_a_push_is_proof_of_the_silence_before_it(story: Story) -> None:
    story.connect("60 30 300")
    story.now += 59
    story.hear(push(1))
    story.session.handled(story.now)
    assert story.beat() == pytest.approx(59 * STEP)


def test_traffic_of_either_side_puts_the_heartbeat_off(story: Story) -> None:
    story.connect("60 30 300")
    story.now += 50
    story.hear(Publish("push", push(1).payload))
    story.now += 30
    story.session.handled(story.now)
    assert story.session.deadline == 1050 + 60  # QoS 0: what is handled sends nothing


def test_a_silent_death_makes_the_next_silence_shorter(story: Story) -> None:
    story.connect()
    assert story.beat() == 240
    assert story.beat(None) == 288
    story.connect()
    assert story.beat() == pytest.approx(240 * MARGIN)


def test_a_reset_in_answer_to_a_heartbeat_is_a_death_too(story: Story) -> None:
    story.connect()
    story.beat()
    assert packets_of(story.wait()) == [Pingreq()]
    story.session.lost("connection reset by peer", story.now)
    story.connect()
    assert story.beat() == pytest.approx(240 * MARGIN)


def test_a_connection_that_was_closed_died_of_no_silence(story: Story) -> None:
    story.connect()
    story.beat()
    story.now += 280
    story.session.lost("the connection was closed", story.now)
    story.connect()
    assert story.beat() == 288


def test_a_death_with_the_whole_network_is_no_evidence(story: Story) -> None:
    story.connect()
    story.beat()
    story.beat(None)
    story.greet()
    story.session.lost("no route", story.now)
    story.now += SOON + 1
    story.connect()
    assert story.beat() == 288


def test_an_unanswered_report_after_a_silence_is_evidence_too(story: Story) -> None:
    story.connect()
    story.beat()
    story.now += 280
    story.session.publish("event/x", b"", story.now)
    assert story.wait()[0] == Drop()
    assert story.greet()
    story.hear(Connack(True))
    story.now += 0.1
    story.hear(Puback(1))
    assert story.beat() == pytest.approx(240 * MARGIN)


def test_no_probe_while_somebody_looks_and_a_check_at_once(story: Story) -> None:
    story.connect()
    for _ in range(2):
        story.beat()
    story.session.foreground = True
    story.now += 100
    assert packets_of(story.session.check(story.now)) == [Pingreq()]
    assert story.session.check(story.now) == []
    story.now += 0.1
    story.hear(Pingresp())
    assert story.beat() == pytest.approx(288 * MARGIN, abs=0.2)


def test_a_check_is_for_a_connection_that_is_there(story: Story) -> None:
    assert story.session.check(story.now) == []


# Where pushes are missing


def chat(story: Story, gap: float = 20.0, times: int = 60) -> None:
    """Pushes at regular times, each acknowledged."""
    for number in range(times):
        story.now += gap
        story.hear(push(int(story.now * 1000), number + 1))
        story.session.handled(story.now)


def beats(story: Story, seconds: float) -> list[float]:
    """The silences that a heartbeat ended; each was answered."""
    found = []
    end = story.now + seconds
    while (deadline := story.session.deadline) is not None and deadline < end:
        found.append(story.beat())
    return found


def test_where_pushes_are_missing_it_asks_early_and_once(story: Story) -> None:
    story.connect()
    chat(story)
    assert [round(silence) for silence in beats(story, 3600)[:3]] == pytest.approx([60, 240, 288], rel=0.05)


def test_a_burst_and_hours_of_silence_cost_one_question(story: Story) -> None:
    quiet = Story()
    quiet.connect()
    story.connect()
    chat(story, 2.0, 50)
    assert story.session.deadline == pytest.approx(story.now + EARLY_LEAST)
    usual = beats(quiet, 6 * 3600)
    assert len(beats(story, 6 * 3600)) <= len(usual) + 1


def test_where_it_is_wary_a_burst_and_hours_of_silence_cost_two(story: Story) -> None:
    story.session.alternatives = True
    story.connect()
    chat(story)
    assert [round(silence) for silence in beats(story, 3600)[:4]] == pytest.approx(
        [40, 40, 240, 288], rel=0.05
    )


def test_the_next_push_makes_it_ask_again(story: Story) -> None:
    story.connect()
    chat(story)
    assert [round(story.beat()) for _ in range(2)] == pytest.approx([60, 240], rel=0.05)
    chat(story, times=1)
    assert round(story.beat()) < 240


def test_a_path_that_died_is_noticed_and_the_heartbeat_stays_as_long(story: Story) -> None:
    story.connect()
    chat(story)
    assert story.beat(None) == pytest.approx(60, rel=0.05)
    story.connect()
    assert story.beat() == 240


def test_after_a_death_it_asks_sooner(story: Story) -> None:
    story.connect()
    chat(story)
    story.beat(None)
    story.connect()
    chat(story, times=2)
    assert story.beat() == pytest.approx(40, rel=0.05)


def test_where_there_is_another_address_it_asks_sooner(story: Story) -> None:
    story.session.alternatives = True
    story.connect()
    chat(story)
    assert story.beat() == pytest.approx(40, rel=0.05)


def test_an_answer_to_an_early_question_proves_that_silence_and_no_more(story: Story) -> None:
    story.connect("60 30 300")
    chat(story, 10)
    silence = story.beat()
    assert silence == pytest.approx(30, rel=0.05)
    assert story.session._heartbeat.good == pytest.approx(silence)


def test_where_the_heartbeat_is_due_sooner_nothing_is_asked_early(story: Story) -> None:
    story.connect("60 30 300")
    chat(story, 30)
    assert story.beat() == pytest.approx(60)
    assert story.beat() == pytest.approx(60 * STEP, rel=0.01)


def test_a_phone_that_sleeps_is_not_woken_early(story: Story) -> None:
    story.connect()
    chat(story)
    story.session.dozing = True
    assert story.beat() == 240


def test_a_fixed_keep_alive_stays_fixed_where_pushes_are_missing() -> None:
    story = Story(LinkSettings(keep_alive=200))
    story.connect()
    chat(story)
    assert story.beat() == pytest.approx(200)


# Networks


def test_each_network_has_its_own(story: Story) -> None:
    session = story.session
    story.connect()
    for _ in range(2):
        story.beat()
    at_home = session.heartbeat_state(story.now)
    drop, offline = session.enter_network(None, story.now, link="cellular")
    assert (drop, offline) == (Drop(), Offline("the network changed", 0.0))
    story.connect()
    assert story.beat() == 240
    session.enter_network(at_home, story.now, link="wifi")
    story.connect()
    assert story.beat() == pytest.approx(240 * STEP**2)


def test_leaving_a_network_amid_a_heartbeat_says_nothing_about_the_next(story: Story) -> None:
    story.connect()
    assert packets_of(story.wait()) == [Pingreq()]
    story.session.enter_network(None, story.now)
    story.connect()
    assert story.beat() == 240


def test_what_was_learned_survives_a_restart() -> None:
    first, second = Story(), Story()
    first.connect()
    for _ in range(2):
        first.beat()
    second.session.enter_network(first.session.heartbeat_state(first.now), second.now)
    second.connect()
    assert second.beat() == pytest.approx(240 * STEP**2)


# When a connection is dead


def test_a_quick_networks_heartbeat_is_overdue_soon(story: Story) -> None:
    story.connect()
    story.beat(0.05)
    assert packets_of(story.wait()) == [Pingreq()]
    asked = story.now
    (drop, offline) = story.wait()
    assert drop == Drop()
    assert story.now - asked == pytest.approx(4)
    assert isinstance(offline, Offline)
    assert offline.why == HEARTBEAT_OVERDUE
    assert offline.retry_in <= 1


def test_a_slow_networks_heartbeat_has_more_time(story: Story) -> None:
    story.connect()
    for _ in range(10):
        story.beat(3.5)
    assert packets_of(story.wait()) == [Pingreq()]
    asked = story.now
    story.wait()
    assert 7 < story.now - asked <= 10


def test_a_report_has_its_time_whatever_a_heartbeat_has(story: Story) -> None:
    """The server writes it down first."""
    story.connect()
    story.beat(0.05)
    asked = story.now
    story.session.publish("event/x", b"", story.now)
    story.wait()
    assert story.now - asked == pytest.approx(10)


def test_a_report_on_a_dead_connection_goes_out_on_the_next(story: Story) -> None:
    story.connect()
    story.session.publish("event/x", b"1", story.now)
    assert story.wait()[0] == Drop()
    story.greet()
    again = packets_of(story.hear(Connack(True)))
    assert again == [Publish("event/x", b"1", qos=1, packet_id=1, dup=True)]


def test_after_a_silent_death_it_tries_again_and_again_for_a_minute(story: Story) -> None:
    story.connect()
    story.beat(None)
    died = story.now
    tries: list[float] = []
    while len(tries) < 12:
        if story.wait() == [Open(None)]:
            tries.append(story.now - died)
            story.wait()
    patience = [after - before for before, after in pairwise(tries)]
    assert len([one for one in tries if one < EAGER]) >= 4
    assert patience[0] <= EAGER_TIMEOUT + 2
    assert patience[-1] >= LEARNS.connect_timeout


# With a server


async def test_a_device_that_says_where_it_is_learns_within_the_bounds_of_its_carrier(
    server: LocalServer, app: AppKeys, publisher: Publisher
) -> None:
    registered = await publisher.register_device("phone", platform="android")
    host, port = server.addresses.mqtt
    own = Bounds(31, 31, 32)
    for link, told in (("", False), ("cellular", True)):
        device = Device(
            app.app_key,
            "phone",
            on_push=lambda _: None,
            token=registered.token,
            host=host,
            port=port,
            link=link,
            settings=LinkSettings(heartbeat=own),
        )
        async with device:
            await asyncio.wait_for(device.connected(), PATIENCE)
            bounds = device._session._heartbeat.bounds
        assert (bounds != own) is told
        assert bounds.least >= 10


@pytest.mark.parametrize("known", [1, 2])
async def test_a_device_knows_whether_there_is_another_way_and_whether_it_sleeps(
    server: LocalServer, app: AppKeys, publisher: Publisher, known: int
) -> None:
    registered = await publisher.register_device("phone", platform="android")
    host, port = server.addresses.mqtt
    servers = [f"{host}:{port}", "127.0.0.9:1"][:known]
    device = Device(
        app.app_key, "phone", on_push=lambda _: None, token=registered.token, servers=servers, ordered=True
    )
    async with device:
        await asyncio.wait_for(device.connected(), PATIENCE)
        assert device._session.alternatives is (known > 1)
        for state in ("doze", "background"):
            device.app_state(state)
            assert device._session.dozing is (state == "doze")


# Days behind a NAT


class Simulation:
    """A session, a NAT that forgets after a silence, and a server that brings what it owes on each connection."""

    ROUND_TRIP = 0.2

    def __init__(self, timeout: float, *, pushes_every: float, loss: float = 0.0, seed: int = 6) -> None:
        self.chance = random.Random(seed)
        settings = LinkSettings(heartbeat=Bounds(240, 30, 1200))
        self.session = DeviceSession("phone", "app", b"", self.chance.random, settings=settings)
        self.timeout, self.loss, self.pushes_every = timeout, loss, pushes_every
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.connection = 0  # number of the live one
        self.forgotten_at = 0.0
        self.owed: dict[int, float] = {}  # msg_id -> when it was accepted
        self.took: list[tuple[float, float]] = []  # when accepted, seconds
        self.heartbeats: list[float] = []
        self.connects: list[float] = []
        self.server_heard_at = 0.0
        self.keep_alive = 0

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), do))

    def run(self, seconds: float) -> None:
        self.at(self.chance.expovariate(1 / self.pushes_every), self.publish)
        while self.now < seconds:
            deadline = self.session.deadline
            assert deadline is not None
            if self.events and self.events[0][0] <= deadline:
                self.now, _, do = heapq.heappop(self.events)
                do()
            else:
                self.now = max(self.now, deadline)
                self.perform(self.session.tick(self.now))

    def crossing(self) -> float:
        """Of one segment. What is lost TCP sends again."""
        took, again = self.ROUND_TRIP / 2, 2 * self.ROUND_TRIP
        while self.chance.random() < self.loss:
            took, again = took + again, again * 2
        return took

    def crosses(self) -> bool:
        """The NAT's view of a packet, either way."""
        alive = self.now < self.forgotten_at
        if alive:
            self.forgotten_at = self.now + self.timeout
        return alive

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Open():
                    self.at(self.now + self.crossing() + self.crossing(), self.open)
                case Send():
                    self.carry(action)
                case Drop():
                    self.connection += 1
                case Offer():
                    accepted = self.owed.pop(action.push.msg_id)
                    self.took.append((accepted, self.now - accepted))
                    self.perform(self.session.handled(self.now))

    def move(self) -> None:
        """Another public address, and nobody is told."""
        self.forgotten_at = self.now

    def open(self) -> None:
        if self.session.phase is Phase.OPENING:
            self.forgotten_at = self.now + self.timeout
            self.connects.append(self.now)
            self.perform(self.session.opened(self.now))

    def carry(self, send: Send) -> None:
        self.heartbeats += [self.now for packet in packets_of([send]) if isinstance(packet, Pingreq)]
        if self.crosses():
            number, sent = self.connection, packets_of([send])
            self.at(self.now + self.crossing(), lambda: self.serve(number, sent))

    def serve(self, number: int, packets: list[Packet]) -> None:
        for packet in packets:
            if isinstance(packet, Connect):
                self.keep_alive = packet.keep_alive
                self.answer(number, Connack(True))
                for msg_id in self.owed:
                    self.bring(number, msg_id)
            elif number == self.connection:
                assert self.now <= self.server_heard_at + 1.5 * self.keep_alive  # or it would have closed
                if isinstance(packet, Pingreq):
                    self.answer(number, Pingresp())
        self.server_heard_at = self.now

    def answer(self, number: int, packet: Packet) -> None:
        if self.crosses():
            self.at(self.now + self.crossing(), lambda: self.hear(number, packet))

    def hear(self, number: int, packet: Packet) -> None:
        if number == self.connection:
            self.perform(self.session.receive(encode(packet, 5), self.now))

    def publish(self) -> None:
        msg_id = len(self.took) + len(self.owed)
        self.owed[msg_id] = self.now
        if self.session.phase is Phase.ONLINE:
            self.bring(self.connection, msg_id)
        self.at(self.now + self.chance.expovariate(1 / self.pushes_every), self.publish)

    def bring(self, number: int, msg_id: int) -> None:
        self.answer(number, push(msg_id, msg_id % 65_535 + 1))


LEARNING = 1800.0


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("timeout", [45, 60, 300])
def test_pushes_arrive_in_time_after_half_an_hour_and_few_heartbeats_are_sent(
    timeout: float, loss: float
) -> None:
    end = 2 * 86_400.0
    simulation = Simulation(timeout, pushes_every=900, loss=loss)
    simulation.run(end)
    counted = [seconds for accepted, seconds in simulation.took if accepted >= LEARNING]
    assert len(counted) > 150
    assert sum(seconds <= 10 for seconds in counted) / len(counted) >= 0.99
    sent = sum(at >= LEARNING for at in simulation.heartbeats)
    oracle = (end - LEARNING) / 900 / (math.exp((timeout - 1) / 900) - 1)  # a push resets the silence, too
    assert sent <= 1.3 * oracle
    assert not [msg_id for msg_id, accepted in simulation.owed.items() if accepted < end - 1300]


def test_a_nat_that_moves_makes_pushes_late_by_some_usual_gaps() -> None:
    """paho with its 60 s would notice after 120."""
    end = 86_400.0
    simulation = Simulation(300, pushes_every=15)
    for at in range(1200, int(end), 1200):
        simulation.at(at, simulation.move)
    simulation.run(end)
    times = sorted(seconds for accepted, seconds in simulation.took if accepted >= LEARNING)
    assert times[int(0.99 * len(times))] < 35
    assert len(simulation.heartbeats) < 45 * end / 3600


def test_a_heartbeat_that_is_not_learned_makes_most_pushes_late() -> None:
    """Otherwise the simulation would prove nothing."""
    simulation = Simulation(60, pushes_every=300)
    simulation.session.settings = LinkSettings(keep_alive=240)
    simulation.run(43_200)
    late = sum(seconds > 10 for _, seconds in simulation.took)
    assert late > 0.4 * len(simulation.took)
