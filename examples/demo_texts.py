"""The texts that the tiny MoE model learns from, and the held-out ones that the demo serves.

Six kinds of text: `python`, `prose` and `c` come from the running Python's standard library and its C headers
(licence: PSF-2.0), `json`, `table` and `markup` are written by seeded generators. What is held out is named
here (modules, topics, headers) or has a seed of its own, so that no held-out text is ever trained on.

    python examples/demo_texts.py --output eplb_platform/demo/texts    # writes the held-out texts anew
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = ("python", "prose", "c", "json", "table", "markup")
HELD_OUT_BYTES = 48_000
HELD_OUT_SEED = 7
HELD_OUT_MODULES = ("contextlib.py", "queue.py", "graphlib.py", "fnmatch.py", "stat.py")
HELD_OUT_TOPICS = ("compound", "execmodel", "import", "naming")
HELD_OUT_HEADERS = ("object.h", "modsupport.h", "methodobject.h", "moduleobject.h", "floatobject.h")
TRAINING_PACKAGES = (
    "", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging",
    "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree",
)  # fmt: skip

_WORDS = {
    "given": """Ada Alan Barbara Claude Donald Edsger Emmy Grace Hedy John Katherine Leslie Mary Niklaus
        Sophie Tim""",
    "family": """Allen Borg Curie Dijkstra Euler Franklin Gauss Hopper Kepler Lamport Meitner Noether Planck
        Turing""",
    "place": """Aarhus Bergen Bremen Cork Delft Graz Kyoto Leeds Lund Nantes Osaka Porto Riga Turin Utrecht
        Zurich""",
    "thing": """anchor barrel candle drawer engine filter garden hammer island jacket kettle ladder magnet
        needle""",
    "adjective": """bright calm dry early firm gentle heavy large narrow old plain quiet round small steady
        warm""",
    "verb": """carries checks closes counts draws fills finds guards holds keeps leaves lifts marks moves
        opens""",
}
_LISTS = {name: words.split() for name, words in _WORDS.items()}
_PLACES, _THINGS, _ADJECTIVES = _LISTS["place"], _LISTS["thing"], _LISTS["adjective"]
_GIVEN, _FAMILY, _VERBS = _LISTS["given"], _LISTS["family"], _LISTS["verb"]
_STATES = ("active", "pending", "closed", "failed", "archived")


def _sentence(rng: random.Random) -> str:
    words = (rng.choice(_ADJECTIVES), rng.choice(_THINGS), rng.choice(_VERBS), rng.choice(_ADJECTIVES))
    subject, place = f"The {words[0]} {words[1]} {words[2]}", (rng.choice(_THINGS), rng.choice(_PLACES))
    return f"{subject} the {words[3]} {place[0]} in {place[1]}."


def _record(rng: random.Random) -> dict[str, object]:
    return {
        "id": rng.randrange(10_000, 99_999),
        "name": f"{rng.choice(_GIVEN)} {rng.choice(_FAMILY)}",
        "active": rng.random() < 0.7,
        "score": round(rng.uniform(0, 100), 2),
        "address": {"city": rng.choice(_PLACES), "zip": f"{rng.randrange(10_000, 99_999)}"},
        "tags": rng.sample(_ADJECTIVES, rng.randrange(1, 4)),
        "items": [
            {
                "sku": f"{rng.choice(_THINGS)}-{rng.randrange(100):02d}",
                "count": rng.randrange(1, 20),
                "price": None,
            }
            for _ in range(rng.randrange(1, 4))
        ],
        "note": _sentence(rng) if rng.random() < 0.3 else None,
    }


def json_text(seed: int, size: int) -> str:
    """Indented and compact JSON records, about `size` bytes."""
    rng, parts, length = random.Random(f"json {seed}"), list[str](), 0
    while length < size:
        parts.append(json.dumps(_record(rng), indent=rng.choice((None, 2, 2))) + "\n")
        length += len(parts[-1])
    return "".join(parts)


def _table(rng: random.Random) -> Iterator[str]:
    separator, level = rng.choice((",", ",", ";", "\t")), rng.uniform(10, 900)
    date = f"{rng.randrange(1990, 2025)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
    yield separator.join(("date", "time", "station", "state", "pressure", "flow", "delta")) + "\n"
    for row in range(rng.randrange(12, 40)):
        level += rng.gauss(0, 5)
        minute = (row * 5) % 60
        cells = (
            date, f"{(8 + row // 12) % 24:02d}:{minute:02d}:00",
            rng.choice(_PLACES)[:3].upper(), rng.choice(_STATES),
            f"{level:.3f}", f"{level / 7:.2f}", f"{rng.gauss(0, 1):+.4f}",
        )  # fmt: skip
        yield separator.join(cells) + "\n"
    yield "\n"


def table_text(seed: int, size: int) -> str:
    """Tables of measurements (CSV with several separators), about `size` bytes."""
    rng, parts, length = random.Random(f"table {seed}"), list[str](), 0
    while length < size:
        parts.append("".join(_table(rng)))
        length += len(parts[-1])
    return "".join(parts)


def _element(rng: random.Random, depth: int) -> Iterator[str]:
    pad = "  " * depth
    tags: tuple[str, ...] = ("p", "p", "ul", "a", "img", "div", "div") if depth < 4 else ("p", "a")
    match rng.choice(tags):
        case "p":
            yield f'{pad}<p class="{rng.choice(_ADJECTIVES)}">{_sentence(rng)}</p>\n'
        case "a":
            link = f"/{rng.choice(_THINGS)}/{rng.randrange(100)}.html"
            yield f'{pad}<a href="{link}">{rng.choice(_THINGS)}</a>\n'
        case "img":
            image = f'src="{rng.choice(_THINGS)}.png" alt="{rng.choice(_ADJECTIVES)}"'
            yield f'{pad}<img {image} width="{rng.randrange(9) * 40}"/>\n'
        case "ul":
            items = (f"{pad}  <li>{rng.choice(_THINGS)} &amp; {rng.choice(_THINGS)}</li>\n" for _ in range(3))
            yield f"{pad}<ul>\n{''.join(items)}{pad}</ul>\n"
        case _:
            yield f'{pad}<div id="{rng.choice(_THINGS)}-{rng.randrange(50)}">\n'
            for _ in range(rng.randrange(1, 4)):
                yield from _element(rng, depth + 1)
            yield f"{pad}</div>\n"


def markup_text(seed: int, size: int) -> str:
    """HTML pages, about `size` bytes."""
    rng, parts, length = random.Random(f"markup {seed}"), list[str](), 0
    while length < size:
        title = f"{rng.choice(_ADJECTIVES)} {rng.choice(_THINGS)}".title()
        body = "".join("".join(_element(rng, 2)) for _ in range(rng.randrange(3, 8)))
        head = f"<html>\n  <head><title>{title}</title></head>\n  <body>\n    <h1>{title}</h1>\n"
        page = f"{head}{body}  </body>\n</html>\n"
        parts.append(page)
        length += len(page)
    return "".join(parts)


def _modules(held_out: bool) -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if held_out:
        return [folder / name for name in HELD_OUT_MODULES]
    found = [path for package in TRAINING_PACKAGES for path in sorted((folder / package).glob("*.py"))]
    return [path for path in found if not (path.parent == folder and path.name in HELD_OUT_MODULES)]


def python_text(held_out: bool) -> str:
    """Source of the standard library."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in _modules(held_out))


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)) and len(text) > 200:
            yield inspect.cleandoc(text) + "\n\n"


