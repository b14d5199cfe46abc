"""`holdfast listen`: a device on the command line."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import ssl
import sys
from pathlib import Path

import click
import orjson

from clients.command_shared import PLATFORMS, read_address
from clients.device import Device, DeviceError, DeviceStopped, Push
from clients.dispatch import Dispatch
from clients.journal import JournalError


@click.command()
@click.option("--app", "app_key", envvar="HOLDFAST_APP_KEY", show_envvar=True, required=True, help="App key.")
@click.option("--device-key", envvar="HOLDFAST_DEVICE_KEY", show_envvar=True, help="The app's device key.")
@click.option(
    "--token",
    envvar="HOLDFAST_TOKEN",
    show_envvar=True,
    help="Token of this device, instead of the device key.",
)
@click.option("--id", "registration_id", help="Registration id. Default: listen- and the host's name.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65_535), help="Default: 1883, with --tls 8883.")
@click.option(
    "--server",
    "servers",
    multiple=True,
    help="[tcp|tls|ws|wss://]host[:port] instead of --host and --port; repeatable, tried in this order.",
)
@click.option(
    "--dispatch", "doors", multiple=True, help="Ask there where to connect; an HTTP API, or udp://host:port."
)
@click.option(
    "--dispatch-key",
    "keys",
    multiple=True,
    help="What holdfast dispatch key prints; answers are checked with it.",
)
@click.option("--carrier", default="", help="MCC and MNC, or a name: whose network it is on.")
@click.option("--link", default="", help="wifi, cellular, ethernet, satellite or other.")
@click.option("--tls", is_flag=True, help="Connect by TLS.")
@click.option("--ca-file", type=click.Path(exists=True, dir_okay=False), help="Certificates to trust.")
@click.option(
    "--url", callback=read_address, help="HTTP API: register there with the device key; needs --journal."
)
@click.option("--journal", type=click.Path(path_type=Path), help="File that keeps the token and what came.")
@click.option(
    "--platform",
    type=click.Choice(PLATFORMS),
    help="Be a device of this platform. Default: the one it has, else other.",
)
@click.option("--receipts", is_flag=True, help='Report each push as "shown".')
@click.option("--count", type=click.IntRange(1), help="End after so many pushes.")
def listen(
    app_key: str,
    device_key: str | None,
    token: str | None,
    registration_id: str | None,
    host: str,
    port: int | None,
    servers: tuple[str, ...],
    doors: tuple[str, ...],
    keys: tuple[str, ...],
    carrier: str,
    link: str,
    tls: bool,
    ca_file: str | None,
    url: str | None,
    journal: Path | None,
    platform: str | None,
    receipts: bool,
    count: int | None,
) -> None:
    """Be a device: print each push as one line of JSON. Ctrl-C ends it."""
    if token is None and device_key is None and journal is None:
        raise click.UsageError("give --device-key or --token")
    if token is not None and registration_id is None:
        raise click.UsageError("--token belongs to a device: give its --id")
    if url is not None and journal is None:
        raise click.UsageError("--url needs --journal, which keeps the token")
    if registration_id is None and device_key is not None:
        registration_id = f"listen-{socket.gethostname()}"
    if bool(doors) != bool(keys):
        raise click.UsageError("--dispatch and --dispatch-key belong together")
    _log_to_stderr()
    context = ssl.create_default_context(cafile=ca_file) if tls or ca_file else None
    printer = _Printer(receipts, count, platform)
    try:
        printer.device = Device(
            app_key,
            registration_id,
            on_push=printer.take,
            token=token,
            device_key=device_key,
            host=host,
            port=port or (8883 if context else 1883),
            servers=servers,
            ordered=True,
            dispatch=Dispatch(app_key, keys, random.random) if keys else None,
            doors=doors,
            link=link,
            carrier=carrier,
            tls=context,
            api=url,
            journal=journal,
            platform=platform,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        asyncio.run(printer.run())
    except (DeviceStopped, JournalError) as error:
        raise click.ClickException(str(error)) from error
    if printer.reader_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        raise SystemExit(1)


class _Printer:
    device: Device

    def __init__(self, receipts: bool, count: int | None, platform: str | None) -> None:
        self._receipts = receipts
        self._platform = platform
        self._left = count
        self.reader_gone = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.device.finish)
        async with self.device:
            await asyncio.gather(self._tell_platform(), self.device.wait())

    async def _tell_platform(self) -> None:
        """A device that an app key alone registered has none yet."""
        if self._platform is None:
            return
        try:
            await self.device.update(platform=self._platform)
        except DeviceStopped:
            pass  # `wait` says why
        except DeviceError as error:
            click.echo(f"platform refused: {error}", err=True)

    async def take(self, push: Push) -> None:
        """Prints a push; it is acknowledged after that."""
        self._print(push)
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self.device.finish()
        if self._receipts and push.recall is None:
            try:
                await self.device.receipt(push, "shown")
            except DeviceError as error:
                click.echo(f"receipt for {push.msg_id} refused: {error}", err=True)

    def _print(self, push: Push) -> None:
        content = {"msg_id": str(push.msg_id), "notification": push.notification, "message": push.message}
        others = {"override": push.override, "recall": push.recall}
        content |= {name: str(msg_id) for name, msg_id in others.items() if msg_id is not None}
        content |= {
            "override": push.override and str(push.override),
            "recall": push.recall and str(push.recall),
        }
        try:
            click.echo(orjson.dumps({name: value for name, value in content.items() if value is not None}))
        except BrokenPipeError:
            self.reader_gone = True
            self.device.finish()
            raise


class _OneLine(logging.Formatter):
    """For people: no traceback."""

    def formatException(self, ei: object) -> str:
        return ""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(message)s"))
    logger = logging.getLogger("clients")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
