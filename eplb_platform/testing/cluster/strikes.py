"""How each fault of a scenario comes: what it does to a simulation, and to the rank that it strikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from eplb_platform.testing.cluster.membership import Wish
from eplb_platform.testing.cluster.rank import SimulatedRank
from eplb_platform.testing.cluster.scenario import MEETINGS, PLANNER_FAULTS, RESIZE_DEATHS, TIMEOUT_S

if TYPE_CHECKING:
    from eplb_platform.testing.cluster.simulation import Simulation

Strike: TypeAlias = Callable[["Simulation", SimulatedRank], None]
ResizeStrike: TypeAlias = Callable[["Simulation", SimulatedRank, str], None]
"""Called with the kind of the fault too."""


def _planner_fault(kind: str) -> Strike:
    def strike(simulation: Simulation, rank: SimulatedRank) -> None:
        simulation.planning_rank.planner.fault = kind
        simulation.is_permanent |= kind == "planner never answers"

    return strike


def _record_fault(kind: str) -> Strike:
    def strike(simulation: Simulation, rank: SimulatedRank) -> None:
        simulation.planning_rank.recorder.fault = kind

    return strike


def _group_error(operation: str) -> Strike:
    def strike(simulation: Simulation, rank: SimulatedRank) -> None:
        rank.group.faults.error_in[operation] = "injected"

    return strike


def _nothing(simulation: Simulation, rank: SimulatedRank) -> None:
    """The place where it strikes does the rest."""


def _slow_rank(simulation: Simulation, rank: SimulatedRank) -> None:
    slowness = simulation.engine.slowness
    slowness[rank.rank] = 100.0
    simulation.later(lambda: slowness.__setitem__(rank.rank, 1.0), 200)


def _weather(
    is_everywhere: bool, *, slowness: float = 1.0, loss: float = 0.0, is_gone: bool = False, steps: float = 8
) -> Strike:
    def strike(simulation: Simulation, rank: SimulatedRank) -> None:
        affected = simulation.ranks if is_everywhere else [rank]
        for one in affected:
            one.weather.slowness, one.weather.loss, one.weather.is_gone = slowness, loss, is_gone

        def clear() -> None:
            for one in affected:
                one.weather.slowness, one.weather.loss, one.weather.is_gone = 1.0, 0.0, False

        simulation.later(clear, steps)

    return strike


def _freeze(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.freeze(simulation.random.choice((0.1, 1.0, 6.0)) * TIMEOUT_S)


def _jump(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.jump(simulation.random.choice((0.5, 3.0, 1000.0)) * TIMEOUT_S)


def _flip_plan(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.group.faults.flip_plan = True


def _corrupt(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.memory.flip_next = True


def _never_finishes(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.group.faults.never_finishes.add("fetch")


def _idle(simulation: Simulation, rank: SimulatedRank) -> None:
    simulation.engine.idle_s = simulation.random.choice((0.5, 3.0, 20.0)) * TIMEOUT_S


def _pause(simulation: Simulation, rank: SimulatedRank) -> None:
    for one in simulation.ranks:
        one.note_pause()
        one.balancer.pause()
        simulation.later(one.balancer.resume, 15)


def _pause_one(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.note_pause()
    rank.balancer.pause()
    simulation.later(rank.balancer.resume, 15)


def _rebalance(simulation: Simulation, rank: SimulatedRank) -> None:
    for one in simulation.ranks:
        one.balancer.rebalance_now()


def _rebalance_one(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.balancer.rebalance_now()


def _die(simulation: Simulation, rank: SimulatedRank) -> None:
    rank.die()
    simulation.is_permanent = True


def _ranks_leave(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    """Now and then too many."""
    membership, draw = simulation.membership, simulation.random
    most = max(1, len(membership.active) - membership.room)
    leaving = draw.sample(sorted(membership.active), min(draw.randint(1, most), len(membership.active) - 1))
    if leaving:
        stay = tuple(sorted(membership.active - set(leaving)))
        simulation.engine.inject(kind, rank.rank)
        membership.planned = Wish(stay, draw.choice((None, ())), kind)


def _ranks_join(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    """Those that left, and new processes in place of those that ended."""
    if joining := _draw_joining(simulation):
        _plan_change(simulation, joining, [], kind)


def _ranks_change_places(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    """As many leave as join, or nearly."""
    membership, draw = simulation.membership, simulation.random
    if joining := _draw_joining(simulation):
        most = min(len(membership.active) - 1, len(membership.active) + len(joining) - membership.room)
        leaving = draw.sample(sorted(membership.active), draw.randint(0, max(0, most)))
        _plan_change(simulation, joining, leaving, kind)


def _draw_joining(simulation: Simulation) -> list[int]:
    """Some of the ranks that are away; none where nobody can join."""
    membership, draw = simulation.membership, simulation.random
    away = sorted(set(range(simulation.scenario.num_ranks)) - membership.active)
    if not away or membership.is_broken:
        return []
    return draw.sample(away, draw.randint(1, len(away)))


def _plan_change(simulation: Simulation, joining: list[int], leaving: list[int], kind: str) -> None:
    membership, draw = simulation.membership, simulation.random
    for one in joining:
        if simulation.ranks[one].ending:
            simulation.restart(one)
    simulation.engine.inject(kind, joining[0])
    active = membership.active - set(leaving) | set(joining)
    membership.planned = Wish(tuple(sorted(active)), draw.choice((None, ())), kind)


def _die_in(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    membership = simulation.membership
    if rank.ending or len(membership.serving) < 2:
        return
    membership.replaces_the_dead = kind != "rank dead, others go on"
    simulation.engine.inject(kind, rank.rank)
    rank.die()


def _taken_for_dead(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    """It only slept; when it wakes, the others go on without it."""
    membership = simulation.membership
    if rank.rank not in membership.serving or len(membership.active) <= max(1, membership.room):
        return
    simulation.engine.inject(kind, rank.rank)
    stay = tuple(sorted(membership.active - {rank.rank}))
    dead = simulation.random.choice((None, (rank.rank,)))
    membership.planned = Wish(stay, dead, kind, on_begin=lambda: rank.freeze(6 * TIMEOUT_S))


def _dies_in_resize(simulation: Simulation, rank: SimulatedRank, kind: str) -> None:
    """In the next one, which comes soon."""
    draw = simulation.random
    rank.dies_at, rank.death, rank.places_before_death = RESIZE_DEATHS[kind], kind, draw.randrange(3)
    simulation.membership.replaces_the_dead = draw.random() < 0.5
    if simulation.membership.planned is None:
        change = draw.choice((_ranks_leave, _ranks_join))
        change(simulation, rank, "ranks leave" if change is _ranks_leave else "ranks join")


def _shut_down(simulation: Simulation, rank: SimulatedRank) -> None:
    """All ranks end after the next pass: some may wait for it already."""
    if simulation.engine.last_pass is None:
        simulation.engine.last_pass = simulation.engine.step + 1


def _meeting(kind: str) -> Strike:
    return lambda simulation, rank: simulation.meet(kind, rank)


RESIZE_STRIKES: dict[str, ResizeStrike] = {
    "ranks leave": _ranks_leave,
    "ranks join": _ranks_join,
    "ranks leave while others join": _ranks_change_places,
    "rank dead, others go on": _die_in,
    "rank dead, a new process comes": _die_in,
    "rank taken for dead": _taken_for_dead,
    **dict.fromkeys(RESIZE_DEATHS, _dies_in_resize),
}
STRIKES: dict[str, Strike] = {
    **{kind: _planner_fault(kind) for kind in (*PLANNER_FAULTS, "planner never answers")},
    **{kind: _record_fault(kind) for kind in ("full disk", "read-only folder")},
    **{f"error in {name}": _group_error(name) for name in ("fetch", "sum", "broadcast", "rebuild")},
    "exception in a stage": _nothing,
    "exception in a stage of all ranks": _nothing,
    "slow rank": _slow_rank,
    "slow background": _weather(False, slowness=100, steps=30),
    "slow control plane": _weather(False, slowness=20),
    "slow control plane everywhere": _weather(True, slowness=20),
    "lost messages": _weather(False, loss=0.1),
    "lost messages everywhere": _weather(True, loss=0.02),
    "store gone": _weather(False, is_gone=True),
    "store gone for all": _weather(True, is_gone=True),
    "rank frozen": _freeze,
    "clock jump": _jump,
    "plan differs on a rank": _flip_plan,
    "transfer corrupted": _corrupt,
    "fetch never finishes": _never_finishes,
    "idle engine": _idle,
    "pause": _pause,
    "pause on one rank": _pause_one,
    "rebalance now": _rebalance,
    "rebalance now on one rank": _rebalance_one,
    **{
        kind: _meeting(kind)
        for kind in MEETINGS
    },
    "rank dead": _die,
    "shutdown": _shut_down,
}  # fmt: skip
