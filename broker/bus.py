"""The bus: doorbells between broker and nodes. It hints; the store is the truth (architecture, decision 3).

Guarantees, checked by `tests/broker/bus_contract.py`:

B1  A doorbell reaches each subscribed node at most a few times, usually once, possibly never.
B2  Doorbells of one publisher arrive at one node in the order they were rung.
B3  `ring` never blocks and never raises because of a subscriber; a subscriber's error is logged.
B4  A subscriber is called on the event loop's thread, never from inside `ring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


Doorbell = Targeted | Broadcast | Recalled | CredentialsChanged
Subscriber = Callable[[Sequence[Doorbell]], None]


class Bus(Protocol):
    def ring(self, doorbells: Sequence[Doorbell]) -> None:
        """Tell the nodes; a sequence arrives as one call."""

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Start receiving; call the result to stop."""
