"""Hundreds of inputs that seeded generators make: each ends in the right result, by its generator's
own account, or in one line that names what is wrong.

None ends in an error of another library, in a warning of one, or in a value that nobody gave. A
case's name is its seed: ``pytest -k tars/torn/2`` runs one alone.
"""

import collections

import pytest

from tests.bad_inputs import case

pytest.importorskip("pyarrow", reason="some inputs are parquet files")
pytest.importorskip("diffusers", reason="some inputs are given to a sampler")

from tests.bad_inputs import (  # noqa: F401 - they register what they generate
    commands,
    folders,
    given,
    learners,
    parquets,
    paths,
    pictures,
    recipes,
    saved,
    solvers,
    tars,
    texts,
)

NAMES = [*case.names()]
LEAST = {  # of each kind
    "pictures": 100,
    "tars": 110,
    "parquets": 70,
    "folders": 70,
    "texts": 70,
    "recipes": 110,
    "learners": 80,
    "solvers": 80,
    "saved": 80,
    "given": 60,
    "paths": 80,
    "commands": 20,
}


@pytest.mark.parametrize("name", NAMES)
def test_an_input_ends_right_or_in_one_line(name, tmp_path):
    case.check(case.case_of(name, tmp_path))


def test_there_are_hundreds_of_inputs_of_a_dozen_kinds():
    kinds = collections.Counter(name.partition("/")[0] for name in NAMES)
    assert len(set(NAMES)) == len(NAMES) >= 980
    assert not {kind: kinds[kind] for kind, least in LEAST.items() if kinds[kind] < least}
