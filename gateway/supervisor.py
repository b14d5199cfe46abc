"""The supervisor of workers: it forks them, restarts those that die, drains and replaces them (decision 0021).

One thread, no event loop, no connection to anything: what it does cannot fail for what makes workers fail. It has
imported all that they need and frozen it, so that they share its memory. What is to be done when, `crew.py` says;
here it is done. Each process has a channel to the supervisor, of which it notices the end: none outlives it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, NoReturn

import msgspec

from broker.config import Config, Role
from broker.logs import log_event, set_up_logs
from gateway.crew import Action, Adopted, Announce, Crew, Kill, Leave, Life, Note, Start, State
from gateway.front import LARGEST, Buried, CrewState, LastWords, Told, WorkerState, run_front
from gateway.open_apps import StartError
from gateway.ports import Port, hold_ports, release_ports, settle_ports
from gateway.process import START_ERRORS, run_service
from gateway.server import Listening, Seat

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
KILL_AFTER: Final = 3.0  # seconds past server.drain_limit
TELL_AGAIN: Final = 1.0  # seconds until the front is told again what it had no room for
TRIAL_LIMIT: Final = (
    15.0  # seconds in which a new program must show that it starts; nothing else is done meanwhile
)
MISTAKE_SIZE: Final = 500  # characters of what it says if it does not
BEQUEST: Final = "HOLDFAST_BEQUEST"  # variable: the descriptor of what the program before left to this one
LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

log = logging.getLogger(__name__)


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A process listens."""

    listening: Listening


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A process cannot start; it ends."""

    error: str


class Ending(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A worker has stopped, and this is what it counted."""

    exported: bytes


_SAID: Final = msgspec.msgpack.Decoder(Ready | Failed | Ending | Buried)


@dataclass(frozen=True, slots=True)
class Supervised:
    """What runs, once all are ready for the first time."""

    pid: int
    listening: Listening
    workers: Sequence[Mapping[str, object]]


class Bequest(msgspec.Struct, frozen=True):
    """What a supervisor leaves to the program that takes its place in the same process."""

    token: str
    admin: str
    gone: bytes
    restarts: int
    ports: dict[str, Port]
    lives: list[tuple[Adopted, int, Listening | None]]  # each with the descriptor of its channel


def supervise(config: Config, announce: Callable[[Supervised], None]) -> int:
    """Returns the exit status. Raises StartError or OSError where it cannot start or go on."""
    set_up_logs(config.server.log_format, config.server.log_level, node=config.server.node_id)
    bequest = _inherit()
    ports = hold_ports(config, bequest.ports if bequest else {})
    try:
        Supervisor(settle_ports(config, ports), ports, announce, bequest).run()
    finally:
        release_ports(ports)
    return 0


def _inherit() -> Bequest | None:
    file = os.environ.pop(BEQUEST, None)
    if file is None:
        return None
    with open(int(file), "rb") as left:
        left.seek(0)
        return msgspec.msgpack.decode(left.read(), type=Bequest)


# The supervisor


