"""The vendor's SDKs for Node as publishers, unmodified: `jpush-sdk`, and `jpush-async`, which knows more calls.

Their addresses are fixed, so they are given the one thing that they offer, a proxy: it leads each CONNECT to us, with
certificates for the vendor's names that node is told to trust.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
import trustme
from aiohttp import web

from broker.api.http import build_api
from broker.model import Settled
from tests.patience import PATIENCE

ROOT: Final = Path(__file__).parents[2]
DRIVER: Final = Path(__file__).parent / "jpush_node" / "driver.cjs"
MODULES: Final = Path(os.environ.get("NODE_MODULES", ROOT / ".venv/node/node_modules"))
PACKAGES: Final = ("jpush-sdk", "jpush-async")
HOSTS: Final = ("api.jpush.cn", "device.jpush.cn", "report.jpush.cn")
ALL: Final = "all"

pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="node: apt-get install nodejs"),
    pytest.mark.skipif(
        not all((MODULES / name).exists() for name in PACKAGES),
        reason=f"jpush-sdk and jpush-async: `make test` installs them, or NODE_MODULES; not in {MODULES}",
    ),
]


class Refused(Exception):
    """What the SDK told its callback."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.name, self.status = error["name"], error.get("status")
        self.code = orjson.loads(error["body"])["error"]["code"] if error.get("body") else None


