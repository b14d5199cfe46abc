"""What a node sees of the lives of its devices' connections, told to broker.carriers.learning.

No packet costs anything here. A connection carries its network, when it came, and two small numbers: `quiet`, the
bin of the silence that was going on when the timer looked last, and `longest`, the bin of the longest that a packet
ended. So a silence is known to be at least as long as it was at the last look: too short by up to the time between
looks, never too long.

Theory of a death. A connection that ended without a word may have been forgotten by a NAT, or the phone is in a lift.
It counts as forgotten only if all of this holds:

- Its last silence was longer than any that it had survived: what has let 200 seconds pass does not forget after 60.
- The device came back, in the same network, within the time in which a heartbeat would have told it.
- If we closed it, then not at once: a device that hears our goodbye has a way that works.

A device that went to another node tells nothing here; the first rule alone decides then. What a device lost while its
node was gone is not known to anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from broker.carriers.learning import Learning, Network
from broker.carriers.panels import voice_of
from broker.carriers.silences import bin_of

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.hub import Hub
    from gateway.session import Session
    from gateway.wheel import Clock

HOW: Final = {
    "client disconnected": "closed",
    "connection lost": "closed",
    "keep-alive timeout": "silent",
    "ack timeout": "silent",
    "taken over": "taken",
}
TOLD: Final = "told"  # all other ends are ours
WITHOUT_A_WORD: Final = ("silent", "taken")
NOTICED: Final = 10.0  # seconds that a device takes to find out, and to come back
PROMPT: Final = 10.0  # seconds in which it comes back if it heard us close
UNLIMITED: Final = 3600.0  # what counts as the keep-alive of a device that has none
MAX_SUSPECTS: Final = 10_000  # an edge that dies takes all its devices with it: the oldest are forgotten
ELSEWHERE: Final = (
    5.0  # seconds after which a device that was taken over, and is not here, is at another node
)
SWEEP_EVERY: Final = 10.0
SAMPLE: Final = 8  # acknowledgements of one push whose times are looked at in one turn

Who = tuple[int, int]  # app_id, devno


@dataclass(frozen=True, slots=True)
class Suspect:
    """A connection that may have been forgotten; times on the clock of the node."""

    network: Network
    voice: int
    silence: int  # the bin of its last one
    at: float  # when it ended
    until: float  # a device that comes later was away itself
    how: str
    told: bool  # we said goodbye

    def is_proven(self, network: Network, now: float) -> bool:
        """Now that the device is back, in this network."""
        heard = self.told and now < self.at + PROMPT
        return now <= self.until and not heard and network is self.network


class Witness:
    """`find_hub` gives the app's hub, if the node has it."""

    def __init__(self, learning: Learning, clock: Clock, find_hub: Callable[[int], Hub | None]) -> None:
        self.learning = learning
        self._clock = clock
        self._find_hub = find_hub
        self._suspects: dict[Who, Suspect] = {}  # oldest first
        self._sweep_at = 0.0

    def connected(self, connection: Connection, app_id: int, devno: int, link: str) -> None:
        """A device that is being welcomed, and whose profile is known. `link`: as for `Learning.network`."""
        now = self._clock.now
        network = self.learning.network(connection.profile, link)
        network.connected()
        connection.network = network
        connection.voice = voice_of(app_id, connection.voice)
        connection.since = now
        suspect = self._suspects.pop((app_id, devno), None)
        if suspect is not None and suspect.is_proven(network, now):
            network.died(suspect.silence, suspect.voice)

    def looked(self, connection: Connection, network: Network, now: float) -> None:
        """On the timer."""
        silence = bin_of(now - connection.last_seen)
        if silence < connection.quiet:
            self._survived(connection, network)
        connection.quiet = silence

    @staticmethod
    def _survived(connection: Connection, network: Network) -> None:
        network.survived(connection.quiet, connection.voice)
        connection.longest = max(connection.longest, connection.quiet)

    def ended(
        self, connection: Connection, app_id: int, session: Session, label: str, *, wordless: bool
    ) -> None:
        """`label`: why, as the log says it; `last_seen` is still that of the last packet."""
        network, now = connection.network, self._clock.now
        if network is None:
            return
        connection.network = None
        if bin_of(now - connection.last_seen) < connection.quiet:
            self._survived(connection, network)
        how = _how(label, wordless=wordless, waited=session.unacked is not None)
        network.ended(how, now - connection.since)
        if session.mailbox is None:  # its packet ids began with this connection, and are pushes
            network.delivered(session.next_id - 1, len(session.unacked or ()))
        silence = _last_silence(connection, session, now)
        if how in WITHOUT_A_WORD and silence > connection.longest:
            until = now + (connection.keep_alive or UNLIMITED)
            told = HOW.get(label) == "silent"
            suspect = Suspect(network, connection.voice, silence, now, until, how, told)
            self._suspect((app_id, session.devno), suspect)

    def _suspect(self, who: Who, suspect: Suspect) -> None:
        self._suspects.pop(who, None)
        self._suspects[who] = suspect
        if len(self._suspects) > MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]

    def sweep(self) -> None:
        """Called on each tick; seldom does anything."""
        now = self._clock.now
        if not self._suspects or now < self._sweep_at:
            return
        self._sweep_at = now + SWEEP_EVERY
        for who, suspect in list(self._suspects.items()):
            if suspect.how == "taken" and now >= suspect.at + ELSEWHERE:
                suspect.network.died(suspect.silence, suspect.voice)
                del self._suspects[who]
            elif now > suspect.until:
                del self._suspects[who]

    @staticmethod
    def sampled(connection: Connection, rtt: float, segments: int, retransmits: int) -> None:
        """What TCP says of it since the last time."""
        if connection.network is not None:
            connection.network.tcp(rtt, segments, retransmits)

    def acked(self, app_id: int, devnos: Sequence[int], seconds: float) -> None:
        """Devices acknowledged a push that was sent to them so long ago, all at once."""
        hub = self._find_hub(app_id)
        if hub is None:
            return
        for devno in devnos[:SAMPLE]:
            member = cast("Connection | None", hub.members.get(devno))
            if member is not None and member.network is not None:
                member.network.acked(seconds)


def _how(label: str, *, wordless: bool, waited: bool) -> str:
    """One of broker.carriers.rows.ENDS. A reset may be a phone that closes an app; where a push waited, it is what
    became of that: a NAT that has forgotten the connection, or TCP that gave up."""
    if label == "connection lost" and wordless and waited:
        return "silent"
    return HOW.get(label, TOLD)


def _last_silence(connection: Connection, session: Session, now: float) -> int:
    """The bin of the silence after which nothing came. A push that was not answered tells when it was long enough;
    else a device's heartbeat did, of which only the latest time is known: its keep-alive."""
    last_seen, promised = connection.last_seen, connection.keep_alive / 1.5 or UNLIMITED
    if session.unacked is not None and session.waiting_since >= last_seen:
        return bin_of(session.waiting_since - last_seen)
    silence = bin_of(min(now - last_seen - NOTICED, promised))
    return min(silence, connection.quiet) if connection.quiet else silence
