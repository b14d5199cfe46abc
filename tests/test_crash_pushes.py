"""Everything that may happen to a push, under SIGKILL: it goes in parts, later, on a schedule, instead of another; it
is withdrawn, stopped, held back by rules, and told about by callbacks.

The sister of test_crash.py. Its load and ledger are in crash_pushes.py. When all is calm, the server's account of
each push is compared, device by device, with what the devices got and what publishers were answered.
`HOLDFAST_CRASH_ROUNDS` makes it long; a failing run prints its seed, and `HOLDFAST_CRASH_SEED` makes the same choices
again (the moments of the kills stay the machine's).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
import zoneinfo
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from time import time
from typing import Any, Final

import aiohttp
import msgspec
import orjson
import pytest

from broker.bitmaps import decode_bits
from broker.later.paces import SLOW, decode, encode
from clients.local_server import LocalServer
from tests.crash_pushes import (
    CAP,
    STATES,
    Auditor,
    Device,
    Load,
    Publisher,
    Push,
    Schedule,
    World,
    make_zones,
    sum_mistake,
)
from tests.test_crash import after_a_while, after_an_answer, running

ROUNDS: Final = int(os.environ.get("HOLDFAST_CRASH_ROUNDS", "5"))
AWAY: Final = 61.0  # seconds that the server seems to be away in the end, so that plans of a minute end
PATIENCE: Final = 30.0 if ROUNDS > 12 else 3.0  # seconds that a slow push may take when the load is over
CALM_LIMIT: Final = 120.0  # seconds until nothing is pending
NOTICE_LIMIT: Final = 30.0
PUBLISHERS: Final = {"plain": 4, "quiet": 2, "capped": 2}
LEASE: Final = 150.0  # seconds; a callback event that was being told at a kill comes again in this time
CALL: Final = 0.015  # seconds that a call may take
KINDS: Final = ("POST /v3/push", "DELETE /v3/push", "/stop", "POST /v3/schedules")
RARE: Final = 3.0  # seconds to wait for a call of some kind
FORGOTTEN: Final = 3.5  # seconds of frequency counts that a crash forgets, with what it takes to save them
FLAGS: Final = (
    "--push-fanout-limit", "6",  # so that both inboxes and the broadcast log are in use
    "--push-offline-limit", "1000000",  # nothing is evicted
    "--push-max-slow-pushes", "15",  # is reached
    "--mqtt-max-inflight", "8",
    "--callbacks-private-addresses", "true",
    "--callbacks-first-pause", "0.2",
    "--callbacks-max-pause", "1",
    "--server-log-level", "warning",
)  # fmt: skip


async def test_every_push_is_whole_once_and_accounted_for_across_kills(
    start_server: Callable[..., LocalServer], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zones(tmp_path)
    monkeypatch.setenv("PYTHONTZPATH", os.pathsep.join((str(tmp_path), *zoneinfo.TZPATH)))
    server = await asyncio.to_thread(start_server, *FLAGS)
    load = await asyncio.to_thread(Load, server, seed)
    async with load.receiver.listening():
        await set_up(load)
        async with running(load, fleet(load)) as devices, running(load, auditors(load)):
            async with running(load, publishers(load)):
                load.open_gate()
                for _ in range(ROUNDS):
                    await one_round(load)
                await load.close_gate()
            await be_away(load)
            await finish_what_is_slow(load)
            load.draining.set()
            await calm(load)
            load.recorded.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOTICE_LIMIT):
                    await asyncio.gather(*devices)
        assert await asyncio.to_thread(server.terminate) == 0
    books = read_books(load)
    await asyncio.to_thread(server.start)
    mistakes = load.ledger.wrong + load.receiver.wrong + await all_mistakes(load, books)
    counts = describe(load)
    print(counts)  # noqa: T201
    assert not mistakes, f"HOLDFAST_CRASH_SEED={seed}, {counts}: {len(mistakes)} mistakes\n" + "\n".join(
        mistakes[:20]
    )


def describe(load: Load) -> str:
    pushes = [push for push in load.ledger.pushes.values() if push.exists]
    kinds = {
        "slow": sum(push.slow for push in pushes),
        "replacing": sum(push.replaces is not None for push in pushes),
        "collapsing": sum(push.collapse is not None for push in pushes),
        "taken back": sum(bool(push.taken_back) for push in pushes),
        "refused": sum(bool(push.refused) for push in load.ledger.pushes.values()),
        "schedules": len(load.ledger.schedules),
        "copies": load.ledger.copies,
        "notices": sum(map(len, load.ledger.notices.values())),
        "callback events": len(load.receiver.events),
        "looks at reports": load.ledger.looks,
    }
    kinds |= load.ledger.fates
    return f"{ROUNDS} rounds, {len(pushes)} pushes, " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())


# The run


async def set_up(load: Load) -> None:
    for world in load.worlds.values():
        await world.register()
    zone = "UTC" if 3600 < time() % 86_400 < 82_800 else "Asia/Tokyo"  # far from midnight
    capped = load.worlds["capped"]
    async with capped.session() as http:
        caps = [{"count": CAP, "per": "day", "zone": zone}]
        await Publisher(capped, 0).set_rules(http, {"frequency_caps": caps})


def fleet(load: Load) -> list[Any]:
    return [
        Device(world, name, load.random.getrandbits(32)).run()
        for world in load.worlds.values()
        for name in world.names
    ]


def publishers(load: Load) -> list[Any]:
    seeds = load.seeds()
    return [
        Publisher(load.worlds[name], next(seeds)).run()
        for name, count in PUBLISHERS.items()
        for _ in range(count)
    ]


def auditors(load: Load) -> list[Any]:
    return [Auditor(world, load.random.getrandbits(32)).run() for world in load.worlds.values()]


async def one_round(load: Load) -> None:
    moment = load.random.choice((after_a_while, after_an_answer, amid_a_call, amid_a_call))
    await moment(load, load.random)
    load.ledger.kills.append(time())
    await asyncio.to_thread(load.server.restart)
    load.ledger.starts.append(time())


async def amid_a_call(load: Load, random: Random) -> None:
    """Accepted, and not answered; the first of two steps, and not the second."""
    await asyncio.sleep(random.random() * 2)
    killed = asyncio.Event()

    def kill() -> None:
        os.kill(load.server.pid, signal.SIGKILL)
        killed.set()

    load.ledger.on_kind = random.choice(KINDS)
    load.ledger.on_call = lambda: asyncio.get_running_loop().call_later(random.random() * CALL, kill)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(killed.wait(), RARE)
    if load.ledger.on_call is not None:  # nobody made such a call
        load.ledger.on_call = None
        kill()
    await killed.wait()


async def be_away(load: Load) -> None:
    """Killed, and not started again for AWAY, as far as plans know: they are moved back by it."""
    await asyncio.to_thread(load.server.kill)
    load.ledger.kills.append(time())
    (database,) = load.server.data_dir.glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        plans = connection.execute("SELECT app, kind, key, value, due FROM records WHERE kind = ?", (SLOW,))
        for app, kind, key, value, due in plans.fetchall():
            pace = decode(value)
            moved = encode(msgspec.structs.replace(pace, start=pace.start - AWAY))
            connection.execute(
                "UPDATE records SET value = ?, due = ? WHERE app = ? AND kind = ? AND key = ?",
                (moved, due - AWAY, app, kind, key),
            )
    await asyncio.to_thread(load.server.start)
    load.ledger.starts.append(time())


async def finish_what_is_slow(load: Load) -> None:
    """No quiet hours any more; what is on its way may go on for a while, then it is stopped or withdrawn."""
    for world in load.worlds.values():
        async with world.session() as http:
            publisher = Publisher(world, load.random.getrandbits(32))
            if world.name == "quiet":
                await publisher.set_rules(http, {})
            for push in [push for push in load.ledger.pushes.values() if push.world is world and push.exists]:
                if push.may_go_later and await is_paused(publisher, http, push):
                    await publisher.call(http, "POST", f"/v1/pushes/{push.msg_id}/resume")
    await until_not(lambda: slow_ones(load), PATIENCE)
    for push in await slow_ones(load):
        async with push.world.session() as http:
            method, path = load.random.choice(
                (("DELETE", f"/v3/push/{push.msg_id}"), ("POST", f"/v1/pushes/{push.msg_id}/stop"))
            )
            await Publisher(push.world, 0).take_back(http, push, method, path)


async def is_paused(publisher: Publisher, http: aiohttp.ClientSession, push: Push) -> bool:
    answer = await publisher.call(http, "GET", f"/v1/pushes/{push.msg_id}")
    assert answer is not None
    return bool(answer.body["state"] == "paused")


async def slow_ones(load: Load) -> list[Push]:
    """Pushes with parts to come."""
    found = []
    for world in load.worlds.values():
        async with world.session() as http:
            for push in [push for push in load.ledger.pushes.values() if push.world is world and push.exists]:
                if push.may_go_later:
                    report = await read(http, f"/v1/pushes/{push.msg_id}")
                    if goes_on(report):
                        found.append(push)
    return found


async def calm(load: Load) -> None:
    """All devices are there: nothing is pending soon. If it stays so, the reports will say what."""
    deadline = time() + CALM_LIMIT
    for world in load.worlds.values():
        async with world.session() as http:
            known = [push for push in load.ledger.pushes.values() if push.world is world and push.exists]
            ended = [push.msg_id for push in known if push.answers or not push.slow]
            for some in batched(ended, 100):
                await until_not(lambda ids=some, h=http: any_pending(h, ids), deadline - time())

    async def missing() -> bool:
        return any(map(missing_notices, load.ledger.pushes.values()))

    await until_not(missing, NOTICE_LIMIT)


def batched(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))


async def any_pending(http: aiohttp.ClientSession, msg_ids: list[str]) -> bool:
    rows = await read(http, f"/v3/received/detail?msg_ids={','.join(msg_ids)}")
    return any(row["pending"] for row in rows)


async def until_not(ask: Callable[[], Awaitable[object]], limit: float) -> None:
    """The server is asked again and again, for so many seconds at most."""
    deadline = time() + limit
    while await ask() and time() < deadline:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.1)


async def read(http: aiohttp.ClientSession, path: str) -> Any:
    async with http.get(path) as answer:
        return orjson.loads(await answer.read())


# What the store holds when the server is gone


class Books:
    """Parts of pushes, and callback events that are to be told."""

    def __init__(self) -> None:
        self.parts: dict[str, list[set[str]]] = {}  # by the public id: the devices of each
        self.untold: dict[tuple[str, str], set[str]] = {}  # msg_id, event -> devices
        self.never = 0  # of these, those that nobody would tell
        self.msg_ids: dict[str, str] = {}  # of rows that publishers know: msg_id -> app key
        self.unfinished: set[str] = set()  # by the public id: pushes that had parts to come


def read_books(load: Load) -> Books:
    books = Books()
    (database,) = load.server.data_dir.glob("*.db")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        keys = dict(connection.execute("SELECT app_id, key FROM apps"))
        names = {
            (app, devno): rid for app, devno, rid in connection.execute("SELECT app, devno, rid FROM devices")
        }
        for msg_id, app, part_of, target, body in connection.execute(
            "SELECT msg_id, app, part_of, target, body FROM messages"
        ):
            if part_of:
                devices = {names[app, devno] for devno in decode_bits(target)}
                books.parts.setdefault(str(part_of), []).append(devices)
            elif not (body and b'"recall"' in bytes(body)):
                books.msg_ids[str(msg_id)] = keys[app]
        slow = connection.execute("SELECT key FROM records WHERE kind = ?", (SLOW,))
        books.unfinished.update(str(key) for (key,) in slow)
        for app, msg_id, event, bits, due in connection.execute(
            "SELECT app, msg_id, event, bits, due FROM callback_events"
        ):
            devices = {names[app, devno] for devno in decode_bits(bits)}
            books.untold.setdefault((str(msg_id), event), set()).update(devices)
            books.never += due is None or due > time() + LEASE
    return books


# What must hold


async def all_mistakes(load: Load, books: Books) -> list[str]:
    found = [f"{books.never} callback events are parked, or far too late"] * bool(books.never)
    for world in load.worlds.values():
        async with world.session() as http:
            fates: dict[Push, dict[str, str]] = {}
            for push in [push for push in load.ledger.pushes.values() if push.world is world]:
                found += identity_mistakes(push)
                if push.exists and len(push.answers | push.msg_ids) == 1:
                    report = await read(http, f"/v1/pushes/{push.msg_id}")
                    fates[push] = await read_fate(http, push)
                    load.ledger.fates.update(fates[push].values())
                    found += fate_mistakes(push, report, fates[push], load)
                    found += part_mistakes(push, report, fates[push], books)
                    found += callback_mistakes(push, fates[push], load, books)
                    found += late_arrivals(push)
                    found += notice_mistakes(push, fates[push])
            for schedule in load.ledger.schedules:
                if schedule.push.world is world:
                    found += await schedule_mistakes(http, schedule)
            found += collapse_mistakes(world, list(fates))
            if world.name == "capped":
                found += cap_mistakes(load, fates)
            found += await unknown_rows(http, world, books)
    return found


def identity_mistakes(push: Push) -> Iterator[str]:
    """One push for one cid; one that was refused is none; nobody else gets it."""
    if len(push.answers | push.msg_ids) > 1:
        yield f"push {push.uid} is several: {push.answers} {push.msg_ids}"
    if push.refused and push.exists:
        yield f"push {push.uid} exists ({push.answers | push.msg_ids}), and was refused: {push.refused}"
    if strangers := push.arrivals.keys() - push.targets:
        yield f"push {push.uid} reached strangers: {strangers}"


async def read_fate(http: aiohttp.ClientSession, push: Push) -> dict[str, str]:
    """What the server says became of it, by device."""
    body = orjson.dumps({"msg_id": push.msg_id, "registration_ids": sorted(push.targets)})
    async with http.post("/v3/status/message", data=body) as answer:
        told = orjson.loads(await answer.read())
    fate = {}
    for device in push.targets:
        if told[device] == {"status": 0}:
            fate[device] = "delivered"
        else:
            trace = await read(http, f"/v1/pushes/{push.msg_id}/devices/{device}")
            fate[device] = trace["status"]
    return fate


def fate_mistakes(push: Push, report: dict[str, Any], fate: Mapping[str, str], load: Load) -> Iterator[str]:
    """G2, G4: each target got it, or the report gives a reason that there is."""
    name = f"push {push.uid} {push.msg_id}"
    if mistake := sum_mistake(report, push):
        yield mistake
    counted = {state: sum(f == state for f in fate.values()) for state in STATES}
    if counted != {state: report[state] for state in STATES}:
        yield f"{name}: the report says {report}, by device it is {counted}"
    wrong: dict[str, set[str]] = {}
    for device, state in fate.items():
        if state == "pending" and not push.answers and goes_on(report):
            continue  # it became known too late to be ended
        if problem := fate_problem(push, device, state, load):
            wrong.setdefault(problem, set()).add(device)
    for problem, devices in wrong.items():
        yield f"{describe_push(push)}: {problem}: {sorted(devices)}; {push.taken_back}, {report['progress']}"
    if any(arrival.override != overridden(push) for these in push.arrivals.values() for arrival in these):
        yield f"{name}: should override {overridden(push)}, {push.arrivals}"


def goes_on(report: dict[str, Any]) -> bool:
    return (report["progress"] or {}).get("state") in ("waiting", "sending")


def fate_problem(push: Push, device: str, state: str, load: Load) -> str | None:
    got = device in push.arrivals
    match state:
        case "delivered":
            return None if got else "is said to be delivered"
        case "suppressed":
            may_be = push.world.name != "plain" and not push.high and not got
            return None if may_be else f"suppressed, and arrived: {push.arrivals.get(device)}"
        case "recalled":
            return None if why_recalled(push, device, load) else "recalled for no reason"
        case "expired":
            return None if push.may_expire else "expired"
        case _:
            return state


def overridden(push: Push) -> str | None:
    return push.options.get("override_msg_id")


def why_recalled(push: Push, device: str, load: Load) -> bool:
    if push.taken_back:
        return True
    return any(
        device in other.targets and (other.replaces is push or collapses(other, push))
        for other in load.ledger.pushes.values()
        if other.world is push.world and other is not push and not other.refused
    )


def collapses(new: Push, old: Push) -> bool:
    """What nobody was answered and nobody got may have happened all the same."""
    newer = not new.exists or int(new.msg_id) > int(old.msg_id)
    return newer and new.collapse == old.collapse is not None


def late_arrivals(push: Push) -> Iterator[str]:
    """Once a withdrawal, a stop or an override is answered, no later connection gets the push."""
    for taken in push.taken_back:
        for device, arrival in arrivals(push):
            if arrival.since > taken.answered:
                yield f"{describe_push(push)} came to {device} in {arrival} after {taken}"
    old = push.replaces
    if old is not None and push.answers and not push.may_go_later:
        for device, arrival in arrivals(old):
            if device in push.targets and arrival.since > push.answered_at:
                yield f"{describe_push(old)} came to {device} in {arrival} after {describe_push(push)} took its place"


def describe_push(push: Push) -> str:
    """For the search of what went wrong: times are those of the last kill and start before it."""
    ledger = push.world.ledger
    kill = max((at for at in ledger.kills if at < push.answered_at), default=0.0)
    start = max((at for at in ledger.starts if at < push.answered_at), default=0.0)
    return (
        f"push {push.uid} {min(push.answers | push.msg_ids, default='-')}"
        f" ({len(push.targets)} targets, {push.options}, answered {push.answered_at:.3f}, kill {kill:.3f},"
        f" start {start:.3f})"
    )


def arrivals(push: Push) -> Iterator[tuple[str, Any]]:
    for device, these in push.arrivals.items():
        for arrival in these:
            yield device, arrival


def collapse_mistakes(world: World, pushes: list[Push]) -> Iterator[str]:
    """Once a newer push with its key is answered, a device that connects does not get the older one. Parts are as old
    as their whole."""
    if world.name != "plain":  # rules may hold the newer one back
        return
    ordered = sorted((push for push in pushes if push.collapse), key=lambda push: int(push.msg_id))
    for old, new in itertools.combinations(ordered, 2):
        if old.collapse == new.collapse and new.answers and not (new.slow or old.may_expire):
            for device, arrival in arrivals(old):
                if device in new.targets and arrival.since > new.answered_at:
                    yield f"{describe_push(old)} came to {device} in {arrival}, collapsed by {describe_push(new)}"


def missing_notices(push: Push) -> set[str]:
    """Devices that had got it long enough before its withdrawal to be told."""
    asked = min((t.asked for t in push.taken_back if t.answered < float("inf")), default=0.0)
    if not asked or not any(taken.notifies for taken in push.taken_back):
        return set()
    told = push.world.ledger.notices.get(push.msg_id, set())
    return {
        device
        for device, these in push.arrivals.items()
        if device not in told and all(arrival.at < asked - 1.0 for arrival in these)
    }


def notice_mistakes(push: Push, fate: Mapping[str, str]) -> Iterator[str]:
    for device in missing_notices(push):
        if fate[device] == "delivered":
            yield f"push {push.uid} {push.msg_id}: {device} has it, and is not told to remove it"


def part_mistakes(push: Push, report: dict[str, Any], fate: Mapping[str, str], books: Books) -> Iterator[str]:
    """No device is in two parts, and all are in one, but for those that were taken out before. The report is younger
    than the books: a push that had parts to come may have more of them by now."""
    parts = books.parts.get(push.msg_id, [])
    whole = set().union(*parts)
    if len(whole) != sum(map(len, parts)):
        yield f"{describe_push(push)}: its parts are not disjoint: {parts}"
    if len(parts) != report["parts"] and not (
        push.msg_id in books.unfinished and len(parts) < report["parts"]
    ):
        yield f"{describe_push(push)}: {report['parts']} parts in the report, {len(parts)} in the store"
    if strangers := whole - push.targets:
        yield f"{describe_push(push)}: its parts have strangers: {strangers}"
    if report["progress"] is not None:
        owed = {device for device, state in fate.items() if state == "delivered" or not push.may_expire}
        owed -= {device for device, state in fate.items() if state in ("recalled", "suppressed")}
        if goes_on(report):
            owed = {device for device in owed if fate[device] == "delivered"}
        if push.msg_id in books.unfinished:
            owed = set()  # may be in the parts that came since
        if owed - whole:
            yield f"{describe_push(push)}: {owed - whole} are in none of its parts"


def callback_mistakes(push: Push, fate: Mapping[str, str], load: Load, books: Books) -> Iterator[str]:
    """Told at least once, or still to be told; and never what is not so."""
    for event in ("delivered", "recalled", "suppressed"):
        told = load.receiver.told.get((push.msg_id, event), set())
        known = told | books.untold.get((push.msg_id, event), set())
        wanted = {device for device, state in fate.items() if state == event}
        if event not in push.events:
            wanted = set()
            if known:
                yield f"push {push.uid} {push.msg_id}: callback {event}, which nobody asked for"
        if wanted - known:
            yield f"push {push.uid} {push.msg_id}: no callback {event} for {wanted - known}"
        if event == "delivered" and known - push.arrivals.keys():
            yield f"push {push.uid} {push.msg_id}: callback {event} for {known - push.arrivals.keys()}"
        if event == "suppressed" and known - wanted and event in push.events:
            yield f"push {push.uid} {push.msg_id}: callback {event} for {known - wanted}"


async def schedule_mistakes(http: aiohttp.ClientSession, schedule: Schedule) -> list[str]:
    push, due = schedule.push, schedule.due
    name = f"schedule {schedule.id} of push {push.uid}, due {due}"
    early = [arrival for _, arrival in arrivals(push) if arrival.at < due]
    found = [f"{name}: came early: {early}"] * bool(early)
    if schedule.delete_asked:
        if schedule.deleted < due and push.exists:
            found.append(f"{name}: fired ({push.msg_ids}), and was deleted at {schedule.deleted}")
        return found
    if not schedule.id:
        return found
    told = await read(http, f"/v3/schedules/{schedule.id}")
    log = await read(http, f"/v3/schedules/{schedule.id}/msg_ids")
    ids, refused = log["msgids"], [row for row in log["log"] if "error" in row]
    counts = (told["fired"], told["failed"], told["missed"])
    allowed = [(1, 0, 0)]
    if refused and all(row["error"]["code"] == 1012 for row in refused):
        allowed = [(0, 1, 0)]
    elif schedule.created > due and "periodical" in schedule.trigger:
        allowed.append((0, 0, 0))  # it may be due the next time only
    if counts not in allowed or len(ids) != counts[0]:
        found.append(f"{name}: fired, failed, missed {counts}, log {log}")
    elif push.msg_ids - set(ids) or any(row["at"] < due for row in log["log"]):
        found.append(f"{name}: devices got {push.msg_ids}, log {log}")
    return found


def cap_mistakes(load: Load, fates: Mapping[Push, Mapping[str, str]]) -> Iterator[str]:
    """A device gets as many as the cap, and more only by what crashes forgot."""
    counted = [push for push in fates if not push.high]
    began = {push: push.begun for push in counted}
    forgotten = [
        push for push in counted if any(kill - FORGOTTEN < began[push] < kill for kill in load.ledger.kills)
    ]
    lost = len(load.ledger.kills) * PUBLISHERS["capped"] * 8  # batches that were counted, and not stored
    for device in load.worlds["capped"].names:
        fate = [fates[push][device] for push in counted if device in push.targets]
        got = sum(state != "suppressed" for state in fate)
        extra = sum(device in push.targets for push in forgotten)
        if got > CAP + extra:
            yield f"{device}: {got} pushes over the cap of {CAP}, {extra} of them near a kill"
        if got < len(fate) and got < CAP - lost:
            yield f"{device}: {len(fate) - got} pushes suppressed after {got}, the cap is {CAP}"


async def unknown_rows(http: aiohttp.ClientSession, world: World, books: Books) -> list[str]:
    """What is stored and nobody knows: a push that nobody could get or that goes later, or a notice that nobody got
    yet."""
    known = world.ledger.by_msg_id.keys() | world.ledger.notice_ids
    found = []
    for msg_id in [i for i, key in books.msg_ids.items() if key == world.app.app_key and i not in known]:
        report = await read(http, f"/v1/pushes/{msg_id}")
        if report["delivered"] or (report["pending"] and not goes_on(report)):
            found.append(f"{msg_id} is stored, and nobody knows it: {report}")
    return found
