"""A search for input that breaks a parser, led by coverage and without end: `make fuzz PARSER=catalog`.

python -m tests.fuzz.guided PARSER [ARGUMENT of libFuzzer …]

Needs the extra `fuzz` (atheris). What breaks a parser is left in a file `crash-…` in the current folder.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stillpoint", "primary", "standby", "backupnode"]):
    from tests.fuzz.parsers import PARSERS


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        print(f"usage: python -m tests.fuzz.guided PARSER; the parsers: {', '.join(PARSERS)}", file=sys.stderr)
        return 2
    parser = PARSERS[sys.argv.pop(1)]

    def feed(data: bytes) -> None:
        # The first byte decides whether a checksum is made right, so that both sides of it are searched.
        is_repaired, rest = bool(data) and data[0] & 1, data[1:]
        with contextlib.suppress(*parser.refusals):
            parser.feed(parser.repaired(rest) if is_repaired and parser.repaired is not None else rest)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(parser.seeds):
            Path(corpus, f"seed-{number}").write_bytes(b"\1" + seed)
        atheris.Setup([sys.argv[0], *sys.argv[1:], corpus], feed)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
