"""The process that holds an offline `LLM`: reads orders from standard input, answers on descriptor 3.

Each order and each answer is one line of JSON. Run by `engine.Engine`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    options = json.loads(sys.stdin.readline())
    try:
        from vllm import LLM

        engine = LLM(**options)
    except BaseException as error:
        answer(answers, error=f"{type(error).__name__}: {error}")
        raise
    answer(answers, result="ready")
    for line in sys.stdin:
        order = json.loads(line)
        try:
            result = obey(engine, order)
        except Exception as error:
            answer(answers, error=f"{type(error).__name__}: {error}")
        else:
            answer(answers, result=result)


def answer(answers: TextIO, **values: object) -> None:
    answers.write(json.dumps(values) + "\n")


def obey(engine: Any, order: dict[str, Any]) -> object:
    if order["call"] == "generate":
        return generate(engine, order["prompts"], order["max_tokens"])
    if order["call"] == "rpc":
        return engine.collective_rpc(order["method"], args=tuple(order["args"]), timeout=order["timeout_s"])
    result = getattr(engine, order["call"])(*order["args"])
    return result if isinstance(result, str | int | float | bool | None) else repr(result)


def generate(engine: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, object]:
    """Greedy tokens of each prompt, and how long it took."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
