"""Serve traffic with vLLM, move nothing, and record the expert map that would have served it well.

python examples/vllm/record.py --map expert_map.json [--model FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offline import generate_texts, two_rank_engine  # type: ignore[import-not-found]  # beside this script


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--map", type=Path, required=True, help="where to write the map")
    parser.add_argument("--model", help="a mixture-of-experts model; by default the demo's")
    options = parser.parse_args()
    engine = two_rank_engine(
        options.model,
        {
            "expert_map_record_path": str(options.map.absolute()),
            "num_redundant_experts": 16,
            "expert_heat_collection_interval": 50,
            "algorithm_execution_interval": 0,
        },
    )
    generate_texts(engine, rounds=4)
    (rank, *_) = engine.collective_rpc("eplb_snapshot")
    print(f"{rank['cycles']} cycles, {rank['moved_experts']} experts moved; the map is in {options.map}")


if __name__ == "__main__":  # vLLM starts its workers by importing this file anew
    main()
