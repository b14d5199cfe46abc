"""The bus: doorbells between broker and nodes. It hints; the store is the truth (architecture, decision 3).

Guarantees, checked by `tests/broker/bus_contract.py`:

B1  A doorbell reaches each node that it concerns at most a few times, usually once, possibly never. When one was
    lost, `missed` of the subscription is awaited before any later one is handed over.
B2  Doorbells of one publisher arrive at one node in the order they were rung; those of one app's appends in the order
    of their msg_ids, whoever stored them.
B3  `ring` never blocks and never raises because of a subscriber; a subscriber's error is logged.
B4  A subscriber is called on the event loop's thread, never from inside `ring`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from broker.model import StoredBroadcast, StoredMessage, Withdrawn


class Targeted(Struct, frozen=True, gc=False):
    """These devices have something in their inbox; here is a copy."""

    message: StoredMessage
    devnos: Sequence[int]


class Broadcast(Struct, frozen=True, gc=False):
    """A new row in the broadcast log, inline. The receiver owns the bitmaps."""

    broadcast: StoredBroadcast


class Recalled(Struct, frozen=True, gc=False):
    """These pushes are owed to these devices no longer. The receiver leaves the bitmaps as they are."""

    withdrawn: Sequence[Withdrawn]


@dataclass(frozen=True, slots=True)
class CredentialsChanged:
    """Devices whose tokens were revoked, or (devnos None) an app that changed or was deleted."""

    app_id: int
    devnos: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Taken:
    """Another node claimed this device; `former` is the node that is to close its connection (G5)."""

    app_id: int
    devno: int
    epoch: int  # of the newer claim
    former: str


Doorbell = Targeted | Broadcast | Recalled | CredentialsChanged | Taken
Subscriber = Callable[[Sequence[Doorbell]], None]
Missed = Callable[[], Awaitable[None]]


class Bus(Protocol):
    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        """Tell the nodes; a sequence arrives as one call."""

    def subscribe(self, subscriber: Subscriber, missed: Missed | None = None) -> Callable[[], None]:
        """Start receiving; call the result to stop. `missed` looks in the store for what was not heard."""

    async def catch_up(self) -> None:
        """Return when everything that was rung to this node before the call was heard, or looked up by `missed`."""

    async def close(self) -> None:
        """Ring what still waits, then let go."""
