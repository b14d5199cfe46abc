"""`holdfast-loadtest`: the flags of a trial, what they may not be together, and what is written at the end.

Exit status: 0; 1 if a threshold was missed; 2 for a wrong command line; 3 if the trial could not be run, or not to
its end; 130 if somebody stopped it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from loadtest.roster import Listed, Strangers
from loadtest.trial.limits import choose_processes, cores, raise_file_limit
from loadtest.trial.page import make_page
from loadtest.trial.plan import Plan, TrialError
from loadtest.trial.progress import display
from loadtest.trial.results import Result, read_result, write_result
from loadtest.trial.run import COMPLETE, STOPPED, run_trial
from loadtest.trial.sampler import check_metrics
from loadtest.trial.scenarios import SCENARIOS
from loadtest.trial.summary import summarize
from loadtest.trial.target import Login, Target, read_http, read_mqtt, read_tokens, trusting
from loadtest.trial.thresholds import judge, read_thresholds
from loadtest.wires import Endpoint, Tls, why_of

MISSED, CANNOT, INTERRUPTED = 1, 3, 130
PAYLOAD_LEAST: Final = 80  # bytes: a msg_id, the frame and a serial
PAYLOAD_MOST: Final = 2048  # what Holdfast takes of a push
_T = TypeVar("_T")

FILE: Final = click.Path(path_type=Path, dir_okay=False)
EXISTING: Final = click.Path(path_type=Path, dir_okay=False, exists=True)
POSITIVE: Final = click.FloatRange(min=0, min_open=True)
DEFAULTS: Final = Plan("")


class CannotRun(click.ClickException):
    exit_code = CANNOT


def _reads(read: Callable[[str], _T]) -> Callable[[click.Context, click.Parameter, str | None], _T | None]:
    """A callback: what raises ValueError is a wrong command line."""

    def callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> _T | None:
        try:
            return None if value is None else read(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _read_api(text: str) -> Endpoint:
    endpoint, path = read_http(text)
    if path != "/":
        raise ValueError(f"{text}: the API has no path")
    return endpoint


@click.group()
def main() -> None:
    """Load tests of a push service, or of any MQTT broker: docs/loadtest.md."""


@main.command()
def scenarios() -> None:
    """What can be run."""
    for name, scenario in SCENARIOS.items():
        where = f" Not with --foreign: {scenario.why_not_foreign}." if scenario.why_not_foreign else ""
        rate = f" --rate: {scenario.rate_of} a second ({scenario.rate:g})." if scenario.rate_of else ""
        click.echo(f"{name}\n    {scenario.what}{rate}{where}")


@main.command()
@click.argument("scenario", type=click.Choice(list(SCENARIOS)))
@click.option(
    "--target",
    "mqtt",
    callback=_reads(read_mqtt),
    metavar="mqtt[s]://HOST:PORT",
    help="Where devices connect. Without it a server is started for the trial, and removed.",
)
@click.option("--http", callback=_reads(_read_api), metavar="http[s]://HOST:PORT", help="Holdfast's API.")
@click.option(
    "--cafile", type=EXISTING, help="Authorities that certificates are of, in PEM, instead of the system's."
)
@click.option("--insecure", is_flag=True, help="Check no certificate.")
@click.option("--app", "app_key", envvar="HOLDFAST_APP_KEY", show_envvar=True, help="App key.")
@click.option("--secret", envvar="HOLDFAST_MASTER_SECRET", show_envvar=True, help="Master secret of the app.")
@click.option("--foreign", is_flag=True, help="The target is another MQTT broker than Holdfast.")
@click.option("--username", help="Of all devices and the publisher, with --foreign.")
@click.option("--password", help="The same.")
@click.option("--devices", type=click.IntRange(min=1), default=DEFAULTS.devices, show_default=True)
@click.option("--rate", type=POSITIVE, help="A second; of what, `holdfast-loadtest scenarios` says.")
@click.option(
    "--duration", "seconds", type=POSITIVE, default=DEFAULTS.seconds, show_default=True, help="Seconds."
)
@click.option(
    "--connect-rate", type=POSITIVE, default=DEFAULTS.connect_rate, show_default=True, help="A second."
)
@click.option("--processes", type=click.IntRange(min=1), help="That play devices. By default as many as fit.")
@click.option(
    "--keep-alive",
    type=click.IntRange(2, 65_535),
    default=DEFAULTS.keep_alive,
    show_default=True,
    help="Seconds.",
)
@click.option(
    "--patience",
    type=POSITIVE,
    default=DEFAULTS.patience,
    show_default=True,
    help="Seconds after which what has not come is lost.",
)
@click.option(
    "--payload",
    type=click.IntRange(PAYLOAD_LEAST, PAYLOAD_MOST),
    default=DEFAULTS.payload,
    show_default=True,
    help="Bytes of a push, as devices get it.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1),
    default=DEFAULTS.connections,
    show_default=True,
    help="Of the publisher, over HTTP.",
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=DEFAULTS.waiting,
    show_default=True,
    help="Pushes for each device of offline-backlog.",
)
@click.option(
    "--churn",
    type=click.FloatRange(0, 60),
    default=DEFAULTS.churn,
    show_default=True,
    help="Share of the devices that go away in a minute of mixed-day.",
)
@click.option(
    "--receipts",
    type=click.FloatRange(0, 1),
    default=DEFAULTS.receipts,
    show_default=True,
    help="For each push of mixed-day.",
)
@click.option(
    "--first-device",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the first device: apart where several of these run against one app.",
)
@click.option(
    "--tokens", type=EXISTING, help="Devices that exist: a registration id and a token in each line."
)
@click.option(
    "--everyone",
    is_flag=True,
    help="A broadcast is for all devices of the app, real ones too, and not only for those of the trial.",
)
@click.option("--source", "sources", multiple=True, help="Address to connect from; may be repeated.")
@click.option(
    "--server-pid", "pid", type=click.IntRange(min=1), help="Of a server on this machine, to watch it."
)
@click.option(
    "--metrics",
    callback=_reads(read_http),
    metavar="http[s]://HOST:PORT/metrics",
    help="Of the server, to watch it.",
)
@click.option("--clean-up", is_flag=True, help="Revoke tokens and delete tags afterwards.")
@click.option("--json", "json_file", type=FILE, help="Write the result there.")
@click.option("--html", "html_file", type=FILE, help="Write a page with plots there.")
@click.option("--thresholds", type=EXISTING, help="TOML; a miss makes the exit status 1.")
@click.pass_context
def run(context: click.Context, /, **flags: Any) -> None:
    """Run SCENARIO, show how it goes, and say what came of it."""
    wanted = _wanted(flags["thresholds"], flags["scenario"])
    target, who = _read_target(flags)
    plan = _read_plan(flags)
    try:
        with display(plan.scenario) as shown:
            result = run_trial(
                plan,
                target,
                shown,
                who=who,
                sources=flags["sources"],
                tidy=flags["clean_up"],
                say=lambda text: click.echo(text, err=True),
            )
    except TrialError as error:
        raise CannotRun(str(error)) from error
    except KeyboardInterrupt:
        context.exit(INTERRUPTED)
    result = msgspec.structs.replace(result, verdicts=judge(result, wanted))
    _write(result, flags["json_file"], flags["html_file"])
    click.echo(summarize(result))
    context.exit(exit_status(result))


@main.command()
@click.argument("result_file", type=EXISTING, metavar="JSON")
@click.option("--html", "html_file", type=FILE, help="Write a page with plots there.")
@click.option("--thresholds", type=EXISTING, help="TOML; a miss makes the exit status 1.")
@click.pass_context
def show(context: click.Context, result_file: Path, html_file: Path | None, thresholds: Path | None) -> None:
    """Show the result in JSON again, perhaps against other thresholds."""
    try:
        result = read_result(result_file.read_bytes())
    except ValueError as error:
        raise click.UsageError(f"{result_file}: not a result of this version: {error}") from error
    if thresholds is not None:
        wanted = _wanted(thresholds, result.scenario)
        result = msgspec.structs.replace(result, verdicts=judge(result, wanted))
    _write(result, None, html_file)
    click.echo(summarize(result))
    context.exit(exit_status(result))


def exit_status(result: Result) -> int:
    if result.ended == STOPPED:
        return INTERRUPTED
    if result.ended != COMPLETE:
        return CANNOT
    return 0 if all(verdict.met for verdict in result.verdicts) else MISSED


def _wanted(file: Path | None, scenario: str) -> dict[str, float]:
    try:
        return {} if file is None else read_thresholds(file, scenario)
    except ValueError as error:
        raise click.UsageError(f"--thresholds: {error}") from error


def _write(result: Result, json_file: Path | None, html_file: Path | None) -> None:
    try:
        if json_file is not None:
            json_file.write_bytes(write_result(result))
        if html_file is not None:
            html_file.write_text(make_page(result), encoding="utf-8")
    except OSError as error:
        raise CannotRun(str(error)) from error


# Flags


def _read_plan(flags: dict[str, Any]) -> Plan:
    scenario = SCENARIOS[flags["scenario"]]
    if flags["rate"] is not None and not scenario.rate_of:
        raise click.UsageError(f"--rate: {flags['scenario']} pushes nothing")
    plan = Plan(
        scenario=flags["scenario"],
        rate=flags["rate"] or scenario.rate,
        processes=flags["processes"] or choose_processes(flags["devices"], raise_file_limit(), cores()),
        **{
            name: flags[name]
            for name in (
                "devices",
                "seconds",
                "connect_rate",
                "keep_alive",
                "patience",
                "payload",
                "first_device",
                "connections",
                "waiting",
                "churn",
                "receipts",
            )
        },
    )
    if plan.processes > plan.devices:
        raise click.UsageError(f"--processes {plan.processes}: more than the {plan.devices} devices")
    return replace(plan, window=max(1.0, plan.seconds // WINDOWS_MOST))


WINDOWS_MOST: Final = 600  # of a report


def _read_target(flags: dict[str, Any]) -> tuple[Target | None, Listed | Strangers | None]:
    """And who the devices are, if that is known already."""
    if flags["mqtt"] is None:
        _refuse_with("without --target a server is started, which needs none of", flags, _OF_A_TARGET)
        return None, None
    flags = {**flags, **_read_trust(flags)}
    watched = {"pid": _read_pid(flags["pid"]), "metrics": flags["metrics"]}
    if flags["foreign"]:
        target = Target("mqtt", flags["mqtt"], **watched)
        who: Listed | Strangers | None = _read_strangers(flags)
    else:
        target, who = _read_holdfast(flags, watched)
    if target.metrics is not None and (why := check_metrics(*target.metrics)):
        raise CannotRun(f"--metrics: {why}")
    return target, who


_OF_A_TARGET: Final = (
    "http",
    "cafile",
    "insecure",
    "foreign",
    "username",
    "password",
    "tokens",
    "everyone",
    "sources",
    "pid",
    "metrics",
    "clean_up",
)
_OF_HOLDFAST: Final = ("http", "tokens", "everyone", "clean_up")
_NAMES: Final = {"sources": "--source", "pid": "--server-pid"}


def _refuse_with(why: str, flags: dict[str, Any], names: tuple[str, ...]) -> None:
    given = [_NAMES.get(name, "--" + name.replace("_", "-")) for name in names if flags[name]]
    if given:
        raise click.UsageError(f"{', '.join(given)}: {why} these")


def _read_trust(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that are addresses, with what is to be thought of certificates there."""
    cafile, insecure = flags["cafile"], flags["insecure"]
    if cafile and insecure:
        raise click.UsageError("--cafile: --insecure checks no certificate")
    if cafile is not None:
        try:
            Tls("", str(cafile)).context()
        except OSError as error:
            raise click.UsageError(
                f"--cafile {cafile}: has no certificates in PEM: {why_of(error)}"
            ) from error

    def trust(endpoint: Endpoint) -> Endpoint:
        return trusting(endpoint, cafile, insecure=insecure)

    http, metrics = flags["http"], flags["metrics"]
    told = {
        "mqtt": trust(flags["mqtt"]),
        "http": http and trust(http),
        "metrics": metrics and (trust(metrics[0]), metrics[1]),
    }
    if (cafile or insecure) and told == {name: flags[name] for name in told}:
        raise click.UsageError("--cafile, --insecure: no address is one of TLS, such as mqtts://HOST")
    return told


