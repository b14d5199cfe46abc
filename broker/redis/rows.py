"""A message as it is kept: one row, written once. What becomes of it is in `settling.py`."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from broker.bitmaps import encode_bits
from broker.model import Callback, NewMessage, StoredMessage


class Row(Struct, frozen=True, gc=False, array_like=True, omit_defaults=True):
    """Also an entry of the app's log. The msg_id is in the name of its key, and before it in the log."""

    app_id: int
    body: bytes
    targets: int | bytes  # one devno, or a bitmap
    broadcast: bool
    created_at: float
    expires_at: float
    sendno: str = ""
    cid: str = ""
    high: bool = False
    collapse: str = ""
    replaces: int = 0
    suppressed: bytes | None = None
    paced: bool = False
    part_of: int = 0
    callback: Callback | None = None
    evicts: bool = True
    online: int = 0  # targets that were online when it was spread
    after: int = 0  # msg_id of the broadcast of the app before it

    @property
    def lasting(self) -> bool:
        """Somebody may fetch it."""
        return self.expires_at > self.created_at and not self.paced


ROWS: Final = msgspec.msgpack.Decoder(Row)


def row_of(message: NewMessage) -> Row:
    """As it goes into the log."""
    targets, suppressed = message.targets, message.suppressed
    return Row(
        message.app_id,
        message.body,
        targets.min() if len(targets) == 1 else encode_bits(targets.copy()),
        message.broadcast,
        message.created_at,
        message.expires_at,
        message.sendno,
        message.cid or "",
        message.high,
        message.collapse,
        message.replaces,
        encode_bits(suppressed) if suppressed else None,
        message.paced,
        message.part_of,
        message.callback,
        message.evicts,
    )


def stored_message(msg_id: int, row: Row) -> StoredMessage:
    return StoredMessage(
        msg_id,
        row.app_id,
        row.body,
        row.created_at,
        row.expires_at,
        row.part_of,
        row.replaces,
        row.high,
        row.after,
    )
