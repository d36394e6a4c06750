"""Tens of thousands of almost-right inputs to every parser: each returns or refuses, and nothing else happens."""

from __future__ import annotations

import random
import zlib

import pytest

from tests.fuzz.mutation import Mutator, fuzz_seed, scaled
from tests.fuzz.parsers import DEFECTS, PARSERS

COUNT = 1600  # for each parser


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_input_is_taken_or_refused(name: str) -> None:
    parser = PARSERS[name]
    for seed_input in parser.seeds:  # what it is mutated from is right, else nothing behind the first check is reached
        parser.feed(seed_input)
    randomness = random.Random(fuzz_seed() ^ zlib.crc32(name.encode()))
    count = scaled(COUNT)
    for number, mutated in enumerate(Mutator(parser.seeds, randomness).inputs(count)):
        data = parser.repaired(mutated) if parser.repaired is not None and number % 2 else mutated
        try:
            parser.feed(data)
        except parser.refusals:
            pass
        except Exception as error:
            raise AssertionError(f"{name}, input {number}: {data[:4096]!r}") from error
    print(f"{name}: {count} inputs")


@pytest.mark.parametrize("name", DEFECTS)
def test_what_once_broke_a_parser_is_refused(name: str) -> None:
    parser = PARSERS[DEFECTS[name][0]]
    with pytest.raises(parser.refusals):
        parser.feed(DEFECTS[name][1])
