"""`holdfast serve`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NoReturn

import click
import orjson

from broker.carriers.catalog import Catalog
from broker.config import Config, config_options
from broker.logs import set_up_logs
from gateway.process import START_ERRORS, run_service
from gateway.server import Listening, raise_file_limit
from gateway.supervisor import Supervised, supervise


@click.command()
@click.option("--check", is_flag=True, help="Only look whether it would start with these settings.")
@config_options()
def serve(config: Config, check: bool) -> None:
    """Run the push service: gateway, broker and store in one process, or one process of a fleet around a Redis.

    Prints one JSON line with the addresses it listens on. SIGTERM and SIGINT drain and stop it, SIGHUP reads the
    certificate and the carrier profiles again. With --workers, SIGUSR2 replaces the workers one after the other, by
    those of the program and the settings as they are then.
    """
    try:
        if check:
            Catalog.read(config.carriers.directory)
            click.echo("ok")
            return
        raise_file_limit()
        if config.workers:
            raise SystemExit(supervise(config, lambda supervised: _tell_all(config, supervised)))
        set_up_logs(config.server.log_format, config.server.log_level)
        run_service(config, lambda listening: _tell(config, listening, {}))
    except START_ERRORS as error:
        _give_up(error)


def _tell_all(config: Config, supervised: Supervised) -> None:
    _tell(config, supervised.listening, {"pid": supervised.pid, "workers": supervised.workers})


def _tell(config: Config, listening: Listening, more: Mapping[str, object]) -> None:
    sys.stdout.write(orjson.dumps({**listening.as_json(config), **more}).decode() + "\n")
    sys.stdout.flush()
    if listening.demo_app is not None and listening.mqtt is not None:
        click.echo(_first_steps(listening), err=True)


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
