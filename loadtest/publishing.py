"""Publishers: an open loop of single pushes at a rate, closed loops of single and batch requests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import orjson

from loadtest.http_pool import HttpPool
from loadtest.ledger import Ledger, alert

BATCH: Final = 1000
SEED: Final = 20_26
UNAVAILABLE: Final = 503
STEP: Final = 0.25  # seconds


class PushRefused(Exception):
    """The server did not accept a push."""


class Schedule:
    """Times at which something is due, `rate(now)` a second from `begin` on, whoever waits for what."""

    def __init__(self, rate: Callable[[float], float], begin: float) -> None:
        """`rate` gets a time.perf_counter, and is more than 0; it changes little within STEP."""
        self._rate = rate
        self.due = begin

    def take(self, now: float) -> Iterator[float]:
        """All that is due by now, each once."""
        while self.due <= now:
            due = self.due
            self._advance()
            yield due

    def _advance(self) -> None:
        """To where the rate, integrated, has grown by one."""
        left = 1.0
        while left > 0:
            rate = self._rate(self.due)
            if left <= rate * STEP:
                self.due += left / rate
                return
            left -= rate * STEP
            self.due += STEP


class OpenLoop:
    """Pushes to random devices on a schedule that does not wait for answers.

    A push's latency counts from when it was due, so a generator or server that falls behind shows.
    """

    def __init__(
        self,
        pool: HttpPool,
        ledger: Ledger,
        name_of: Callable[[int], str],
        devices: Sequence[int],
        rate: float,
        msg_id_digits: int,
        *,
        cids: bool = False,
        forgiving: bool = False,
        together: int = 1,
    ) -> None:
        """`name_of` gives a device's registration id. `cids`: each push has one, so that it may be posted again.
        `forgiving`: a push that the server cannot take now (503) is counted as refused, and no error. `together`:
        so many pushes are due at the same moment, and go in one request."""
        self._pool = pool
        self._ledger = ledger
        self._name_of = name_of
        self._digits = msg_id_digits
        self._cids = cids
        self._forgiving = forgiving
        self._devices = devices
        self._together = together
        self._schedule = Schedule(lambda _: rate / together, time.perf_counter())
        self._random = random.Random(SEED)
        self.sent = 0
        self.accepted = 0
        self.refused = 0

    def send_due(self) -> float:
        """Send what is due; seconds until the next."""
        now = time.perf_counter()
        for due in self._schedule.take(now):
            if self._together > 1:
                self._send_batch(due)
            else:
                self._send(self._random.choice(self._devices), due)
        return self._schedule.due - now

    def _send(self, device: int, due: float) -> None:
        serial = self._ledger.add_targeted(device, due)
        cid = f"one-{serial}" if self._cids else ""
        body = push_body(self._name_of(device), alert(serial, self._digits), cid=cid)
        request = self._pool.build("POST", "/v3/push", body)
        self._post(request, [serial], check_accepted)

    def _send_batch(self, due: float) -> None:
        items: dict[int, tuple[str, str, str]] = {}
        for _ in range(self._together):
            device = self._random.choice(self._devices)
            serial = self._ledger.add_targeted(device, due)
            items[serial] = f"one-{serial}", self._name_of(device), alert(serial, self._digits)
        body = batch_body(list(items.values()))
        request = self._pool.build("POST", "/v3/push/batch/regid/single", body)
        self._post(request, list(items), check_batch)

    def _post(self, request: bytes, serials: Sequence[int], check: Callable[[int, bytes], None]) -> None:
        def answered(status: int, body: bytes) -> None:
            if status == UNAVAILABLE and self._forgiving:
                self.refused += len(serials)
                for serial in serials:
                    self._ledger.forget(serial)
                return
            check(status, body)
            self.accepted += len(serials)

        self._pool.send(request, answered)
        self.sent += len(serials)


def check_accepted(status: int, body: bytes) -> None:
    if status != 200:
        raise PushRefused(f"{status} {body[:500].decode(errors='replace')}")


def push_body(registration_id: str, text: str, *, cid: str = "") -> bytes:
    return (
        f'{{"platform":"all","audience":{{"registration_id":["{registration_id}"]}},'
        f'"notification":{{"alert":"{text}"}}{_cid_field(cid)}}}'
    ).encode()


def broadcast_body(text: str, *, cid: str = "") -> bytes:
    alert_field = f'"notification":{{"alert":"{text}"}}'
    return f'{{"platform":"all","audience":"all",{alert_field}{_cid_field(cid)}}}'.encode()


def _cid_field(cid: str) -> str:
    return f',"cid":"{cid}"' if cid else ""


def batch_body(items: Sequence[tuple[str, str, str]]) -> bytes:
    """`items`: cid, registration id and alert of each push."""
    pushes = ",".join(
        f'"{cid}":{{"platform":"all","target":"{name}","notification":{{"alert":"{text}"}}}}'
        for cid, name, text in items
    )
    return f'{{"pushlist":{{{pushes}}}}}'.encode()


def check_batch(status: int, body: bytes) -> None:
    """Every push of a batch was accepted."""
    check_accepted(status, body)
    refused = [row["error"] for row in orjson.loads(body).values() if "error" in row]
    if refused:
        raise PushRefused(f"{len(refused)} of a batch: {refused[0]}")


def keep_in_flight(
    pool: HttpPool,
    requests: Iterator[bytes],
    check: Callable[[int, bytes], None],
    at_once: int,
    seconds: float | None = None,
) -> tuple[int, float]:
    """Closed loop: `at_once` requests outstanding until `requests` or the time is over. Answers counted, and
    seconds until the last of them."""
    answered = sent = 0
    started = time.perf_counter()
    deadline = None if seconds is None else started + seconds

    def send_next() -> None:
        nonlocal sent
        if deadline is not None and time.perf_counter() >= deadline:
            return
        request = next(requests, None)
        if request is not None:
            sent += 1
            pool.send(request, take_answer)

    def take_answer(status: int, body: bytes) -> None:
        nonlocal answered
        answered += 1
        check(status, body)
        send_next()

    for _ in range(at_once):
        send_next()
    pool.reactor.run_until(lambda: answered == sent, "all requests answered", limit=600.0)
    return answered, time.perf_counter() - started


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest rank; 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return ranked[min(int(len(ranked) * share), len(ranked) - 1)]
