"""The claims as tests judge them."""

import json

import pytest

from entropic_fast.experiments._pipeline import evaluate_claims
from entropic_fast.experiments.claims import to_json


@pytest.fixture
def judge(tmp_path):
    """The claims on the tables given, by name."""

    def judge(**tables):
        for name, table in tables.items():
            table.to_csv(tmp_path / f"{name}.csv")
        found = evaluate_claims(tmp_path)
        json.dumps(to_json(found), allow_nan=False)
        assert len({c.name for c in found}) == len(found)
        return {c.name: c for c in found}

    return judge
