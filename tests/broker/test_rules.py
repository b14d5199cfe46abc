"""Quiet hours and frequency caps: the algebra against plain models, then what they do to pushes."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.broker import Broker
from broker.bus_local import LocalBus
from broker.limits import Limits
from broker.model import AppSettings, DeliveryState, FrequencyCap, QuietHours
from broker.pushing.rules import Counts, Rules, quiet_until, window_start
from broker.store_sqlite import SqliteStore

DEVNOS = st.sets(st.integers(0, 12))
BERLIN = "Europe/Berlin"


def _at(text: str, zone: str = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@given(st.lists(DEVNOS, max_size=12), st.integers(1, 20), DEVNOS)
def test_counts_are_those_of_a_dictionary(added: list[set[int]], least: int, among: set[int]) -> None:
    counts, plain = Counts(), dict.fromkeys(range(13), 0)
    for devnos in added:
        counts.add(BitMap(devnos))
        for devno in devnos:
            plain[devno] += 1
    assert set(counts.at_least(least, BitMap(among))) == {d for d in among if plain[d] >= least}


@given(st.lists(DEVNOS, min_size=1, max_size=8))
def test_what_is_subtracted_was_never_added(added: list[set[int]]) -> None:
    counts, without = Counts(), Counts()
    for devnos in added:
        counts.add(BitMap(devnos))
    for devnos in added[1:]:
        without.add(BitMap(devnos))
    counts.subtract(BitMap(added[0]))
    everybody = BitMap(range(13))
    for least in range(1, 10):
        assert counts.at_least(least, everybody) == without.at_least(least, everybody)


@pytest.mark.parametrize(
    ("start", "end", "now", "until"),
    [
        ("22:00", "07:00", "2026-03-02 21:59:59", None),
        ("22:00", "07:00", "2026-03-02 22:00:00", "2026-03-03 07:00"),
        ("22:00", "07:00", "2026-03-03 06:59:59", "2026-03-03 07:00"),
        ("22:00", "07:00", "2026-03-03 07:00:00", None),
        ("12:00", "14:30", "2026-03-03 13:00:00", "2026-03-03 14:30"),
        ("12:00", "14:30", "2026-03-03 15:00:00", None),
        ("00:00", "06:00", "2026-03-03 00:00:00", "2026-03-03 06:00"),
        ("22:00", "07:00", "2026-03-29 01:30:00", "2026-03-29 07:00"),  # the night is an hour shorter
        ("22:00", "07:00", "2026-10-25 04:00:00", "2026-10-25 07:00"),  # and this one longer
    ],
)
def test_quiet_hours_are_wall_clock_time(start: str, end: str, now: str, until: str | None) -> None:
    settings = AppSettings(quiet_hours=QuietHours(start, end, BERLIN))
    assert quiet_until(settings, _at(now)) == (None if until is None else _at(until))


def test_without_quiet_hours_it_is_never_quiet() -> None:
    assert quiet_until(AppSettings(), 0.0) is None


@pytest.mark.parametrize(("per", "start"), [("day", "2026-03-29 00:00"), ("hour", "2026-03-29 04:00")])
def test_a_cap_counts_in_calendar_hours_and_days_of_its_zone(per: str, start: str) -> None:
    assert window_start(FrequencyCap(1, per, BERLIN), _at("2026-03-29 04:59:59")) == _at(start)


# Through a push


async def _with_rules(service: Any, **rules: Any) -> Any:
    service.app = replace(service.app, settings=AppSettings(**rules))
    for name in "abc":
        await service.register(name)
    return service


async def _push(service: Any, *names: str, **changes: Any) -> dict[str, int]:
    """The counts of the new push that are not 0."""
    push: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "x"}} | changes
    if names:
        push["audience"] = {"registration_id": names}
    accepted = await service.pushes.push(service.app, orjson.dumps(push))
    return await _counts(service, accepted.msg_id)


async def _counts(service: Any, msg_id: int) -> dict[str, int]:
    record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
    return {state.value: count for state, count in record.counts(service.now).items() if count}


async def test_a_device_at_its_cap_is_suppressed_and_the_others_are_not(service: Any) -> None:
    await _with_rules(service, frequency_caps=(FrequencyCap(2, "day"),))
    assert await _push(service, "a") == {"pending": 1}
    assert await _push(service, "a", "b") == {"pending": 2}
    assert await _push(service, "a", "b", "c") == {"pending": 2, "suppressed": 1}
    assert await _push(service, "a") == {"suppressed": 1}
    service.now += 86_400
    assert await _push(service, "a") == {"pending": 1}


async def test_the_tighter_of_two_caps_holds(service: Any) -> None:
    await _with_rules(service, frequency_caps=(FrequencyCap(1, "hour"), FrequencyCap(2, "day")))
    assert await _push(service, "a") == {"pending": 1}
    assert await _push(service, "a") == {"suppressed": 1}
    service.now += 3600
    assert await _push(service, "a") == {"pending": 1}
    service.now += 3600
    assert await _push(service, "a") == {"suppressed": 1}


async def test_a_push_of_high_priority_goes_and_does_not_count(service: Any) -> None:
    await _with_rules(service, frequency_caps=(FrequencyCap(1, "day"),))
    for _ in range(3):
        assert await _push(service, "a", options={"priority": "high"}) == {"pending": 1}
    assert await _push(service, "a") == {"pending": 1}
    assert await _push(service, "a", options={"priority": "high"}) == {"pending": 1}


async def test_a_push_that_was_pushed_before_does_not_count(service: Any) -> None:
    await _with_rules(service, frequency_caps=(FrequencyCap(2, "day"),))
    for _ in range(5):
        assert await _push(service, "a", cid="once") == {"pending": 1}
    assert await _push(service, "a") == {"pending": 1}
    assert await _push(service, "a") == {"suppressed": 1}


async def test_counts_survive_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "data.db")
    await store.open()
    app = await store.create_app("test")
    app = replace(app, settings=AppSettings(frequency_caps=(FrequencyCap(1, "day"),)))
    await store.close()
    suppressed = []
    for _ in range(2):
        await store.open()
        broker = Broker(store, LocalBus(), Limits())
        await broker.open()
        await broker.devices.register(app, registration_id="a", trusted=True)
        push = {"platform": "all", "audience": "all", "notification": {"alert": "x"}}
        accepted = await broker.pushes.push(app, orjson.dumps(push))
        record = (await store.find_messages(app.app_id, [accepted.msg_id]))[accepted.msg_id]
        suppressed.append(record.counts(0.0)[DeliveryState.SUPPRESSED])
        await broker.close()
        await store.close()
    assert suppressed == [0, 1]


@given(st.lists(DEVNOS, max_size=8), st.lists(DEVNOS, max_size=8))
def test_counts_add_up_and_come_apart(first: list[set[int]], second: list[set[int]]) -> None:
    counts, others, both = Counts(), Counts(), Counts()
    for devnos in first:
        counts.add(BitMap(devnos))
        both.add(BitMap(devnos))
    for devnos in second:
        others.add(BitMap(devnos))
        both.add(BitMap(devnos))
    together = counts.copy()
    together.add_all(others)
    everybody = BitMap(range(13))
    for least in range(1, 17):
        assert together.at_least(least, everybody) == both.at_least(least, everybody)
    together.subtract_all(others)
    for least in range(1, 17):
        assert together.at_least(least, everybody) == counts.at_least(least, everybody)


async def test_brokers_add_up_what_they_count(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "data.db")
    await store.open()
    app = await store.create_app("test")
    app = replace(app, settings=AppSettings(frequency_caps=(FrequencyCap(3, "day"),)))
    everybody, nobody = BitMap((0, 1)), BitMap()
    one, two = Rules(store), Rules(store)
    assert [await rules.suppressed(app, everybody, inf) for rules in (one, two)] == [nobody, nobody]
    await one.forget(app, BitMap((1,)))
    for rules in (one, two, one):
        await rules.save()
    assert await one.suppressed(app, everybody, inf) == nobody
    for rules in (one, two):
        await rules.close()
    three = Rules(store)
    assert await three.suppressed(app, everybody, inf) == BitMap((0,))
    await three.close()
    await store.close()


QUIET = QuietHours("22:00", "07:00", BERLIN)


async def test_in_quiet_hours_a_push_waits_for_their_end(service: Any) -> None:
    await _with_rules(service, quiet_hours=QUIET)
    service.now = _at("2026-03-02 23:00")
    push = {"platform": "all", "audience": "all", "notification": {"alert": "x"}}
    options = {"time_to_live": 9 * 3600}  # an hour longer than the quiet ones
    accepted = await service.pushes.push(service.app, orjson.dumps(push | {"options": options}))
    await service.broker.timekeeper.run_due()
    record = (await service.store.find_messages(service.app.app_id, [accepted.msg_id]))[accepted.msg_id]
    assert (record.parts, len(record.targets)) == (0, 3)
    service.now = _at("2026-03-03 07:00")
    await service.broker.timekeeper.run_due()
    record = (await service.store.find_messages(service.app.app_id, [accepted.msg_id]))[accepted.msg_id]
    assert (record.parts, record.released) == (1, record.targets)
    assert await _counts(service, accepted.msg_id) == {"pending": 3}
    service.now = _at("2026-03-03 08:00")  # its time to live began when it was accepted
    assert await _counts(service, accepted.msg_id) == {"expired": 3}


async def test_in_quiet_hours_a_push_of_high_priority_goes_at_once(service: Any) -> None:
    await _with_rules(service, quiet_hours=QUIET)
    service.now = _at("2026-03-02 23:00")
    assert await _push(service, options={"priority": "high"}) == {"pending": 3}


@pytest.mark.parametrize(
    ("quiet", "options"),
    [
        (QUIET, {"time_to_live": 0}),
        (QUIET, {"time_to_live": 8 * 3600}),  # over when the quiet hours are
        (QuietHours("22:00", "07:00", BERLIN, "suppress"), {}),
    ],
)
async def test_what_quiet_hours_cannot_delay_or_may_not_is_suppressed(
    service: Any, quiet: QuietHours, options: dict[str, int]
) -> None:
    await _with_rules(service, quiet_hours=quiet)
    service.now = _at("2026-03-02 23:00")
    assert await _push(service, options=options) == {"suppressed": 3}


async def test_an_app_without_rules_holds_nothing_back(service: Any) -> None:
    await _with_rules(service)
    assert await _push(service) == {"pending": 3}
