"""Serve with a recorded expert map from the first request on; nothing moves afterwards.

python examples/vllm/redeploy.py --map expert_map.json [--model FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offline import generate_texts, two_rank_engine  # type: ignore[import-not-found]  # beside this script


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--map", type=Path, required=True, help="a map that record.py wrote")
    parser.add_argument("--model", help="the model that it was recorded with; by default the demo's")
    options = parser.parse_args()
    # The redundancy is what the file says.
    engine = two_rank_engine(
        options.model,
        {
            "expert_map_path": str(options.map.absolute()),
            "log_balancedness": True,
            "log_balancedness_interval": 50,
            "expert_heat_collection_interval": 50,
        },
    )
    generate_texts(engine, rounds=4)
    (rank, *_) = engine.collective_rpc("eplb_snapshot")
    (model,) = rank["models"].values()
    balancedness = model["balancedness"]
    shown = "not measured" if balancedness is None else f"{balancedness:.3f}"
    print(f"{rank['moved_experts']} experts moved; balancedness of the ranks: {shown}")


if __name__ == "__main__":  # vLLM starts its workers by importing this file anew
    main()