def _read_pid(pid: int | None) -> int | None:
    if pid is not None and not Path(f"/proc/{pid}").exists():
        raise click.UsageError(f"--server-pid {pid}: there is no such process")
    return pid


def _read_strangers(flags: dict[str, Any]) -> Strangers:
    _refuse_with("another broker has none of", flags, _OF_HOLDFAST)
    why = SCENARIOS[flags["scenario"]].why_not_foreign
    if why:
        raise click.UsageError(f"{flags['scenario']} cannot be run with --foreign: {why}")
    if flags["password"] and not flags["username"]:
        raise click.UsageError("--password needs --username")
    return Strangers(flags["username"], flags["password"], flags["first_device"])


def _read_holdfast(flags: dict[str, Any], watched: dict[str, Any]) -> tuple[Target, Listed | None]:
    _refuse_with(
        "devices of Holdfast have tokens; only --foreign brokers need", flags, ("username", "password")
    )
    needed = {"--http": flags["http"], "--app": flags["app_key"], "--secret": flags["secret"]}
    if missing := [flag for flag, value in needed.items() if not value]:
        raise click.UsageError(
            f"--target is a Holdfast, which needs {', '.join(missing)}; another broker needs --foreign"
        )
    listed = None
    if flags["tokens"] is not None:
        listed = _read_listed(flags)
    login = Login(flags["app_key"], flags["secret"])
    target = Target("holdfast", flags["mqtt"], flags["http"], login, everyone=flags["everyone"], **watched)
    return target, listed


def _read_listed(flags: dict[str, Any]) -> Listed:
    if flags["scenario"] in ("tags", "mixed-day"):
        raise click.UsageError(
            f"--tokens: {flags['scenario']} needs devices with its own tags: let it register them"
        )
    if flags["scenario"] == "broadcast" and not flags["everyone"]:
        raise click.UsageError("--tokens: a broadcast to devices without tags of their own needs --everyone")
    try:
        return read_tokens(flags["tokens"], flags["app_key"], flags["devices"])
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--tokens: {error}") from error