def prose_text(held_out: bool) -> str:
    """English: the language reference (pydoc topics); for training also docstrings of over 200 characters."""
    topics: dict[str, str] = pydoc_data.topics.topics
    if held_out:
        return "\n".join(topics[name] for name in HELD_OUT_TOPICS)
    parts = [text for name, text in sorted(topics.items()) if name not in HELD_OUT_TOPICS]
    for path in _modules(held_out=False):
        parts.extend(_docstrings(path.read_text(encoding="utf-8", errors="replace")))
    return "\n".join(parts)


def c_text(held_out: bool) -> str:
    """Python's C headers."""
    folder = Path(sysconfig.get_paths()["include"])
    if held_out:
        return "\n".join((folder / name).read_text(encoding="utf-8") for name in HELD_OUT_HEADERS)
    # A header's cpython/ and internal/ parts repeat parts of it: they are held out with it.
    paths = [
        path
        for path in sorted(folder.rglob("*.h"))
        if path.name.removeprefix("pycore_") not in HELD_OUT_HEADERS
    ]
    if not paths:
        raise FileNotFoundError(f"{folder}: no C headers; install the development files of this Python")
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


GENERATORS: dict[str, Callable[[int, int], str]] = {
    "json": json_text,
    "table": table_text,
    "markup": markup_text,
}
SOURCES: dict[str, Callable[[bool], str]] = {"python": python_text, "prose": prose_text, "c": c_text}


def training_text(kind: str, seed: int, size: int = 1_000_000) -> bytes:
    """Text of one kind to train on; generated kinds are `size` bytes long."""
    text = SOURCES[kind](False) if kind in SOURCES else GENERATORS[kind](1_000 + seed, size)
    return text.encode("utf-8", errors="replace")


def held_out_text(kind: str) -> bytes:
    """Text of one kind that training never sees, at most `HELD_OUT_BYTES` long, ending with a whole line."""
    text = SOURCES[kind](True) if kind in SOURCES else GENERATORS[kind](HELD_OUT_SEED, HELD_OUT_BYTES)
    cut = text.encode("utf-8", errors="replace")[:HELD_OUT_BYTES]
    return cut[: cut.rfind(b"\n") + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out texts that the demo serves.")
    parser.add_argument("--output", type=Path, required=True, help="folder for KIND.txt")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        text, training = held_out_text(kind), training_text(kind, seed=0)
        (folder / f"{kind}.txt").write_bytes(text)
        print(f"{kind:7} {len(text):7,} bytes held out, {len(training):10,} bytes to train on")


if __name__ == "__main__":
    main()