class Sdk:
    """A node process that has the SDK."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, *chain: list[Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps({"chain": chain}) + b"\n")
        async with asyncio.timeout(PATIENCE):
            while not (line := await self._process.stdout.readline()).startswith(b"answer "):
                assert line, "the SDK ended"
        answer = orjson.loads(line.removeprefix(b"answer "))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer.get("result")

    async def push(self, *steps: list[Any], end: str = "send") -> int:
        return int((await self(["push"], *steps, [end]))["msg_id"])


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while block := await reader.read(65_536):
            writer.write(block)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def _proxy(port: int) -> AsyncIterator[str]:
    """An HTTP proxy that leads every CONNECT to a vendor's host to this port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        assert target in {f"{host}:443" for host in HOSTS}
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_pipe(reader, far_writer), _pipe(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
async def tls(service: Any, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """The service once more, by TLS under the vendor's names: a proxy that leads there, and whom to trust."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*HOSTS).configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    runner = web.AppRunner(build_api(service.broker), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    async with _proxy(runner.addresses[0][1]) as proxy:
        yield proxy, tmp_path / "ca.pem"
    await runner.cleanup()


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):  # it refused its options and ended
        process.kill()
    await process.wait()


Start = Callable[..., Awaitable[Sdk]]


@pytest.fixture
async def start_sdk(service: Any, tls: tuple[str, Path]) -> AsyncIterator[Start]:
    proxy, ca_file = tls
    async with AsyncExitStack() as stack:

        async def start(package: str, **options: Any) -> Sdk:
            login = {"appKey": service.app.key, "masterSecret": service.app.master_secret, "proxy": proxy}
            process = await asyncio.create_subprocess_exec(
                "node", str(DRIVER), str(MODULES / package), orjson.dumps(login | options).decode(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                env={"PATH": os.environ["PATH"], "NODE_EXTRA_CA_CERTS": str(ca_file)},
            )  # fmt: skip
            stack.push_async_callback(_end, process)
            return Sdk(process)

        yield start


@pytest.fixture(params=PACKAGES)
async def sdk(request: pytest.FixtureRequest, start_sdk: Start) -> Sdk:
    return await start_sdk(request.param)


@pytest.fixture
async def rich_sdk(start_sdk: Start) -> Sdk:
    """The one that knows more calls."""
    return await start_sdk("jpush-async")


@pytest.fixture(autouse=True)
async def devices(service: Any) -> dict[str, int]:
    return {
        name: (await service.register(name, platform=platform, alias=alias, tags=tags)).devno
        for name, platform, alias, tags in (
            ("a", "android", "ann", ["red", "big"]),
            ("b", "ios", "ann", ["red"]),
            ("c", "android", "bob", ["big"]),
        )
    }


HELLO: Final = ["setNotification", "hello"]
TO_ALL: Final = [["setPlatform", ALL], ["setAudience", ALL]]


def by(name: str, *values: str) -> dict[str, list[str]]:
    """An audience, as the SDK makes it."""
    return {"$": [name, *values]}


async def targets(service: Any, msg_id: int) -> list[int]:
    return list((await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id].targets)


def test_secrets_have_the_form_that_the_vendors_sdks_ask_for(service: Any) -> None:
    for secret in (service.app.key, service.app.master_secret):
        assert re.fullmatch("[0-9a-zA-Z]{24}", secret)


async def test_pushes_to_every_audience(service: Any, sdk: Sdk, devices: dict[str, int]) -> None:
    for platform, audience, names in (
        ([ALL], [ALL], "abc"),
        (["ios"], [ALL], "b"),
        ([ALL], [by("tag", "red")], "ab"),
        ([ALL], [by("tag", "red,big")], "abc"),
        ([ALL], [by("tag_and", "red", "big")], "a"),
        ([ALL], [by("registration_id", "a", "c")], "ac"),
        (["android", "winphone"], [by("alias", "ann", "bob"), by("tag", "big")], "ac"),
    ):
        msg_id = await sdk.push(["setPlatform", *platform], ["setAudience", *audience], HELLO)
        assert await targets(service, msg_id) == sorted(devices[name] for name in names), audience


async def test_all_that_a_push_can_say(service: Any, sdk: Sdk) -> None:
    pushed = await sdk(
        ["push"], ["setPlatform", ALL], ["setAudience", ALL],
        ["setNotification", "hello", by("ios", "ios alert", "happy", 5), by("android", "hi", "t", 1, {"k": "v"})],
        ["setMessage", "content", "title", "text", {"k": "v"}],
        ["setOptions", 77, 60, None, False, None, "key"],
        ["send"],
    )  # fmt: skip
    assert pushed["sendno"] == "77"
    await sdk.push(*TO_ALL, ["setNotification", by("winphone", "hi", "t", "page", {"k": "v"})])


async def test_a_slow_push_and_an_override(service: Any, sdk: Sdk) -> None:
    """These SDKs write a msg_id as a number: it must be one that JavaScript can write, below 2**53."""
    first = await sdk.push(*TO_ALL, HELLO)
    await sdk.push(*TO_ALL, HELLO, ["setOptions", 1, 60, first])
    record = (await service.store.find_messages(service.app.app_id, [first]))[first]
    assert len(record.recalled) == 3
    await sdk.push(*TO_ALL, HELLO, ["setOptions", 1, None, None, None, 10])


async def test_validate_sends_nothing(service: Any, sdk: Sdk) -> None:
    assert await sdk.push(*TO_ALL, HELLO, end="sendValidate") == 0
    with pytest.raises(Refused) as caught:
        await sdk.push(["setPlatform", ALL], ["setAudience", by("tag", "none")], HELLO, end="sendValidate")
    assert (caught.value.name, caught.value.status, caught.value.code) == ("APIRequestError", 400, 1011)


async def test_devices_aliases_and_tags(sdk: Sdk) -> None:
    assert await sdk(["getDeviceTagAlias", "a"]) == {"tags": ["big", "red"], "alias": "ann", "mobile": None}
    assert await sdk(["updateDeviceTagAlias", "a", "eve", False, ["new"], ["red"]]) == 200
    assert await sdk(["setMobile", "a", "13012345678"]) == 200
    changed = {"tags": ["big", "new"], "alias": "eve", "mobile": "13012345678"}
    assert await sdk(["getDeviceTagAlias", "a"]) == changed
    assert await sdk(["updateDeviceTagAlias", "a", "", True, [], []]) == 200
    assert await sdk(["getDeviceTagAlias", "a"]) == changed | {"tags": [], "alias": None}

    assert await sdk(["getTagList"]) == {"tags": ["big", "red"]}
    assert await sdk(["addRemoveDevicesFromTag", "red", ["a"], ["b"]]) == 200
    assert await sdk(["isDeviceInTag", "red", "a"]) == {"result": True}
    assert await sdk(["isDeviceInTag", "red", "b"]) == {"result": False}
    assert await sdk(["deleteTag", "big", "android"]) == 200
    assert await sdk(["deleteTag", "red", None]) == 200
    assert await sdk(["getTagList"]) == {"tags": []}

    assert await sdk(["getAliasDeviceList", "bob", None]) == {"registration_ids": ["c"]}
    assert await sdk(["getAliasDeviceList", "bob", "ios"]) == {"registration_ids": []}
    assert await sdk(["deleteAlias", "bob", "android"]) == 200
    assert await sdk(["deleteAlias", "ann", None]) == 200
    assert await sdk(["getAliasDeviceList", "bob", None]) == {"registration_ids": []}


async def test_reports(service: Any, sdk: Sdk, devices: dict[str, int]) -> None:
    msg_id = await sdk.push(*TO_ALL, HELLO)
    await service.store.settle(
        [Settled(service.app.app_id, msg_id, broadcast=False, delivered=[devices["a"]])]
    )
    [row] = await sdk(["getReportReceiveds", str(msg_id)])
    assert (row["msg_id"], row["android_received"]) == (str(msg_id), 1)
    [row] = await sdk(["getReportMessages", str(msg_id)])
    assert str(row["msg_id"]) == str(msg_id)
    users = await sdk(["getReportUsers", "DAY", "2027-01-14", 2])
    assert (users["time_unit"], len(users["items"])) == ("DAY", 2)


PUSH_ALL: Final = [["push"], *TO_ALL, HELLO]
WEEKLY: Final = ["2027-08-07 12:00:00", "2027-08-30 12:00:00", "12:00:00", "week", 2, ["wed", "fri"]]


async def test_schedules(sdk: Sdk) -> None:
    single = await sdk(*PUSH_ALL, ["setSingleSchedule", "2027-08-08 18:00:00"], ["setSchedule", "once", True])
    weekly = await sdk(*PUSH_ALL, ["setPeriodicalSchedule", *WEEKLY], ["setSchedule", "weekly", True])
    assert (single["name"], weekly["name"]) == ("once", "weekly")
    found = await sdk(["getSchedule", weekly["schedule_id"]])
    assert found["trigger"]["periodical"]["point"] == ["wed", "fri"]
    listed = await sdk(["getScheduleList", 1])
    assert (listed["total_count"], listed["page"]) == (2, 1)
    assert await sdk(["delSchedule", single["schedule_id"]]) == 200
    with pytest.raises(Refused) as caught:
        await sdk(["getSchedule", single["schedule_id"]])
    assert (caught.value.status, caught.value.code) == (404, 8104)


async def test_errors_are_the_sdks_own(service: Any, sdk: Sdk, start_sdk: Start) -> None:
    with pytest.raises(Refused) as caught:
        await sdk(["getDeviceTagAlias", "nobody"])
    assert (caught.value.name, caught.value.status, caught.value.code) == ("APIRequestError", 400, 7002)
    stranger = await start_sdk("jpush-sdk", masterSecret="0" * 24)
    with pytest.raises(Refused) as caught:
        await stranger.push(*TO_ALL, HELLO)
    assert (caught.value.status, caught.value.code) == (401, 1004)


# What only jpush-async knows


async def test_cids_and_batches(service: Any, rich_sdk: Sdk) -> None:
    assert len((await rich_sdk(["getCid", 3, "push"]))["cidlist"]) == 3
    singles = [{"platform": ALL, "target": name, "notification": {"alert": "hello"}} for name in "ab"]
    results = await rich_sdk(["batchPushByRegid", singles])
    assert [await targets(service, int(row["msg_id"])) for row in results.values()] == [[0], [1]]
    singles = [{"platform": ALL, "target": "ann", "notification": {"alert": "hello"}}]
    [row] = (await rich_sdk(["batchPushByAlias", singles])).values()
    assert await targets(service, int(row["msg_id"])) == [0, 1]


async def test_schedules_are_changed(rich_sdk: Sdk) -> None:
    """jpush-sdk has the call too, and an error of its own in it."""
    sdk = rich_sdk
    single = await sdk(*PUSH_ALL, ["setSingleSchedule", "2027-08-08 18:00:00"], ["setSchedule", "once", True])
    weekly = await sdk(*PUSH_ALL, ["setPeriodicalSchedule", *WEEKLY], ["setSchedule", "weekly", True])
    later = ["setSingleSchedule", "2027-08-10 20:00:00"]
    await sdk(["push"], later, ["updateSchedule", single["schedule_id"], None, None])
    found = await sdk(["getSchedule", single["schedule_id"]])
    assert (found["name"], found["trigger"]["single"]["time"]) == ("once", "2027-08-10 20:00:00")
    rarer = ["setPeriodicalSchedule", *WEEKLY[:4], 3, ["wed", "sun"]]
    await sdk(["push"], rarer, ["updateSchedule", weekly["schedule_id"], "other", False])
    found = await sdk(["getSchedule", weekly["schedule_id"]])
    assert (found["name"], found["enabled"]) == ("other", False)
    assert found["trigger"]["periodical"]["frequency"] == 3


async def test_detailed_reports_and_status(rich_sdk: Sdk) -> None:
    msg_id = await rich_sdk.push(["setPlatform", ALL], ["setAudience", by("tag_not", "red")], HELLO)
    [row] = await rich_sdk(["getReportReceivedDetail", str(msg_id)])
    assert row["target"] == 1
    [row] = await rich_sdk(["getReportMessagesDetail", str(msg_id)])
    assert str(row["msg_id"]) == str(msg_id)
    for number in (msg_id, str(msg_id)):
        states = await rich_sdk(["getReportStatusMessage", number, ["a", "c", "x"], None])
        assert states == {"a": {"status": 3}, "c": {"status": 1, "state": "pending"}, "x": {"status": 2}}
    assert await rich_sdk(["getDeviceStatus", ["a", "x"]]) == {"a": {"online": False}}


async def test_a_group(service: Any, start_sdk: Start) -> None:
    group = await service.broker.groups.create(orjson.dumps({"name": "all", "apps": [service.app.key]}))
    sdk = await start_sdk("jpush-async", appKey=group.key, masterSecret=group.secret, isGroup=True)
    results = await sdk(*PUSH_ALL, ["send"])
    assert results.keys() == {"group_msgid", service.app.key}
    assert len(await targets(service, int(results[service.app.key]["msg_id"]))) == 3
