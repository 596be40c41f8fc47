"""Drives machines as a controller written for QEMU does, with QEMU's own client library.

usage: qmp_client.py SOURCE LEFT DESTINATION

Three QMP sockets: of a machine with a guest, of one that the guest is called back from, and of one that it moves to.
Both destinations wait with `--incoming defer`. Every command that the machines list is used at least once; the last
line printed is a JSON object that says how it went.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient

# Seconds for what comes, on a host that is busy with other things.
PATIENCE = 60.0


class Side:
    """One machine, and what was said to it."""

    def __init__(self, name: str, path: str) -> None:
        self.client = QMPClient(name)
        self.path = path
        self.used: set[str] = set()
        self.listed: set[str] = set()
        self.events = EventListener()

    async def connect(self) -> None:
        self.client.register_listener(self.events)
        await self.client.connect(self.path)
        self.listed = {entry["name"] for entry in await self.execute("query-commands")}

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        self.used.add(command)
        return await asyncio.wait_for(self.client.execute(command, arguments), PATIENCE)

    async def refuses(self, command: str, arguments: dict[str, Any] | None = None) -> str:
        try:
            answer = await self.execute(command, arguments)
        except ExecuteError as error:
            assert str(error), command
            return f"{error.error_class}: {error}"
        raise AssertionError(f"{command} was to be refused, and answered {answer}")

    async def status(self, wanted: str) -> dict[str, Any]:
        end = asyncio.get_running_loop().time() + PATIENCE
        while True:
            look: dict[str, Any] = await self.execute("query-migrate")
            if look.get("status") == wanted:
                return look
            assert look.get("status") not in ("failed", "cancelled"), look
            assert asyncio.get_running_loop().time() < end, f"it does not become {wanted}: {look}"
            await asyncio.sleep(0.005)

    async def event(self, name: str, **data: Any) -> None:
        """The next event of this name and with this data; others before it are dropped."""
        while True:
            event = await asyncio.wait_for(self.events.get(), PATIENCE)
            assert event["timestamp"]["seconds"] > 0, event
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                return

    async def listens(self) -> tuple[str, int]:
        look = await self.execute("query-migrate")
        address = look["socket-address"][0]
        assert address["type"] == "inet", look
        return address["host"], int(address["port"])


def channels(host: str, port: int) -> dict[str, Any]:
    address = {"transport": "socket", "type": "inet", "host": host, "port": str(port)}
    return {"channels": [{"channel-type": "main", "addr": address}]}


def switched_on(*names: str) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": True} for name in names]}


async def look_around(side: Side) -> None:
    """Whatever can be asked without a migration."""
    assert (await side.execute("query-version"))["qemu"]["major"] >= 10
    assert await side.execute("query-name") == {}
    assert await side.execute("query-kvm") == {"enabled": True, "present": True}
    assert (await side.execute("query-target"))["arch"]
    assert (await side.refuses("qmp_capabilities")).startswith("CommandNotFound")
    assert (await side.refuses("no-such-command")).startswith("CommandNotFound")
    side.used.remove("no-such-command")
    assert await side.execute("query-migrate") == {}
    assert "no migration" in await side.refuses("x-switchover-report")
    before = await side.execute("query-migrate-parameters")
    # What is told can be set, and changes nothing.
    await side.execute("migrate-set-parameters", before)
    assert await side.execute("query-migrate-parameters") == before
    capabilities = await side.execute("query-migrate-capabilities")
    await side.execute("migrate-set-capabilities", {"capabilities": capabilities})
    assert await side.execute("query-migrate-capabilities") == capabilities
    for command, arguments in [
        ("migrate-pause", None),
        ("migrate-recover", {"uri": "tcp:127.0.0.1:0"}),
        ("migrate-continue", {"state": "pre-switchover"}),
        ("migrate-start-postcopy", None),
        ("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True}),
        ("x-switchover-checkpoint", {"to": "/nowhere/2.image", "base": "/nowhere/1.image"}),
        ("x-switchover-reclaim", None),
    ]:
        assert (await side.refuses(command, arguments)).startswith("GenericError"), command
    assert await side.execute("migrate_cancel") == {}


async def measure(source: Side) -> None:
    """How fast the guest writes, and how fast it may."""
    await source.execute("calc-dirty-rate", {"calc-time": 100, "calc-time-unit": "millisecond"})
    while (rate := await source.execute("query-dirty-rate"))["status"] != "measured":
        await asyncio.sleep(0.01)
    assert rate["dirty-rate"] >= 0, rate
    try:
        await source.execute("set-vcpu-dirty-limit", {"dirty-rate": 64})
        assert (await source.execute("query-vcpu-dirty-limit"))[0]["limit-rate"] == 64
        assert "dirty page rate limit" in (await source.execute("query-migrate"))["blocked-reasons"][0]
    except ExecuteError as error:
        # A machine that keeps one book for all of its vCPUs.
        assert "--dirty-tracking ring" in str(error), error
    await source.execute("cancel-vcpu-dirty-limit")
    assert await source.execute("query-vcpu-dirty-limit") == []


async def stop_and_go(source: Side) -> None:
    await source.execute("stop")
    await source.event("STOP")
    assert await source.execute("query-status") == {"status": "paused", "running": False}
    await source.execute("cont")
    await source.event("RESUME")
    assert await source.execute("query-status") == {"status": "running", "running": True}


async def cancel(source: Side, left: Side) -> None:
    await left.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    await source.execute("migrate", channels(*await left.listens()))
    await source.status("active")
    assert await source.execute("migrate_cancel") == {}
    await source.event("MIGRATION", status="cancelled")
    assert (await source.execute("query-status"))["running"]


async def move(source: Side, there: Side) -> dict[str, Any]:
    """A whole migration, whose link is lost on the way and joined again somewhere else."""
    await there.execute("migrate-set-capabilities", switched_on("events", "postcopy-ram"))
    await there.execute("migrate-incoming", channels("127.0.0.1", 0))
    await there.event("MIGRATION", status="setup")
    await source.execute("migrate", channels(*await there.listens()))
    await source.event("MIGRATION", status="active")
    await source.execute("migrate-start-postcopy")
    await source.event("MIGRATION", status="pre-switchover")
    await source.execute("migrate-continue", {"state": "pre-switchover"})
    for status in ("device", "postcopy-active"):
        await source.event("MIGRATION", status=status)
    await there.event("RESUME")
    await there.status("postcopy-active")

    await source.execute("migrate-pause")
    for side in (source, there):
        await side.event("MIGRATION", status="postcopy-paused")
        paused = await side.execute("query-migrate")
        assert paused["error-desc"] and paused["x-switchover-interruptions"][0]["reason"], paused
    assert (await there.execute("query-status"))["running"]
    await there.execute("migrate-recover", {"uri": "tcp:127.0.0.1:0"})
    host, port = await there.listens()
    await source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
    await source.execute("migrate", {"uri": f"tcp:{host}:{port}", "resume": True})
    await source.event("MIGRATION", status="completed")
    await there.event("MIGRATION", status="completed")

    sent, came = await source.execute("query-migrate"), await there.execute("query-migrate")
    assert sent["ram"]["remaining"] == came["ram"]["remaining"] == 0
    assert len(came["postcopy-latency-dist"]) == 24 and came["postcopy-latency"] > 0, came
    assert {"start-ns", "end-ns", "name"} == set(came["x-switchover-phases"][0]), came
    for side, name in ((source, "source"), (there, "destination")):
        report = await side.execute("x-switchover-report")
        assert report["side"] == name and report["status"] == "completed", report
    return {"faults": sum(came["postcopy-latency-dist"]), "interruptions": came["x-switchover-interruptions"]}


async def main(paths: list[str]) -> None:
    source, left, there = (Side(name, path) for name, path in zip(("source", "left", "there"), paths, strict=True))
    for side in (source, left, there):
        await side.connect()
    for side in (source, there):
        await look_around(side)
    await stop_and_go(source)
    await measure(source)
    await source.execute("migrate-set-capabilities", switched_on("events", "postcopy-ram", "pause-before-switchover"))
    # Without rounds, and so slowly that there is something left to lose.
    slow = {"x-switchover-mode": "postcopy", "max-postcopy-bandwidth": 400_000}
    await source.execute("migrate-set-parameters", slow)
    await cancel(source, left)
    found = await move(source, there)
    for side in (source, there):
        await side.execute("quit")
        await side.event("SHUTDOWN", guest=False, reason="host-qmp-quit")
    used = source.used | there.used
    assert source.listed == there.listed == used, f"listed {source.listed ^ used} and not used, or the reverse"
    print(json.dumps({"commands": len(used), **found}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
