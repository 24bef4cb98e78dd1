"""Expert balancing in vLLM, driven by `--additional-config '{"eplb_config": {...}}'`.

vLLM loads `register` in every process of an engine through the entry point `vllm.general_plugins`.
"""


def register() -> None:
    """Take hold of this process's vLLM. Idempotent, and cheap where nothing is to be balanced."""
    from eplb_platform.integrations.vllm.plugin import install

    install()
