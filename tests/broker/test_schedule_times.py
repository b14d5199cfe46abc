"""When schedules fire: rows for what clocks do, and the rule against python-dateutil's."""

from __future__ import annotations

import itertools
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from dateutil import rrule
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import ApiError
from broker.later.schedule_times import (
    WEEKDAYS,
    Once,
    Repeated,
    Trigger,
    check_span,
    find_zone,
    instant,
    read_times,
    show,
)
from broker.limits import Limits

BERLIN = ZoneInfo("Europe/Berlin")
WEEKLY = {
    "start": "2026-01-01 00:00:00",
    "end": "2026-12-31 00:00:00",
    "time": "12:00:00",
    "time_unit": "week",
    "frequency": 1,
    "point": ["MON"],
}


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _wall(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _times(trigger: dict[str, Any], zone: str = "UTC") -> Once | Repeated:
    return read_times(msgspec.convert(trigger, Trigger), zone, Limits())


def _all(times: Once | Repeated, after: float = 0.0) -> list[float]:
    found = []
    while (moment := times.next_after(after)) is not None:
        found.append(moment)
        after = moment
    return found


@pytest.mark.parametrize(
    ("zone", "wall", "moment"),
    [
        ("UTC", "2026-06-01T12:00:00", "2026-06-01T12:00:00+00:00"),
        ("Asia/Shanghai", "2026-06-01T12:00:00", "2026-06-01T04:00:00+00:00"),
        ("Europe/Berlin", "2026-01-01T12:00:00", "2026-01-01T11:00:00+00:00"),
        ("Europe/Berlin", "2026-07-01T12:00:00", "2026-07-01T10:00:00+00:00"),
        # 02:00 to 03:00 on 29 March is left out: the first moment after the gap
        ("Europe/Berlin", "2026-03-29T01:59:59", "2026-03-29T00:59:59+00:00"),
        ("Europe/Berlin", "2026-03-29T02:00:00", "2026-03-29T01:00:00+00:00"),
        ("Europe/Berlin", "2026-03-29T02:30:00", "2026-03-29T01:00:00+00:00"),
        ("Europe/Berlin", "2026-03-29T02:59:59", "2026-03-29T01:00:00+00:00"),
        ("Europe/Berlin", "2026-03-29T03:00:00", "2026-03-29T01:00:00+00:00"),
        # 02:00 to 03:00 on 25 October comes twice: the first
        ("Europe/Berlin", "2026-10-25T02:30:00", "2026-10-25T00:30:00+00:00"),
        ("Europe/Berlin", "2026-10-25T03:00:00", "2026-10-25T02:00:00+00:00"),
        ("America/New_York", "2026-03-08T02:30:00", "2026-03-08T07:00:00+00:00"),
        ("Australia/Lord_Howe", "2026-10-04T02:15:00", "2026-10-03T15:30:00+00:00"),  # a gap of half an hour
        ("Pacific/Apia", "2011-12-30T12:00:00", "2011-12-30T10:00:00+00:00"),  # a whole day is left out
    ],
)
def test_a_wall_time_is_one_moment(zone: str, wall: str, moment: str) -> None:
    assert instant(datetime.fromisoformat(wall), ZoneInfo(zone)) == _unix(moment)


def test_every_day_through_a_change_of_the_clocks_fires_once_a_day() -> None:
    daily = {
        "start": "2026-03-27 00:00:00",
        "end": "2026-03-31 23:59:59",
        "time": "02:30:00",
        "time_unit": "DAY",
    }
    fired = [show(moment, "Europe/Berlin") for moment in _all(_times({"periodical": daily}, "Europe/Berlin"))]
    assert fired == [
        "2026-03-27 02:30:00",
        "2026-03-28 02:30:00",
        "2026-03-29 03:00:00",
        "2026-03-30 02:30:00",
        "2026-03-31 02:30:00",
    ]
    daily |= {"start": "2026-10-24 00:00:00", "end": "2026-10-26 23:59:59"}
    moments = _all(_times({"periodical": daily}, "Europe/Berlin"))
    assert [late - early for early, late in itertools.pairwise(moments)] == [86_400.0, 90_000.0]


def test_a_day_that_is_left_out_fires_with_the_next_and_only_once() -> None:
    daily = {
        "start": "2011-12-29 00:00:00",
        "end": "2012-01-01 12:00:00",
        "time": "00:00:00",
        "time_unit": "day",
    }
    fired = [show(moment, "Pacific/Apia") for moment in _all(_times({"periodical": daily}, "Pacific/Apia"))]
    assert fired == ["2011-12-29 00:00:00", "2011-12-31 00:00:00", "2012-01-01 00:00:00"]


@pytest.mark.parametrize(
    ("rule", "days"),
    [
        # the first `time` after start begins the first period
        ({"time_unit": "day", "frequency": 3, "point": None}, ["01-01", "01-04", "01-07", "01-10"]),
        ({"start": "2026-01-01 12:00:01", "time_unit": "day", "frequency": 3, "point": None},
         ["01-02", "01-05", "01-08", "01-11"]),
        ({"time_unit": "Week", "frequency": 2, "point": ["wed", "FRI"]}, ["01-02", "01-14", "01-16", "01-28"]),
        # Thursday, 1 January; Monday is of the next week
        ({"frequency": 2, "point": ["MON"]}, ["01-12", "01-26"]),
        ({"time_unit": "month", "point": ["30", "31"]}, ["01-30", "01-31", "03-30", "03-31"]),
        ({"time_unit": "month", "point": ["29"], "frequency": 1}, ["01-29", "03-29", "04-29", "05-29"]),
        ({"time_unit": "MONTH", "point": ["01", 15], "frequency": 6}, ["01-01", "01-15", "07-01", "07-15"]),
        ({"frequency": 100, "point": ["THU", "SUN"]}, ["01-01", "01-04"]),
    ],
)  # fmt: skip
def test_rules(rule: dict[str, Any], days: list[str]) -> None:
    moments = _all(_times({"periodical": WEEKLY | rule}))[: len(days)]
    assert [str(show(moment, "UTC")) for moment in moments] == [f"2026-{day} 12:00:00" for day in days]


def test_start_and_end_are_included() -> None:
    edges = WEEKLY | {
        "start": "2026-01-05 12:00:00",
        "end": "2026-01-12 12:00:00",
    }
    assert len(_all(_times({"periodical": edges}))) == 2
    inside = edges | {"start": "2026-01-05 12:00:01", "end": "2026-01-12 11:59:59"}
    assert _all(_times({"periodical": inside})) == []


UNITS = {"day": rrule.DAILY, "week": rrule.WEEKLY, "month": rrule.MONTHLY}


@st.composite
def _rules(draw: st.DrawFn) -> dict[str, Any]:
    start = draw(st.datetimes(_wall("2024-01-01"), _wall("2027-12-31"))).replace(microsecond=0)
    unit = draw(st.sampled_from(sorted(UNITS)))
    points: Any = None
    if unit == "week":
        points = draw(st.lists(st.sampled_from(WEEKDAYS), min_size=1))
    if unit == "month":
        points = draw(st.lists(st.integers(1, 31).map(lambda day: f"{day:02}"), min_size=1))
    return {
        "start": str(start),
        "end": str(start + timedelta(seconds=draw(st.integers(0, 366 * 86_400)))),
        "time": str(draw(st.times()).replace(microsecond=0)),
        "time_unit": unit,
        "frequency": draw(st.integers(1, 100)),
        "point": points,
    }


@given(_rules(), st.integers(-10, 400))
@settings(deadline=None)
def test_the_next_firing_is_dateutils(rule: dict[str, Any], days: int) -> None:
    start, end = (datetime.fromisoformat(rule[key]) for key in ("start", "end"))
    first = datetime.combine(start.date(), time.fromisoformat(rule["time"]))
    options: dict[str, Any] = {}
    if rule["time_unit"] == "week":
        options["byweekday"] = [WEEKDAYS.index(point) for point in rule["point"]]
    if rule["time_unit"] == "month":
        options["bymonthday"] = [int(point) for point in rule["point"]]
    model = rrule.rrule(
        UNITS[rule["time_unit"]],
        dtstart=first if first >= start else first + timedelta(days=1),
        until=end,
        interval=rule["frequency"],
        **options,
    )
    moment = start + timedelta(days=days)
    found = _times({"periodical": rule}).next_after((moment - _wall("1970-01-01")).total_seconds())
    expected = model.after(moment)
    assert show(found, "UTC") == (None if expected is None else str(expected))


ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/St_Johns",
    "Australia/Lord_Howe",
    "Asia/Shanghai",
    "Africa/Casablanca",
)


