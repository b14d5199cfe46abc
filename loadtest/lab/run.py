"""One run: all networks and contenders at once, the same plan of pushes for each.

    namespace of a contender's devices in a network -- TUN -- relay -- TUN -- namespace of the contender's servers

One relay process carries everything. A server has all its networks' devices, as in life; the networks that lose an
edge have servers of their own. All times are of time.monotonic(), which namespaces share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from loadtest.lab.account import Result, make_result, read_accepted, read_log
from loadtest.lab.contenders import TOPIC, device_name, make_site, phones_spec
from loadtest.lab.namespaces import Namespaces, entered
from loadtest.lab.networks import Network
from loadtest.lab.plan import PlannedPush, plan_pushes
from loadtest.lab.relay import PathPlan, RelayPlan, RelayReport
from loadtest.lab.sender import SenderSpec, SentPush
from loadtest.lab.sites import ADDRESSES, Site, SiteError
from loadtest.server import ServerError

CONNECT_LIMIT: Final = 180.0  # seconds until all devices are online for the first time
END_LIMIT: Final = 20.0  # for a process of ours to end
LEAD: Final = 1.0  # seconds between the word to begin and the beginning
LOOK: Final = 0.5
SERIALS: Final = 100_000  # of each network
MOVES: Final = 40  # public addresses of a path, at most
Say = Callable[[str], None]


class LabError(Exception):
    """The lab itself failed; the message says which part."""


@dataclass(slots=True)
class Child:
    """A process of ours that reads a line, and says nothing but lines in a file."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def end(self) -> None:
        """By the end of its input, else for sure."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class Cell:
    """One contender in one network."""

    letter: str
    network: Network
    number: int  # of the path
    plan: Sequence[PlannedPush]
    site: Site
    space: str = ""
    phones: Child | None = None

    @property
    def key(self) -> str:
        return f"{self.network.name} {self.letter}"

    def online(self) -> int:
        assert self.phones is not None
        return len({one.device for one in read_log(self.phones.text()) if one.what == "on"})


@dataclass(frozen=True, slots=True)
class Outcome:
    results: list[Result]
    relay: RelayReport
    seconds: float  # that the run took


class Run:
    """`go` once. `directory` keeps the logs."""

    def __init__(
        self, networks: Sequence[Network], letters: Sequence[str], seed: int, directory: Path, say: Say
    ) -> None:
        self._networks = networks
        self._letters = letters
        self._seed = seed
        self._directory = directory
        self._say = say
        self._cells: list[Cell] = []
        self._sites: dict[tuple[str, str], Site] = {}  # letter and name of the site
        self._children: list[Child] = []
        self._edges: list[threading.Thread] = []
        self._failure = ""  # of one of these
        self._spaces: Namespaces | None = None

    def go(self) -> Outcome:
        """Raises LabError, NamespaceError, SiteError."""
        began = time.monotonic()
        with ExitStack() as stack:
            self._spaces = stack.enter_context(Namespaces(f"blab-{os.getpid()}"))
            stack.callback(self._end)
            self._make_sites()
            relay = self._start_relay()
            self._start_servers()
            self._start_phones()
            start = self._begin(relay)
            senders = self._start_senders(start)
            self._watch(start, senders)
            report = self._end_relay(relay)
            self._end_phones()
            results = self._results(start, senders, report)
            return Outcome(results, report, time.monotonic() - began)

    # What is there

    def _make_sites(self) -> None:
        assert self._spaces is not None
        for letter in self._letters:
            for index, network in enumerate(self._networks):
                site = self._site(letter, network)
                plan = plan_pushes(network, self._seed, 1 + index * SERIALS)
                cell = Cell(letter, network, len(self._cells), plan, site)
                cell.space = self._spaces.make(f"{index}{letter}")
                self._cells.append(cell)

    def _site(self, letter: str, network: Network) -> Site:
        assert self._spaces is not None
        alone = any(event.what == "edge" for event in network.event)
        name = network.name if alone else "all"
        known = self._sites.get((letter, name))
        if known is None:
            space = self._spaces.make(f"s{len(self._sites)}{letter}")
            directory = self._directory / f"site-{name}-{letter}"
            known = make_site(letter, space, directory, 2 if alone else 1)
            self._sites[letter, name] = known
        return known

    def _start_relay(self) -> Child:
        paths = tuple(
            PathPlan(
                key=cell.key,
                network=cell.network,
                device_space=cell.space,
                server_space=cell.site.space,
                device_tun="up0",
                server_tun=f"path{cell.number}",
                public=tuple(f"10.{cell.number}.{1 + i}.1" for i in range(MOVES)),
                servers=ADDRESSES,
            )
            for cell in self._cells
        )
        relay = self._start("relay", "relay", RelayPlan(seed=self._seed, paths=paths))
        self._wait_for(lambda: relay.text().startswith("ready"), relay, 20.0)
        self._set_up_spaces()
        return relay

    def _set_up_spaces(self) -> None:
        assert self._spaces is not None
        for site in self._sites.values():
            commands = [f"addr add {address}/32 dev lo" for address in ADDRESSES]
            for cell in self._cells:
                if cell.site is site:
                    tun = f"path{cell.number}"
                    commands += [f"link set {tun} up", f"route add 10.{cell.number}.0.0/16 dev {tun}"]
            self._spaces.set_up(site.space, commands)
        for cell in self._cells:
            ours = ["addr add 192.168.0.2/32 dev up0", "link set up0 up", "route add default dev up0"]
            self._spaces.set_up(cell.space, ours)

    def _start_servers(self) -> None:
        for (letter, name), site in self._sites.items():
            self._say(f"starting the servers of {letter} ({name})")
            site.start()

    def _start_phones(self) -> None:
        for cell in self._cells:
            spec = phones_spec(cell.letter, cell.network, cell.site.access)
            cell.phones = self._start(f"phones {cell.key}", "phones", spec, cell.space)
        for cell in self._cells:
            assert cell.phones is not None
            self._wait_for(self._is_online(cell), cell.phones, CONNECT_LIMIT)

    def _is_online(self, cell: Cell) -> Callable[[], bool]:
        return lambda: cell.online() == cell.network.devices

    def _begin(self, relay: Child) -> float:
        start = time.monotonic() + LEAD
        self._write(relay, f"start {start}\n".encode())
        end = max(network.end for network in self._networks)
        self._say(f"{len(self._cells)} paths, all devices online; it takes {end / 60:.1f} minutes")
        return start

    def _start_senders(self, start: float) -> list[Child]:
        senders = []
        for (letter, name), site in self._sites.items():
            spec = SenderSpec(
                kind="mqtt" if letter == "c" else "http",
                start=start,
                pushes=tuple(self._sent(site)),
                url=site.access.url,
                app_key=site.access.app_key,
                secret=site.access.secret,
                topic=TOPIC,
            )
            senders.append(self._start(f"sender {name} {letter}", "sender", spec, site.space))
        return senders

    def _sent(self, site: Site) -> list[SentPush]:
        pushes = [
            SentPush(push.serial, push.at, device_name(cell.network, push.device), push.text)
            for cell in self._cells
            if cell.site is site
            for push in cell.plan
        ]
        return sorted(pushes, key=lambda push: push.at)

    # While it runs

    def _watch(self, start: float, senders: Sequence[Child]) -> None:
        """Until the last network's end; what happens outside of the relay, and whoever ended too early."""
        todo = sorted(self._doings(start), key=lambda one: one[0])
        end = start + max(network.end for network in self._networks)
        told = time.monotonic()
        while (now := time.monotonic()) < end:
            while todo and todo[0][0] <= now:
                self._in_background(todo.pop(0)[1])
            self._check(senders)
            if now - told > 60:
                told = now
                self._say(f"{(now - start) / 60:.0f} of {(end - start) / 60:.0f} minutes")
            time.sleep(min(LOOK, max(0.0, (todo[0][0] if todo else end) - now), end - now))
        for thread in self._edges:
            thread.join(END_LIMIT)

    def _doings(self, start: float) -> Iterator[tuple[float, Callable[[], None]]]:
        """When, and what."""
        for cell in self._cells:
            for event in cell.network.event:
                if event.what == "edge":
                    yield start + event.at, partial(cell.site.kill_edge, event.address)
                    if event.until < cell.network.end:
                        yield start + event.until, partial(cell.site.restore_edge, event.address)
                elif event.told and cell.phones is not None:
                    for at in event.times(cell.network.end):
                        yield start + at, partial(self._write, cell.phones, b"moved\n")

    def _in_background(self, work: Callable[[], None]) -> None:
        """A start may take seconds."""
        thread = threading.Thread(target=self._try, args=(work,))
        thread.start()
        self._edges.append(thread)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (LabError, SiteError, ServerError, OSError) as error:
            self._failure = str(error)

    def _check(self, senders: Sequence[Child]) -> None:
        if self._failure:
            raise LabError(self._failure)
        for child in self._children:
            status = child.process.poll()
            if status or (status == 0 and child not in senders):
                raise LabError(self._last_words(child))

    def _end_relay(self, relay: Child) -> RelayReport:
        relay.end()
        lines = relay.text().splitlines()
        if len(lines) != 2:
            raise LabError(self._last_words(relay))
        return msgspec.json.decode(lines[1], type=RelayReport)

    def _end_phones(self) -> None:
        for cell in self._cells:
            assert cell.phones is not None
            assert cell.phones.process.stdin is not None
            cell.phones.process.stdin.close()
        for cell in self._cells:
            assert cell.phones is not None
            cell.phones.end()

    def _results(self, start: float, senders: Sequence[Child], report: RelayReport) -> list[Result]:
        by_letter: dict[str, set[int]] = {letter: set() for letter in self._letters}
        for (letter, _), sender in zip(self._sites, senders, strict=True):
            by_letter[letter] |= read_accepted(sender.text()).keys()
        counts = {path.key: path.counts for path in report.paths}
        results = []
        for cell in self._cells:
            assert cell.phones is not None
            accepted = by_letter[cell.letter] & {push.serial for push in cell.plan}
            log = read_log(cell.phones.text())
            results.append(
                make_result(cell.network, cell.letter, cell.plan, accepted, log, counts[cell.key], start)
            )
        return results

    # Processes

    def _start(self, name: str, module: str, spec: msgspec.Struct, space: str | None = None) -> Child:
        out = self._directory / f"{name.replace(' ', '-')}.out"
        command = [sys.executable, "-m", f"loadtest.lab.{module}"]
        with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr, _within(space):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
        child = Child(name, process, out)
        self._children.append(child)
        self._write(child, msgspec.json.encode(spec) + b"\n")
        return child

    def _write(self, child: Child, line: bytes) -> None:
        assert child.process.stdin is not None
        try:
            child.process.stdin.write(line)
            child.process.stdin.flush()
        except BrokenPipeError as error:
            raise LabError(self._last_words(child)) from error

    def _wait_for(self, is_done: Callable[[], bool], child: Child, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not is_done():
            if child.process.poll() is not None:
                raise LabError(self._last_words(child))
            if time.monotonic() > deadline:
                raise LabError(f"not ready after {limit:g} s: {self._last_words(child)}")
            time.sleep(0.05)

    def _last_words(self, child: Child) -> str:
        said = child.out.with_suffix(".err").read_text(errors="replace")[-2000:]
        status = child.process.poll()
        return f"{child.name} {'still runs' if status is None else f'ended with {status}'}:\n{said}"

    def _end(self) -> None:
        for thread in self._edges:
            thread.join(END_LIMIT)
        for child in self._children:
            child.process.kill()
            child.end()
        for site in self._sites.values():
            site.stop()


@contextmanager
def _within(space: str | None) -> Iterator[None]:
    if space is None:
        yield
        return
    with entered(space):
        yield
