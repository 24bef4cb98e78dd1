"""vLLM's `EplbState` as a shell: its tables, which the routers read, stay; its state machine does not run.

Only methods are replaced, since both model runners have imported the class by name, and only for states
of an engine that asked for `eplb_config`.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from eplb_platform.integrations.vllm.balancing import EngineBalancing
from eplb_platform.integrations.vllm.compatibility import expect, replace

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODULE = "vllm.distributed.eplb.eplb_state"
_REPLACED = {
    "__init__": ("parallel_config", "device"),
    "validate_ep_configuration": ("new_model",),
    "add_model": ("model", "model_config", "model_name"),
    "step": ("is_dummy", "is_profile", "log_stats"),
    "rearrange": (),
    "start_async_loop": (),
    "drain_async": (),
    "update_mapping": (),
}
"""The methods, with the parameters that our replacements count on."""

for _name, _parameters in _REPLACED.items():
    expect(f"{_MODULE}:EplbState.{_name}", *_parameters)
expect(f"{_MODULE}:create_eplb_communicator")
expect(f"{_MODULE}:EplbState.prepare_forward")  # left as it is: the routers count by it

_driver: ContextVar[EngineBalancing | None] = ContextVar("eplb_driver", default=None)


def take_over() -> None:
    """Replace the methods of this process's `EplbState`. Idempotent."""
    from vllm.distributed.eplb.eplb_state import EplbState

    for name in _REPLACED:
        replace(EplbState, name, functools.partial(_replacement, name))


@contextmanager
def driven_by(balancing: EngineBalancing) -> Iterator[None]:
    """States that are made inside are driven by `balancing`."""
    token = _driver.set(balancing)
    try:
        yield
    finally:
        _driver.reset(token)


def balancing_of(state: object) -> EngineBalancing | None:
    """What drives an `EplbState`, if it is ours."""
    return getattr(state, "_eplb_platform", None)


def _replacement(name: str, original: Any) -> Any:
    ours = globals()[f"_{name.strip('_')}"]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    return method


def _init(original: Any, state: Any, parallel_config: Any, device: Any) -> None:
    original(state, parallel_config, device)
    state._eplb_platform = _driver.get()


def _validate_ep_configuration(original: Any, state: Any, new_model: Any) -> None:
    """vLLM's own plans all models of an engine at once and wants them alike; ours plans each by itself."""
    if balancing_of(state) is None:
        original(state, new_model)


def _add_model(original: Any, state: Any, model: Any, model_config: Any, model_name: Any = None) -> None:
    balancing = balancing_of(state)
    if balancing is None:
        original(state, model, model_config, model_name)
        return
    with _without_communicator():
        original(state, model, model_config, model_name)
    model_state = state.model_states[model_config.compute_hash()]
    model_state.expert_buffer = []  # our staging is what the backend allocates
    state.is_async = False
    balancing.add_model(model_state, is_main=balancing.is_main_model(model_config))


def _step(
    original: Any, state: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
) -> None:
    balancing = balancing_of(state)
    if balancing is None:
        original(state, is_dummy, is_profile, log_stats)
    elif is_profile:
        # The staging was allocated with the model, so vLLM's profile has counted it.
        balancing.forget_load()
    else:
        balancing.step(is_dummy=is_dummy)


def _rearrange(original: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    if balancing_of(state) is None:
        return original(state, *args, **kwargs)
    raise RuntimeError(
        "vLLM asked for a rearrangement of its own (elastic expert parallelism): eplb_config does not "
        "support it"
    )


def _start_async_loop(original: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    if balancing_of(state) is None:
        original(state, *args, **kwargs)


def _drain_async(original: Any, state: Any) -> None:
    balancing = balancing_of(state)
    if balancing is None:
        original(state)
    else:
        balancing.drain()


def _update_mapping(original: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    if balancing_of(state) is not None:
        raise RuntimeError(
            "elastic expert parallelism sets the expert map itself: eplb_config does not support it"
        )
    original(state, *args, **kwargs)


@contextmanager
def _without_communicator() -> Iterator[None]:
    """vLLM's own weight transfer takes memory and connections at birth, and would never be used."""
    from vllm.distributed.eplb import eplb_state

    create = eplb_state.create_eplb_communicator
    eplb_state.create_eplb_communicator = lambda *args, **kwargs: None
    try:
        yield
    finally:
        eplb_state.create_eplb_communicator = create