@given(_rules(), st.sampled_from(ZONES))
@settings(deadline=None)
def test_firings_go_forward_within_the_span_and_are_as_many_as_days_that_match(
    rule: dict[str, Any], zone: str
) -> None:
    times = _times({"periodical": rule}, zone)
    assert isinstance(times, Repeated)
    moments = _all(times)
    assert moments == sorted(set(moments))
    first, last = instant(times.start, times.zone), times.end
    assert all(first <= moment <= last for moment in moments)
    for moment in moments:
        wall = datetime.fromtimestamp(moment, times.zone)
        gap = datetime.fromtimestamp(moment - 1, times.zone).utcoffset() != wall.utcoffset()
        assert wall.time() == times.time or gap
    in_utc = _all(_times({"periodical": rule}, "UTC"))
    assert abs(len(moments) - len(in_utc)) <= 1  # a change of the clocks at the very edge of the span


@given(st.datetimes(_wall("2024-01-01"), _wall("2027-12-31")), st.sampled_from(ZONES))
@settings(deadline=None)
def test_a_moment_shows_its_wall_time_or_the_end_of_a_gap(wall: datetime, zone: str) -> None:
    wall = wall.replace(microsecond=0)
    moment = instant(wall, ZoneInfo(zone))
    shown = datetime.fromtimestamp(moment, ZoneInfo(zone)).replace(tzinfo=None)
    before = datetime.fromtimestamp(moment - 1, ZoneInfo(zone)).replace(tzinfo=None)
    assert shown == wall or before < wall < shown


