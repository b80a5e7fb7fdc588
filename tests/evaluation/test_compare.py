"""MMCS: 1 for the same features in any order and scale, known answers by hand, refusals of what cannot be compared."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.dictionary import wiring
from xlc_ray.evaluation import compare, comparison_table
from xlc_ray.evaluation.compare import max_cosines


def test_the_same_features_permuted_and_rescaled_are_found_again():
    a, b = make.dictionary(wiring.clt([0, 1], 3)), make.dictionary(wiring.clt([0, 1], 3))
    with torch.no_grad():
        for group in b.groups:
            group.W_dec.copy_(group.W_dec.roll(2, dims=0) * 3)
        # The same rows in the model's units, for a run that scales its sites otherwise.
        b.write_scale.copy_(torch.tensor([2.0, 2, 2, 5, 5, 5]))
        for g, group in enumerate(b.groups):
            group.W_dec.div_(torch.cat([b.write_scale[span] for span in b.wiring.write_spans(g)]))
    found = compare(a, b)
    assert found["forward"] == found["backward"] == {"mmcs": pytest.approx(1), "alike": 1.0}
    assert [group["writes"] for group in found["groups"]] == [["mlp_out.0", "mlp_out.1"], ["mlp_out.1"]]
    assert json.loads(json.dumps(found)) == found
    assert comparison_table(found).splitlines()[-1].split() == ["all", "1.0000", "100.0%", "1.0000", "100.0%"]


@pytest.mark.parametrize("by", ["per_source", "per_target"])
def test_tied_decoders_are_compared_by_what_they_write(by):
    wires = replace(wiring.clt([0, 1], 3), tied=wiring.Tying(by, scale=True, offset=True))
    a, b = make.dictionary(wires), make.dictionary(wiring.clt([0, 1], 3))
    with torch.no_grad():
        a.groups[1].feature_scale.copy_(make.random(7))
        for g, group in enumerate(b.groups):
            group.W_dec.copy_(torch.cat([a.decoder_rows(g, site) for site in a.wiring.writes[g]], dim=1).flip(0))
    assert compare(a, b)["forward"] == {"mmcs": pytest.approx(1), "alike": 1.0}


def test_cosines_by_hand_with_a_row_of_zeros_left_out():
    rows = torch.tensor([[2.0, 0], [0, 0], [0, -1]])
    others = torch.tensor([[3.0, 4], [0, 5]])
    assert max_cosines(rows, others).tolist() == pytest.approx([0.6, -0.8])
    assert max_cosines(others, rows).tolist() == pytest.approx([0.6, 0])


def test_blocks_change_nothing(monkeypatch):
    rows, others = make.random(50, 6), make.random(70, 6, seed=1)
    whole = max_cosines(rows, others)
    monkeypatch.setattr(sys.modules[max_cosines.__module__], "BLOCK", 140)
    torch.testing.assert_close(max_cosines(rows, others), whole)


def test_runs_that_write_other_sites_or_widths_are_refused():
    a = make.dictionary(wiring.clt([0, 1], 3))
    with pytest.raises(UserError, match=r"0 groups of the other run write mlp_out.0, mlp_out.1; it has: mlp_out.0; "):
        compare(a, make.dictionary(wiring.transcoders([0, 1], 3, skip=False)))
    with pytest.raises(UserError, match="runs of different models"):
        compare(a, make.dictionary(wiring.clt([0, 1], 4)))
