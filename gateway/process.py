"""A process that serves until it is told to stop: its signals, its start, its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Final

import uvloop

from broker.carriers.reading import CarrierError
from broker.config import Config
from broker.logs import log_event
from broker.metrics_merge import export
from broker.store import StoreError
from gateway.listeners import TlsError
from gateway.open_apps import StartError
from gateway.server import Listening, Seat, Service

START_ERRORS: Final = (CarrierError, StoreError, TlsError, StartError, OSError)
"""What a start may raise; their messages say what to do."""

log = logging.getLogger(__name__)


def run_service(
    config: Config,
    tell: Callable[[Listening], None],
    seat: Seat | None = None,
    watch: Callable[[asyncio.Event], None] | None = None,
) -> bytes:
    """Returns when it has stopped, with what it counted. `tell` is called once it listens; `watch` with what stops it
    when set. Raises one of START_ERRORS."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, tell, seat, watch))


async def _serve(
    config: Config,
    tell: Callable[[Listening], None],
    seat: Seat | None,
    watch: Callable[[asyncio.Event], None] | None,
) -> bytes:
    service = Service(config, seat)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    loop.add_signal_handler(signal.SIGUSR2, _no_workers)
    if watch is not None:
        watch(stop)
    try:
        listening = await service.open()
    except START_ERRORS:
        await service.give_up()
        raise
    tell(listening)
    await stop.wait()
    try:
        await asyncio.wait_for(service.close(), config.server.drain_limit)
    except TimeoutError:
        log_event(log, logging.WARNING, "drain limit reached", limit=config.server.drain_limit)
    log_event(log, logging.INFO, "stopped")
    return export(service.metrics)


def _no_workers() -> None:
    """The signal's default would end the process."""
    log_event(log, logging.WARNING, "SIGUSR2 replaces the workers of a supervisor; this is none")