class Supervisor:
    """`ports` are closed in the processes that it starts."""

    def __init__(
        self,
        config: Config,
        ports: Mapping[str, Port],
        announce: Callable[[Supervised], None],
        bequest: Bequest | None = None,
    ) -> None:
        self._config = config
        self._ports = ports
        self._announce = announce
        self._bequest = bequest
        self._crew = Crew(config.workers + config.server.brokers, config.server.drain_limit + KILL_AFTER)
        self._channels: dict[Life, socket.socket] = {}
        self._listening: dict[Life, Listening] = {}
        self._admin = ""
        self._token = secrets.token_hex(8)  # in the names of our sockets
        self._gone = b""  # what the workers that ended had counted, for the next front
        self._mail: list[LastWords] = []  # for the front, while there is none
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._woken = socket.socketpair()
        self._told: dict[Life, CrewState] = {}  # what the fronts know

    def run(self) -> None:
        """Until it was told to stop. Raises StartError if the workers cannot be kept alive."""
        crew = self._crew
        self._listen_to_signals()
        share_memory()
        if self._bequest is None:
            self._do(crew.begin(time.monotonic()))
        else:
            self._accept(self._bequest)
        while not crew.done:
            self._tell_front()
            self._wait()
            self._reap()
            self._do(crew.tick(time.monotonic()))
        if crew.hopeless:
            raise StartError(crew.hopeless)
        log_event(log, logging.INFO, "stopped")

    def _wait(self) -> None:
        due = self._crew.next_at()
        timeout = None if due is None else max(0.0, due - time.monotonic())
        if any(self._told.get(front) != self._state() for front in self._fronts()):
            timeout = TELL_AGAIN if timeout is None else min(timeout, TELL_AGAIN)
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                for number in self._woken.recv(4096):
                    self._signalled(signal.Signals(number))
            else:
                self._hear(key.data)

    # Signals

    def _listen_to_signals(self) -> None:
        self._wakeup.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        for number in SIGNALS:
            signal.signal(number, _wake)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while the program changed

    def _signalled(self, number: signal.Signals) -> None:
        now = time.monotonic()
        match number:
            case signal.SIGTERM | signal.SIGINT:
                self._do(self._crew.stop(now))
            case signal.SIGUSR2:
                self._replace()
            case signal.SIGHUP:
                for life in self._crew.lives():
                    self._signal(life, signal.SIGHUP)
            case _:
                pass  # SIGCHLD: each turn looks for the dead

    def _signal(self, life: Life, number: signal.Signals) -> None:
        if life.pid:
            with suppress(ProcessLookupError):  # dead, and not reaped yet
                os.kill(life.pid, number)

    # What the crew wants

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Start(life):
                    self._start(life)
                case Leave(life):
                    self._signal(life, signal.SIGTERM)
                case Kill(life):
                    self._signal(life, signal.SIGKILL)
                case Announce():
                    self._announce(self._supervised())
                case Note():
                    self._note(action)

    def _note(self, note: Note) -> None:
        life = note.life
        about = {} if life is None else {"worker": self._name(life), "pid": life.pid}
        reason = {"reason": note.reason} if note.reason else {}
        log_event(log, LEVELS[note.level], note.event, **about, **reason)

    def _supervised(self) -> Supervised:
        front = self._listening[_life(self._crew.front.life)]
        workers = [_life(place.life) for place in self._crew.workers]
        listening = replace(
            self._listening[workers[0]],
            http=self._listening[workers[-1]].http,
            admin=front.admin,
            demo_app=front.demo_app,
            anonymous_app=front.anonymous_app,
        )
        return Supervised(
            os.getpid(), listening, [{"name": self._name(life), "pid": life.pid} for life in workers]
        )

    def _name(self, life: Life) -> str:
        return f"{self._config.server.node_id}-{life.number or 'front'}"

    def _role(self, life: Life) -> Role:
        """Workers have the first places, brokers beside them the last."""
        if life.place is self._crew.front or not self._config.server.brokers:
            return self._config.server.role
        return "gateway" if life.place.number <= self._config.workers else "broker"

    # Processes

    def _start(self, life: Life) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        signal.pthread_sigmask(
            signal.SIG_BLOCK, SIGNALS
        )  # else the child could wake us with a signal of its own
        life.pid = os.fork()
        if not life.pid:
            ours.close()
            self._become(life, theirs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()
        self._open_channel(life, ours)
        log_event(log, logging.INFO, "started", worker=self._name(life), pid=life.pid)

    def _open_channel(self, life: Life, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channels[life] = channel
        self._selector.register(channel, selectors.EVENT_READ, life)

    def _become(self, life: Life, channel: socket.socket) -> NoReturn:
        """The child: it never returns to what the supervisor was doing."""
        status = 1
        try:
            self._forget_parent()
            status = _run(lambda: self._serve(life, channel), channel)
        except BaseException:  # what is not caught here would go on as a second supervisor
            log.exception("ended by an error")
        finally:
            logging.shutdown()
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)

    def _forget_parent(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._selector.close()
        for held in (self._wakeup, self._woken, *self._channels.values()):
            held.close()
        release_ports(self._ports)

    def _serve(self, life: Life, channel: socket.socket) -> None:
        server = msgspec.structs.replace(self._config.server, node_id=self._name(life), role=self._role(life))
        set_up_logs(server.log_format, server.log_level, node=server.node_id)

        def tell(listening: Listening) -> None:
            _say(channel, Ready(listening))

        def bury(gone: bytes) -> None:
            _say(channel, Buried(gone))

        if life.place is self._crew.front:
            run_front(self._config, channel, tell, bury)
            return
        config = msgspec.structs.replace(self._config, server=server)
        exported = run_service(
            config, tell, Seat(self._answers_at(life), self._admin), lambda stop: _watch(channel, stop)
        )
        _say(channel, Ending(exported))

    def _answers_at(self, life: Life) -> str:
        return f"holdfast-{self._token}-{life.serial}"

    # What they say

    def _hear(self, life: Life) -> None:
        while (message := self._receive(life)) is not None:
            match _SAID.decode(zlib.decompress(message)):
                case Ready(listening):
                    self._listening[life] = listening
                    if life.place is self._crew.front:
                        self._admin = listening.admin or ""
                    self._do(self._crew.ready(life, time.monotonic()))
                case Failed(error):
                    life.error = error
                case Ending(exported):
                    self._mail.append(LastWords(life.serial, exported))
                    self._deliver()
                case Buried(gone):
                    if life is self._crew.front.life:
                        self._gone = gone

    def _receive(self, life: Life) -> bytes | None:
        """None: nothing for now, or it has closed the channel."""
        channel = self._channels.get(life)
        if channel is None:
            return None
        try:
            message = channel.recv(LARGEST)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:
            self._selector.unregister(channel)
            self._channels.pop(life).close()
        return message or None

    def _reap(self) -> None:
        for life in list(self._crew.lives()):
            pid, status = os.waitpid(life.pid, os.WNOHANG)
            if pid:
                self._hear(life)
                if (channel := self._channels.pop(life, None)) is not None:
                    self._selector.unregister(channel)
                    channel.close()
                self._listening.pop(life, None)
                if life.state is State.LEAVING:
                    log_event(log, logging.INFO, "ended", worker=self._name(life), pid=pid)
                self._do(self._crew.ended(life, _ending(status), time.monotonic()))

    # What the front is told

    def _state(self) -> CrewState:
        workers = [
            WorkerState(
                life.serial,
                self._name(life),
                life.pid,
                life.state,
                self._answers_at(life),
                self._role(life),
            )
            for place in self._crew.workers
            for life in place.lives()
        ]
        return CrewState(workers, self._crew.restarts, self._crew.stopping)

    def _fronts(self) -> list[Life]:
        """The one that answers, and in a replacement the next."""
        return [life for life in self._crew.front.lives() if life.state is not State.LEAVING]

    def _tell_front(self) -> None:
        state = self._state()
        self._told = {front: told for front, told in self._told.items() if front in self._channels}
        for front in self._fronts():
            if front not in self._told and self._gone and not self._send(front, Buried(self._gone)):
                continue
            if self._told.get(front) != state and self._send(front, state):
                self._told[front] = state
        self._deliver()

    def _deliver(self) -> None:
        """Before the front is told that they are gone: what they said last is what counts."""
        fronts = [front for front in self._fronts() if front in self._told]
        if fronts:
            mail, self._mail = self._mail, []
            for words in mail:
                for front in fronts:
                    self._send(front, words)

    def _send(self, front: Life, message: Told) -> bool:
        channel = self._channels.get(front)
        try:
            return channel is not None and channel.send(_packed(message)) > 0
        except OSError:  # it has no room for more, or is gone
            return False

    # Another program in our place

    def _replace(self) -> None:
        """All workers, by those of the program as it is installed now: a supervisor that replaced them with what it
        has in memory would have to be stopped for each upgrade."""
        if not self._crew.may_replace:
            self._do(self._crew.replace(time.monotonic()))  # it says why not
            return
        if (mistake := _try_program()) is not None:
            log_event(log, logging.ERROR, "not replaced: the program does not start", reason=mistake)
            return
        file = os.memfd_create("bequest", 0)  # it stays open in the next program
        os.write(file, msgspec.msgpack.encode(self._leave_all()))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # those that come now are for the next program
        os.environ[BEQUEST] = str(file)
        logging.shutdown()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _leave_all(self) -> Bequest:
        for file in self._files():
            os.set_inheritable(file, True)
        lives = [
            (
                Adopted(
                    life.serial,
                    self._crew.places.index(life.place),
                    life.number,
                    life.state,
                    life.since,
                    life.pid,
                ),
                channel.fileno(),
                self._listening.get(life),
            )
            for life, channel in self._channels.items()
        ]
        return Bequest(self._token, self._admin, self._gone, self._crew.restarts, dict(self._ports), lives)

    def _files(self) -> list[int]:
        """Descriptors that outlive the program."""
        channels = [channel.fileno() for channel in self._channels.values()]
        return channels + [file for port in self._ports.values() for file in port.files]

    def _accept(self, left: Bequest) -> None:
        self._token, self._admin, self._gone = left.token, left.admin, left.gone
        now = time.monotonic()
        actions = self._crew.adopt((adopted for adopted, _, _ in left.lives), left.restarts, now)
        by_serial = {life.serial: life for life in self._crew.lives()}
        for adopted, file, listening in left.lives:
            life = by_serial[adopted.serial]
            self._open_channel(life, socket.socket(fileno=file))
            if listening is not None:
                self._listening[life] = listening
        for file in self._files():
            os.set_inheritable(file, False)
        log_event(log, logging.INFO, "the program was replaced", processes=len(by_serial))
        self._do(actions)
        self._do(self._crew.replace(now))


def _try_program() -> str | None:
    """Whether the program as it is installed now could start with its settings of now; a mistake in words."""
    command = [sys.executable, *sys.orig_argv[1:], "--check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-MISTAKE_SIZE:]


def share_memory() -> None:
    """What is there before a fork stays where it is: the collector of no child looks at it, which would copy it."""
    gc.collect()
    gc.freeze()


def _run(serve: Callable[[], None], channel: socket.socket) -> int:
    try:
        serve()
    except START_ERRORS as error:
        _say(channel, Failed(str(error)))
        return 1
    return 0


def _say(channel: socket.socket, message: Ready | Failed | Ending | Buried) -> None:
    with suppress(OSError):  # the supervisor is gone; so are we, soon
        channel.send(_packed(message))


def _packed(message: object) -> bytes:
    """Metrics repeat themselves, and a message is one packet, of 200 KB at most."""
    return zlib.compress(msgspec.msgpack.encode(message), 1)


def _watch(channel: socket.socket, stop: asyncio.Event) -> None:
    """The supervisor says nothing to a worker: what comes is the end of it."""
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(channel)
        stop.set()

    loop.add_reader(channel, gone)


def _life(life: Life | None) -> Life:
    assert life is not None, "all are ready"
    return life


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _wake(_number: int, _frame: object) -> None:
    """The wakeup descriptor has it."""
