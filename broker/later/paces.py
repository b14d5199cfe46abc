"""The plan of a paced push: which of its targets are let go when.

The targets stand in the order of their devnos; part k of n begins at `start + k * duration / n` and reaches to target
`total * (k + 1) // n`. So the record only holds numbers, and what is released is never behind the even pace, and
before it by one part at most: 1 % of the targets where there are MAX_PARTS parts, one second's worth where parts are
LEAST_GAP apart, one device where there are few.
"""

from __future__ import annotations

from typing import Final

import msgspec

from broker.model import Callback, NewMessage, RecordChange

SLOW: Final = "pace"
HELD: Final = "held"
KINDS: Final = (SLOW, HELD)
MAX_PARTS: Final = 100  # each is a row of the broadcast log, which a connecting device is looked up in
LEAST_GAP: Final = 1.0  # seconds between two parts


class Pace(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The value of a record of one of KINDS; its key is the msg_id of the paced push."""

    body: bytes
    total: int  # targets, the suppressed ones not among them
    start: float  # moved on by what holds the plan up
    duration: float  # 0: all at once, at `start`
    parts: int  # of the plan; catching up may take fewer
    ttl: int  # each part waits so long, but not beyond expires_at
    expires_at: float  # of the whole: what is not released by then never is
    part: int = 0  # the next one
    paused_at: float | None = None
    high: bool = False
    collapse: str = ""
    replaces: int = 0
    callback: Callback | None = None

    def due_part(self, now: float) -> int:
        """The part that should begin next: those before it should have begun by now."""
        part = self.part
        while part < self.parts and self.begins(part) <= now:
            part += 1
        return part

    def begins(self, part: int) -> float:
        return self.start + part * self.duration / self.parts

    def reaches(self, part: int) -> int:
        """Targets of the parts before this one."""
        return self.total * part // self.parts

    @property
    def released(self) -> int:
        return self.reaches(self.part)

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def due(self) -> float:
        """When there is something to do about it."""
        return self.expires_at if self.paused_at is not None else min(self.begins(self.part), self.expires_at)

    def held_until(self, moment: float) -> Pace:
        """The same with the next part beginning then, and all others as much later."""
        return msgspec.structs.replace(self, start=moment - self.part * self.duration / self.parts)

    def resumed(self, now: float) -> Pace:
        """The plan goes on where it was when it was paused; one that had not begun begins as planned, and so does one
        that quiet hours hold up: it stands until one gap before the next part."""
        assert self.paused_at is not None
        stands = self.begins(max(0, self.part - 1))
        lost = max(0.0, now - max(self.paused_at, stands))
        return msgspec.structs.replace(self, start=self.start + lost, paused_at=None)


encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(Pace).decode


def start_pace(message: NewMessage, plan: tuple[float, float, int], index: int = 0) -> RecordChange:
    """The first record of a paced push, to be appended along with it, where it is message `index`; the store fills in
    its msg_id. `plan`: when it starts, for how long (seconds; 0: it is held, and goes all at once), and how long each
    part waits. The targets are not empty."""
    start, duration, ttl = plan
    total = len(message.targets)
    pace = Pace(
        body=message.body,
        total=total,
        start=start,
        duration=duration,
        parts=max(1, min(MAX_PARTS, total, int(duration / LEAST_GAP))),
        ttl=ttl,
        expires_at=message.expires_at,
        high=message.high,
        collapse=message.collapse,
        replaces=message.replaces,
        callback=message.callback,
    )
    kind = SLOW if duration > 0 else HELD
    return RecordChange(message.app_id, kind, "", encode(pace), 0, pace.due, index)
