"""For each rule of the system, a line that keeps it, and how to break it.

The simulation must notice every one. A line stands here as it does in the source: when the source changes,
`test_mutations.py` says which entry has to follow.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNTIME = "eplb_platform.runtime"


@dataclass(frozen=True)
class Mutation:
    """One line of `module`, `line`, replaced by `broken`."""

    rule: str
    module: str
    line: str
    broken: str
    first_tried: int = 0
    """A seed that noticed when this was written: the search begins there, and goes through all seeds."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.module.rpartition('.')[2]}: {self.line.strip()}"


WRONG_TOKEN = "Never a wrong token"
STALL = "Never a stall that is not accounted for"
INTERPRETER = "The interpreter lock is a stall too"
EXCHANGE = "Device exchanges never race the model's collectives"
LAST_GOOD = "Fail to the last good map"
RECORDING = "Recording changes nothing"
STATIC = "A static map is static"
ONE_PLAN = "Every rank executes the same plan"
COST = "Cost before benefit"
PLACEMENT = "Replicas never share a rank; what stays keeps its slot"
RESIZE = "Ranks leave and join on all ranks or on none, before anything is served wrongly"
MEMORY = "Memory is bounded, and so is what lies in the store"
PAUSE = "A pause lets nothing move but what is agreed"
SHAPES = "Shapes and addresses of device tables never change"

