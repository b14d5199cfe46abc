"""`holdfast`: the command line.

Each package brings its own commands, named in the entry points group `holdfast.commands`; this module imports
none of them by name, so the arrows between the packages hold (decision 0003).
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Final

import click

GROUP: Final = "holdfast.commands"


class Commands(click.Group):
    """Loads a command when it is asked for: `holdfast push` does not import the server."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_entry_points())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = _entry_points().get(cmd_name)
        if point is None:
            return None
        command = point.load()
        if not isinstance(command, click.Command):
            raise AssertionError(f"{point.value} is not a click command")
        return command


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@click.command(cls=Commands)
@click.version_option(package_name="holdfast", message="holdfast %(version)s")
def main() -> None:
    """A self-hosted push service: devices hold one MQTT connection, backends push over HTTP."""


if __name__ == "__main__":
    main(prog_name="holdfast")
