from types import SimpleNamespace

import pytest

from xlc_ray.activations import sites
from xlc_ray.config import UserError


def test_a_site_is_a_kind_and_a_layer():
    assert sites.parse("mlp_in.12") == ("mlp_in", 12)


@pytest.mark.parametrize("site", ["mlp_in", "mlp_in.", "mlp_in.x", "mlp_in.-1", "mlp.3", "", "mlp_in.1.2", "mlp_in.²"])
def test_what_is_no_site_is_refused_with_the_kinds(site):
    with pytest.raises(UserError, match="mlp_out") as error:
        sites.parse(site)
    assert repr(site) in str(error.value)


def test_order_is_that_of_a_forward_pass():
    shuffled = ["mlp_out.0", "resid_post.10", "resid_pre.2", "mlp_in.0", "resid_post.0", "attn_out.0", "resid_pre.0"]
    expected = ["resid_pre.0", "attn_out.0", "mlp_in.0", "mlp_out.0", "resid_post.0", "resid_pre.2", "resid_post.10"]
    assert sorted(shuffled, key=sites.order_key) == expected


def test_unknown_family_names_the_known_ones():
    model = SimpleNamespace(config=SimpleNamespace(model_type="mamba"))
    with pytest.raises(UserError, match=r"'mamba'.*gemma2.*gpt2.*qwen3"):
        sites.locate(model, "mlp_in.0")


def test_layer_beyond_the_model_is_refused():
    config = SimpleNamespace(model_type="gpt2", num_hidden_layers=4)
    config.get_text_config = lambda: config
    with pytest.raises(UserError, match="0 to 3"):
        sites.locate(SimpleNamespace(config=config), "mlp_in.4")
