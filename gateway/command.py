"""`holdfast serve`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import NoReturn

import click
import orjson
import uvloop

from broker.config import Config, config_options
from broker.logs import log_event, set_up_logs
from broker.store import StoreError
from gateway.carriers import CarrierError
from gateway.listeners import TlsError
from gateway.server import Listening, Service, StartError

log = logging.getLogger(__name__)


@click.command()
@config_options()
def serve(config: Config) -> None:
    """Run the push service: gateway, broker and store in one process.

    Prints one JSON line with the addresses it listens on. SIGTERM and SIGINT drain and stop it, SIGHUP reads the
    certificate again.
    """
    set_up_logs(config.server.log_format, config.server.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: Config) -> None:
    try:
        service = Service(config)
    except CarrierError as error:
        _give_up(error)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload_certificate)
    try:
        listening = await service.open()
    except (StoreError, TlsError, StartError, OSError) as error:
        _give_up(error)
    sys.stdout.write(orjson.dumps(listening.as_json(config)).decode() + "\n")
    sys.stdout.flush()
    if listening.demo_app is not None:
        click.echo(_first_steps(listening), err=True)
    await stop.wait()
    try:
        await asyncio.wait_for(service.close(), config.server.drain_limit)
    except TimeoutError:
        log_event(log, logging.WARNING, "drain limit reached", limit=config.server.drain_limit)
    log_event(log, logging.INFO, "stopped")


def _give_up(error: Exception) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    raise SystemExit(1)


def _first_steps(listening: Listening) -> str:
    """What to paste into two other terminals."""
    app = listening.demo_app
    assert app is not None
    assert listening.mqtt is not None
    host, port = listening.mqtt.rsplit(":", 1)
    url = f"http://{listening.http}"
    push = '{"platform":"all","audience":{"registration_id":["phone-1"]},"notification":{"alert":"Hello"}}'
    device = f"--app {app.key} --device-key {app.device_key} --id phone-1"
    publisher = f"--app {app.key} --secret {app.master_secret} --registration-id phone-1"
    return f"""\
Receive pushes as the device phone-1 (either line):
  holdfast listen {device} --host {host} --port {port}
  mosquitto_sub -h {host} -p {port} -i phone-1 -u {app.key} -P {app.device_key} -t push -q 1
Send a push (either line):
  holdfast push --url {url} {publisher} 'Hello'
  curl -u {app.key}:{app.master_secret} {url}/v3/push -d '{push}'
Metrics: http://{listening.admin}/metrics"""