MUTATIONS = (
    Mutation(
        WRONG_TOKEN,
        f"{RUNTIME}.gate",
        "            return self._begin() if self._boundary == self._action_at else None",
        "            return self._begin() if self._action_at is not None else None",
    ),
    Mutation(
        WRONG_TOKEN,
        f"{RUNTIME}.balancer",
        "        self._route(chunk.layers, chunk.map_after, commit.tables)",
        "        self._route(chunk.layers, chunk.map_after, commit.tables) if self._link.rank else None",
        first_tried=2,
    ),
    Mutation(
        WRONG_TOKEN,
        f"{RUNTIME}.cycle",
        "        return self._tables.with_layers(chunk.layers, even).with_layers(arrived, aim)",
        "        return self._tables.with_layers(chunk.layers, aim)",
        first_tried=66,
    ),
    Mutation(
        WRONG_TOKEN,
        f"{RUNTIME}.agreement",
        "                verdict = await self._plane.settle(key, ending)",
        "                verdict = ending",
    ),
    Mutation(
        WRONG_TOKEN,
        f"{RUNTIME}.forward_agreement",
        "        self._gate.act_at(await self._agree_on_boundary(place, not_before), action)",
        "        await self._agree_on_boundary(place, not_before); "
        "self._gate.act_at(self._gate._promise or 0, action)",
    ),
    Mutation(
        STALL,
        f"{RUNTIME}.balancer",
        "            wait = clock.now() - started",
        "            wait = 0.0",
    ),
    Mutation(
        STALL,
        f"{RUNTIME}.cycle",
        '            await self._places.agree(f"{place}/ready")',
        '            await self._places.agree(f"{place}/ready"); self._link.gate.promise(1, 0)',
        first_tried=8,
    ),
    Mutation(
        STALL,
        f"{RUNTIME}.forward_agreement",
        "            gate.release()",
        "            pass",
        first_tried=15,
    ),
    Mutation(
        INTERPRETER,
        f"{RUNTIME}.cycle",
        "            chunk.map_after.derive_tables()  #",
        "            pass  #",
    ),
    Mutation(
        EXCHANGE,
        f"{RUNTIME}.cycle",
        "            await group.prepare(chunk)",
        "            await group.prepare(chunk); group.enqueue(chunk)",
    ),
    Mutation(
        LAST_GOOD,
        "eplb_platform.migration.transfer",
        "        if len(differing):",
        "        if False:",
        first_tried=61,
    ),
    Mutation(
        LAST_GOOD,
        f"{RUNTIME}.cycle",
        "        self.wanted_epoch = self.epoch + 1",
        "        pass",
        first_tried=7,
    ),
    Mutation(
        LAST_GOOD,
        f"{RUNTIME}.cycle",
        "            await self._forward.until_executed()\n            self._count_commit(chunk, tables)",
        "            pass",
        first_tried=337,
    ),
    Mutation(
        STALL,
        f"{RUNTIME}.bounded_planner",
        "await self._clock.until(lambda: question.is_over, left)",
        "await self._clock.until(lambda: question.is_over)",
        first_tried=97,
    ),
    Mutation(
        RECORDING,
        f"{RUNTIME}.cycle",
        "        if self._rules.moves_experts and planned != self._map:",
        "        if planned != self._map:",
        first_tried=18,
    ),
    Mutation(
        RECORDING,
        "eplb_platform.heat",
        "            self._fold_layers(np.flatnonzero((old.physical_to_logical != new).any(axis=1)))",
        "            pass",
    ),
    Mutation(
        RECORDING,
        "eplb_platform.heat",
        "        return self is LoadCollection.ALL or",
        "        return True or",
    ),
    Mutation(
        RECORDING,
        f"{RUNTIME}.cycle",
        "        self._map, self._tables = chunk.map_after, tables",
        "        self._tables = tables",
    ),
    Mutation(
        RECORDING,
        f"{RUNTIME}.cycle",
        "        if self.report.chunks_committed:  #",
        "        if False:  #",
        first_tried=21,
    ),
    Mutation(
        RECORDING,
        f"{RUNTIME}.balancer",
        "            if action is not None:\n                self._execute(action)\n            if",
        "            if action is not None:\n                self._link.gate.acted()\n            if",
        first_tried=62,
    ),
    Mutation(
        MEMORY,
        "eplb_platform.migration.staging",
        "            self.slots = min(self.slots, max_bytes // self.expert_bytes)",
        "            pass",
        first_tried=35,
    ),
    Mutation(
        MEMORY,
        f"{RUNTIME}.cycle",
        "            await link.plane.forget(stale)",
        "            pass",
        first_tried=3,
    ),
    Mutation(
        PAUSE,
        f"{RUNTIME}.balancer",
        '        return "closing" if self._is_closed else "paused" if self._is_paused else self._wish_to_end',
        '        return "closing" if self._is_closed else self._wish_to_end',
        first_tried=177,
    ),
    Mutation(
        STATIC,
        f"{RUNTIME}.balancer",
        "        if not self.config.observes or self._is_paused or self._is_closed or self._background",
        "        if self._is_paused or self._is_closed or self._background",
        first_tried=12,
    ),
    Mutation(
        STATIC,
        f"{RUNTIME}.deployment",
        "            await self.places.agree(place, offer, same, timeout_s=self.timeout_s)",
        "            await self.places.agree(place, offer, max, timeout_s=self.timeout_s)",
        first_tried=45,
    ),
    Mutation(
        ONE_PLAN,
        f"{RUNTIME}.cycle",
        '            await self._places.agree("compare", fingerprint(*compared), same, '
        "timeout_s=self._timeout_s)",
        "",
        first_tried=153,
    ),
    Mutation(
        ONE_PLAN,
        f"{RUNTIME}.cycle",
        "                planned = await self._broadcast(planned)",
        "                pass",
    ),
    Mutation(
        COST,
        f"{RUNTIME}.planning",
        "        gains = (plan.balancedness > balancedness) & (balancedness < self.min_balancedness)",
        "        gains = plan.balancedness > balancedness",
        first_tried=7,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.resizing",
        "        return bool(lost or self.verdict.joining or experts_without(current, leaving))",
        "        return bool(self.verdict.joining)",
        first_tried=14,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.balancer",
        "        self._route(layers, target, self._tables_with_even(layers, target))",
        "        pass",
        first_tried=14,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.balancer",
        "        link.gate.start_anew(verdict.boundary)",
        "        link.gate.start_anew(link.gate.boundary)",
        first_tried=4,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.balancer",
        "        self._heat.skip_to(verdict.passes)",
        "        pass",
        first_tried=4,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.resize_meeting",
        "            return self._refuse(f\"rank {', '.join(map(str, needed))} did not come in time\")",
        "            pass",
        first_tried=17,
    ),
    Mutation(
        RESIZE,
        f"{RUNTIME}.record_fence",
        "                if await self._resizes.is_left_out(plane):",
        "                if False:",
        first_tried=17,
    ),
    Mutation(
        SHAPES,
        f"{RUNTIME}.balancer",
        "        self._route(range(expert_map.num_layers), expert_map, tables)\n        self.stats.invalid",
        "        self._route(range(expert_map.num_layers), expert_map, tables and "
        "RoutingTables.even(expert_map, tables.width + 1))\n        self.stats.invalid",
        first_tried=58,
    ),
    Mutation(
        SHAPES,
        "eplb_platform.migration.transfer",
        "        return parameter.detach()",
        "        return parameter.detach().clone()",
    ),
)