SINGLE = {"time": "2026-01-01 00:00:00"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "trigger: must have single or periodical"),
    ({"single": SINGLE, "periodical": WEEKLY}, "trigger: must have single or periodical"),
    ({"single": {"time": "2026-1-1 00:00:00"}}, "trigger.single.time: must be YYYY-MM-DD HH:MM:SS"),
    ({"single": {"time": "2026-01-01 00:00"}}, "trigger.single.time: must be"),
    ({"single": {"time": "2026-02-30 00:00:00"}}, "trigger.single.time: must be"),
    ({"single": {"time": "2026-01-01 24:00:00"}}, "trigger.single.time: must be"),
    ({"single": {"time": "0001-01-01 00:00:00"}}, "trigger.single.time: must be"),
    ({"single": {"time": "９999-01-01 00:00:00"}}, "trigger.single.time: must be"),
    (
        {"single": SINGLE | {"zone": "Mars/Olympus"}},
        "trigger.single.zone: there is no time zone 'Mars/Olympus'",
    ),
    ({"single": SINGLE | {"zone": "../../etc/passwd"}}, "trigger.single.zone: there is no time zone"),
    ({"single": SINGLE | {"zone": "Europe"}}, "trigger.single.zone: there is no time zone"),
    ({"single": SINGLE | {"zone": ""}}, "trigger.single.zone: there is no time zone"),
    ({"periodical": WEEKLY | {"start": "x"}}, "trigger.periodical.start: must be"),
    ({"periodical": WEEKLY | {"end": "x"}}, "trigger.periodical.end: must be"),
    (
        {"periodical": WEEKLY | {"end": "2025-12-31 00:00:00"}},
        "trigger.periodical.end: must be later than start",
    ),
    ({"periodical": WEEKLY | {"end": "2027-01-02 00:00:01"}}, "by 366 days at most"),
    ({"periodical": WEEKLY | {"time": "12:00"}}, "trigger.periodical.time: must be HH:MM:SS"),
    ({"periodical": WEEKLY | {"time": "24:00:00"}}, "trigger.periodical.time: must be HH:MM:SS"),
    ({"periodical": WEEKLY | {"frequency": 0}}, "trigger.periodical.frequency: must be 1 to 100"),
    ({"periodical": WEEKLY | {"frequency": 101}}, "trigger.periodical.frequency: must be 1 to 100"),
    (
        {"periodical": WEEKLY | {"time_unit": "hour"}},
        "trigger.periodical.time_unit: must be one of day, week, month",
    ),
    ({"periodical": WEEKLY | {"point": []}}, "trigger.periodical.point: must be a list of MON"),
    ({"periodical": WEEKLY | {"point": ["01"]}}, "trigger.periodical.point: must be a list of MON"),
    ({"periodical": WEEKLY | {"time_unit": "month"}}, "trigger.periodical.point: must be a list of 01 to 31"),
    ({"periodical": WEEKLY | {"time_unit": "month", "point": ["32"]}}, "trigger.periodical.point: must be"),
    ({"periodical": WEEKLY | {"time_unit": "month", "point": ["00"]}}, "trigger.periodical.point: must be"),
    ({"periodical": WEEKLY | {"time_unit": "day"}}, "trigger.periodical.point: must be absent"),
]


