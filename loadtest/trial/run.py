"""One trial from outside: check, start, enrol, play, sum up, clean up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final

from loadtest.http_pool import HttpError
from loadtest.reactor import Reactor
from loadtest.roster import Listed, Strangers, Who
from loadtest.swarms import SwarmError, Swarms
from loadtest.trial.account import Account
from loadtest.trial.conductor import Conductor, Display, processes_of
from loadtest.trial.limits import check_files, check_memory, check_ports, check_sources, raise_file_limit
from loadtest.trial.plan import Plan, TrialError
from loadtest.trial.results import Result, make_result
from loadtest.trial.sampler import Sampler
from loadtest.trial.scenarios import SCENARIOS
from loadtest.trial.senders import HttpSender, Sender, TopicSender
from loadtest.trial.target import (
    Enrolled,
    Say,
    Target,
    app_pool,
    check_handshakes,
    clean_up,
    enroll_devices,
    started,
)

OPENING_AT_ONCE: Final = 1024  # of a process: what is beyond waits, and its latency counts
PING_SHARE: Final = 0.75  # of the keep-alive
FIRST_LOOK: Final = 5.0  # seconds for what the server's /metrics says before anybody connects
BOTH_VERSIONS: Final = (4, 5)
COMPLETE, STOPPED = "complete", "stopped"


def run_trial(
    plan: Plan,
    target: Target | None,
    display: Display,
    *,
    who: Listed | Strangers | None = None,
    sources: tuple[str, ...] = (),
    tidy: bool = False,
    say: Say = lambda _: None,
) -> Result:
    """`target`: None starts a server for the trial. `who`: None registers devices. `tidy`: take back afterwards what
    was made on the target. Raises TrialError if nothing could be measured; the result of a trial that was given up
    halfway says why in `ended`."""
    check_sources(sources)
    check_files(plan.devices, plan.processes, raise_file_limit(), embedded=target is None)
    with ExitStack() as stack:
        target = stack.enter_context(started(target, say))
        if target.mqtt.tls is not None:
            check_memory(plan.devices)
        check_handshakes(target)
        near = target.is_local and not sources
        check_ports(plan.devices, plan.processes, None if near else len(sources))
        home = Path(stack.enter_context(TemporaryDirectory(prefix="holdfast-loadtest-")))
        reactor = Reactor()
        stack.callback(reactor.close)
        enrolled = _enrolled(reactor, target, plan, who, home, say)
        swarms = _swarms(reactor, enrolled.who, target, plan, None if near else list(sources), home)
        result: Result | None = None
        try:
            with swarms:
                result = _play(plan, target, enrolled, swarms, display)
        except SwarmError as error:
            if result is None:  # else it says so itself
                raise TrialError(str(error)) from error
        finally:
            if tidy:
                say("cleaning up")
                clean_up(reactor, target, enrolled)
        assert result is not None
        return result


def _enrolled(
    reactor: Reactor, target: Target, plan: Plan, who: Who | None, home: Path, say: Say
) -> Enrolled:
    if who is not None:
        return Enrolled(who)
    say(f"registering {plan.devices:,} devices")
    return enroll_devices(reactor, target, plan, home)


def _swarms(
    reactor: Reactor, who: Who, target: Target, plan: Plan, sources: list[str] | None, home: Path
) -> Swarms:
    settings: dict[str, Any] = {
        "tls": target.mqtt.tls,
        "sources": sources,
        "keep_alive": plan.keep_alive,
        "ping_interval": plan.keep_alive * PING_SHARE,
        "opening_at_once": OPENING_AT_ONCE,
        "keeps_schedule": True,
        "window": plan.window,
        "versions": (4,) if isinstance(who, Strangers) else BOTH_VERSIONS,
    }
    log = home / "devices.log"
    addresses = [target.mqtt.address]
    return Swarms(reactor, who, plan.devices, addresses, processes=plan.processes, log=log, **settings)


def _play(plan: Plan, target: Target, enrolled: Enrolled, swarms: Swarms, display: Display) -> Result:
    scenario = SCENARIOS[plan.scenario]
    with ExitStack() as stack:
        sampler = Sampler(swarms.reactor, target, processes_of(swarms))
        stack.callback(sampler.close)
        sender = _sender(plan, target, enrolled, swarms.reactor)
        if sender is not None:
            stack.callback(sender.close)
        begun = time.perf_counter()
        account = Account(begun, plan.window)
        conductor = Conductor(plan, target, swarms, account, sampler, sender, display, begun)
        sampler.sample_first(FIRST_LOOK)
        ended = COMPLETE
        with _stopping(conductor):
            try:
                scenario.play(conductor)
                conductor.finish()
            except (SwarmError, TimeoutError, HttpError) as error:
                ended = f"given up: {error}"
        return make_result(conductor, STOPPED if conductor.stopped and ended == COMPLETE else ended)


def _sender(plan: Plan, target: Target, enrolled: Enrolled, reactor: Reactor) -> Sender | None:
    """None: this scenario pushes nothing."""
    if plan.scenario in ("idle", "connect-storm"):
        return None
    if isinstance(enrolled.who, Strangers):
        return TopicSender(reactor, target.mqtt, enrolled.who, plan.payload)
    pool = app_pool(reactor, target, plan.connections)
    return HttpSender(pool, enrolled, plan.payload, everyone=target.everyone)


@contextmanager
def _stopping(conductor: Conductor) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the trial in order, with what was measured so far; a second one ends it at once."""

    def stop(number: int, _: FrameType | None) -> None:
        if conductor.stopped:
            raise KeyboardInterrupt
        conductor.stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
