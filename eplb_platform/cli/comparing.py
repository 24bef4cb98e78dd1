"""`eplb compare`: two expert maps under the same recorded load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from eplb_platform.balance import moved_experts
from eplb_platform.cli import bad_input
from eplb_platform.cli.files import fitting, read_map, read_trace
from eplb_platform.offline.report import Report, make_report
from eplb_platform.records.fault import RecordError
from eplb_platform.topology import Topology

_NAMES = ("imbalance_ratio_a", "imbalance_ratio_b", "balancedness_a", "balancedness_b")
_Measures: TypeAlias = tuple[float, float, float, float]
# The layer, its measures by _NAMES, and its moved experts.
_Row: TypeAlias = tuple[int, _Measures, int | None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The report on both maps; moved: [layers], experts that ranks must receive, None across EP sizes."""

    paths: tuple[Path, Path]
    report: Report
    moved: NDArray[np.int64] | None

    def lines(self) -> list[str]:
        """A line for each layer and the whole, for people."""
        rows = self._rows()
        overall = self._overall()
        better = overall[3] - overall[2]
        verdict = f"B is {'better' if better > 0 else 'worse'} by {abs(better):.4f} of balancedness"
        return [
            *(f"{name}: {self.paths[i]}, {self._shape(i)}" for i, name in enumerate("AB")),
            f"{'':>7} {'imbalance-ratio':^19} {'balancedness':^15} {'moved':>7}",
            f"{'layer':>7} {'A':>9} {'B':>9} {'A':>7} {'B':>7} {'A to B':>7}",
            *(_line(str(layer), measures, moved) for layer, measures, moved in rows),
            _line("average", overall, None if self.moved is None else int(self.moved.sum())),
            f"{verdict if better else 'both have the same balancedness'} over {self.report.num_steps} steps; "
            "the moved experts of all layers are summed",
        ]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "a": str(self.paths[0]),
            "b": str(self.paths[1]),
            "steps": self.report.num_steps,
            **dict(zip(_NAMES, self._overall(), strict=True)),
            "moved_experts": None if self.moved is None else int(self.moved.sum()),
            "layers": [
                {"layer": layer, **dict(zip(_NAMES, measures, strict=True)), "moved_experts": moved}
                for layer, measures, moved in self._rows()
            ],
        }

    def _overall(self) -> _Measures:
        a, b, c, d = np.mean([measures for _, measures, _ in self._rows()], axis=0).tolist()
        return a, b, c, d

    def _rows(self) -> list[_Row]:
        a, b = (layout.overall for layout in self.report.layouts)
        return [
            (
                self.report.first_layer + i,
                (
                    float(a.imbalance_ratio[i]),
                    float(b.imbalance_ratio[i]),
                    float(a.balancedness[i]),
                    float(b.balancedness[i]),
                ),
                None if self.moved is None else int(self.moved[i]),
            )
            for i in range(len(a.mean))
        ]

    def _shape(self, which: int) -> str:
        held = self.report.layouts[which].expert_map
        return f"{held.topology.num_ranks} ranks of {held.slots_per_rank} slots"


def compare(first: Path, second: Path, load: Path, ep_size: int | None) -> Outcome:
    """Project the load under both maps. Raises BadInput."""
    try:
        trace = read_trace(load)
        topology = None if ep_size is None else Topology(ep_size)
        maps = [
            read_map(
                path,
                topology=fitting(path, topology),
                num_logical_experts=trace.num_logical_experts,
                num_layers=trace.num_layers,
            )
            for path in (first, second)
        ]
        report = make_report(trace, {f"A ({first})": maps[0], f"B ({second})": maps[1]}, num_bins=1)
    except (RecordError, ValueError) as error:
        raise bad_input("compare", error) from error
    same_size = maps[0].topology.num_ranks == maps[1].topology.num_ranks
    return Outcome((first, second), report, moved_experts(*maps) if same_size else None)


def _line(name: str, measures: _Measures, moved: int | None) -> str:
    ratio_a, ratio_b, a, b = measures
    received = "-" if moved is None else str(moved)
    return f"{name:>7} {ratio_a:9.4f} {ratio_b:9.4f} {a:7.4f} {b:7.4f} {received:>7}"
