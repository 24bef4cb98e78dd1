"""Write the demo's tiny Qwen3-MoE as a folder that vLLM serves: the packaged checkpoint and a byte tokenizer.

python examples/vllm/demo_model.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen, else one
    from 256 on, in the order of the bytes (GPT-2's convention).
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose token ids are the bytes of the text, as the model was trained."""
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_demo_model(folder: Path) -> Path:
    """The demo's checkpoint and the tokenizer in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("eplb_platform.demo") / "checkpoint") as checkpoint:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(checkpoint / name, folder / name)
    write_byte_tokenizer(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python examples/vllm/demo_model.py FOLDER")
    print(write_demo_model(Path(sys.argv[1])))
