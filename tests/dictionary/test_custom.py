"""Gates and wirings from user code: the shipped examples through the settings, and mistakes as one line."""

import subprocess
import sys

import pytest
import torch

from tests.config.tree import ROOT
from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, wiring
from xlc_ray.dictionary.build import make_gate, make_wiring

SOFT = {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.5}}
NEAR = {"kind": "custom", "path": "examples.own_wiring:near", "options": {"reach": 2}}


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_the_example_gate_is_a_soft_threshold(products):
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, SOFT, products=products)
    x = d.normalize_inputs(make.activations(wires, 9))
    code = d.analyse(x, pre=True)
    for f, pre in zip(code.features, code.pre, strict=True):
        torch.testing.assert_close(f.dense(), torch.relu(pre - 0.5))
    d.decode(code.features, x).sum().backward()
    assert all(theta.grad.any() for theta in d.gate.theta)
    assert d.is_sharded("gate.theta.0")


def test_the_example_wiring_writes_as_far_as_it_reaches():
    made = make_wiring(settings.CustomWiring.model_validate(NEAR), 4, 8)
    assert made.writes[0] == ("mlp_out.0", "mlp_out.1")
    assert made.writes[3] == ("mlp_out.3",)
    some = make_wiring(settings.CustomWiring.model_validate({**NEAR, "layers": [1, 3]}), 4, 8)
    assert some.reads == (("mlp_in.1",), ("mlp_in.3",))


def test_modules_of_the_working_directory_are_found_from_a_job(tmp_path):
    """`python jobs/x.py` looks for modules beside the job; the user's stand where they work."""
    (tmp_path / "mine.py").write_text((ROOT / "examples/own_gate.py").read_text())
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job.py").write_text(
        "from xlc_ray.dictionary import Shards, custom\n"
        "print(type(custom.gate('mine:SoftThreshold', {'start': 1.0}, [3], Shards())).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "jobs/job.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "SoftThreshold\n", done.stderr


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"path": "no_such_module_here:Gate"}, "dictionary.gate.path: no module no_such_module_here"),
        ({"path": "examples.nothing:Gate"}, "dictionary.gate.path: no module examples.nothing"),
        ({"path": "examples.own_gate:Hard"}, "dictionary.gate.path: module examples.own_gate has no 'Hard'"),
        ({"path": "examples.own_wiring:near"}, "dictionary.gate.path: examples.own_wiring:near is no subclass"),
        (
            {"path": "xlc_ray.dictionary.hard_concrete:Concrete"},
            "dictionary.gate.path: xlc_ray.dictionary.hard_concrete:Concrete does not define activate, logit",
        ),
        ({"options": {}}, "dictionary.gate.options: missing a required argument: 'start'"),
        ({"options": {"start": 1, "end": 2}}, "dictionary.gate.options: got an unexpected keyword argument 'end'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(change, line):
    with pytest.raises(UserError) as error:
        make_gate(settings.CustomGate.model_validate(SOFT | change), [3], Shards())
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"path": "examples.own_gate:torch"}, "dictionary.wiring.path: examples.own_gate:torch is no function"),
        ({"options": {"far": 1}}, "dictionary.wiring.options: missing a required argument: 'reach'"),
        ({"path": "operator:is_", "options": {}}, "dictionary.wiring.path: operator:is_ returned bool, not an "),
    ],
    ids=str,
)
def test_mistakes_in_wirings_are_one_line(change, line):
    with pytest.raises(UserError) as error:
        make_wiring(settings.CustomWiring.model_validate(NEAR | change), 2, 8)
    assert str(error.value).startswith(line)


def test_l0_with_a_gate_that_has_no_step_is_a_users_mistake():
    gate = make_gate(settings.CustomGate.model_validate(SOFT), [3], Shards())
    with pytest.raises(UserError, match="l0 has no gradient with the gate SoftThreshold"):
        gate.step(torch.zeros(2, 3), 0, None)
