"""Nothing non-finite reaches a parameter: the skipped network stays as it was, the other one steps."""

import json

import pytest
import torch

from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed


CORNERS = [(0, "fp32"), (1, "fp32"), (3, "bf16")]
MATRIX = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [(2, CORNERS), pytest.param(1, MATRIX, marks=pytest.mark.slow), pytest.param(2, MATRIX, marks=pytest.mark.slow)],
    ids=["corners", "1rank", "2ranks"],
)
def test_poisoned_steps_are_skipped_and_counted(ranks, variants, tiny_teacher, tmp_path):
    out = tmp_path / "result.pt"
    on_ranks(ranks, "tests.nonfinite_worker", str(tiny_teacher), str(out), json.dumps(variants))
    results = torch.load(out, weights_only=True)
    assert len(results) == 2 * len(variants)
    for where, r in results.items():
        poisoned, other = r["poisoned"], "fake_score" if r["poisoned"] == "generator" else "generator"
        assert r["exact_start"], f"{where}: the masters are not the teacher's weights"
        assert r["skipped"] == {poisoned: 1, other: 0}, where
        assert not r["changed"][poisoned], f"{where}: the skipped network changed"
        assert r["changed"][other], f"{where}: the other network did not step"
        assert r["steps_after"], f"{where}: the next iteration does not step"
        assert r["same_on_all_ranks"], where
