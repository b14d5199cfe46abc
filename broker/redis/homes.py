"""Which node an app's ordinary topics are at home on (decision 0022)."""

from __future__ import annotations

from broker.model import NodeInfo
from broker.redis.engine import Engine
from broker.redis.keys import of_app
from broker.redis.nodes import RedisNodes
from broker.redis.scripts import load

_take_home = load("take_home")


class Homes:
    def __init__(self, engine: Engine, nodes: RedisNodes) -> None:
        self._engine = engine
        self._nodes = nodes

    async def find(self, app_id: int) -> NodeInfo | None:
        """None: this process, which takes the app on if no live node has it."""
        mine = self._nodes.number
        holder = int(await self._engine.run("GET", of_app(app_id, "home")) or 0)
        while holder != mine:
            entry = self._nodes.live.get(holder)
            if entry is not None and not entry.info.draining:
                return entry.info
            if entry is None and self._nodes.is_live(holder) and await self._nodes.refresh():
                continue  # it has just joined
            holder = await self._engine.call(_take_home, (of_app(app_id, "home"),), (holder, mine))
        return None