@pytest.mark.parametrize(("trigger", "message"), WRONG)
def test_what_is_wrong_is_8100_and_named(trigger: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        _times(trigger)
    assert caught.value.code == 8100
    assert message in caught.value.message


def test_nothing_reaches_further_than_a_year() -> None:
    now = _unix("2025-01-01T00:00:00+00:00")
    check_span(_times({"single": {"time": "2026-01-01 00:00:00"}}), now, Limits())
    for far in (
        {"single": {"time": "2026-01-03 00:00:00"}},
        {"periodical": WEEKLY | {"start": "2026-01-03 00:00:00"}},
    ):
        with pytest.raises(ApiError, match="at most 366 days from now"):
            check_span(_times(far), now, Limits())


def test_an_own_zone_wins_over_the_default() -> None:
    own = {"single": SINGLE | {"zone": "Europe/Berlin"}}
    assert _times(own, "Asia/Shanghai") == Once(instant(_wall("2026-01-01"), BERLIN))
    assert msgspec.convert(own, Trigger).in_zone("Asia/Shanghai").zone == "Europe/Berlin"
    assert msgspec.convert({"single": SINGLE}, Trigger).in_zone("Asia/Shanghai").zone == "Asia/Shanghai"
    assert msgspec.convert({"periodical": WEEKLY}, Trigger).in_zone("UTC").zone == "UTC"
    assert Trigger().zone is None


def test_zones_are_found_by_name_only() -> None:
    assert find_zone("Asia/Shanghai") == ZoneInfo("Asia/Shanghai")
    assert [find_zone(name) for name in ("", "x" * 65, "\0", "/etc/localtime", "UTC/..")] == [None] * 5


def test_a_trigger_is_shown_with_what_it_left_out() -> None:
    sent = {
        "start": "2026-01-01 00:00:00",
        "end": "2026-01-02 00:00:00",
        "time": "12:00:00",
        "time_unit": "Day",
    }
    trigger = msgspec.convert({"periodical": sent | {"point": None}, "single": None}, Trigger).in_zone("UTC")
    assert trigger.as_dict() == {"periodical": sent | {"frequency": 1, "zone": "UTC"}}
    assert msgspec.json.decode(msgspec.json.encode(trigger), type=Trigger) == trigger
