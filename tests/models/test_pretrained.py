import pytest
import timm
import torch
from huggingface_hub import constants
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import evit  # noqa: F401
from evit.models import registry
from evit.models.registry import create_model

# A name that no server has, whether or not there is a network.
NOWHERE = {"hf_hub_id": "nobody-has/this-model-9f31", "url": ""}
NO_HOST = {"hf_hub_id": None, "url": "https://weights.invalid/x.pth"}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")


@pytest.mark.parametrize(
    "where", [pytest.param(NOWHERE, marks=pytest.mark.slow), NO_HOST], ids=["hub", "url"]
)
def test_weights_that_cannot_be_downloaded_are_told(where):
    with pytest.raises(ValueError, match="weights of resnet10t cannot be downloaded .*checkpoint="):
        create_model("resnet10t", pretrained=True, pretrained_cfg_overlay=where)
    assert constants.HF_HUB_OFFLINE is False


def test_every_network_error_is_a_download(monkeypatch):
    import httpx
    import requests

    for error in httpx.ConnectTimeout("slow"), requests.ConnectionError("gone"), TimeoutError():

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(registry.timm, "create_model", fail)
        with pytest.raises(ValueError, match="cannot be downloaded"):
            create_model("resnet10t", pretrained=True)
        with pytest.raises(type(error)):
            create_model("resnet10t")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet_of_mine", "Unknown model"),
        ("resnet10t.of_mine", "Invalid pretrained"),
        ("botnet50ts_256", "No pretrained weights"),
    ],
)
def test_a_wrong_name_is_a_value_error(name, reason):
    with pytest.raises(ValueError, match=f"{reason}.*timm.list_models"):
        create_model(name, pretrained=True)


def test_without_pretrained_it_is_timms():
    assert type(create_model("resnet10t")) is type(timm.create_model("resnet10t"))


@pytest.mark.parametrize(("size", "heads"), [("tiny", 3), ("small", 6), ("base", 12)])
def test_a_deit_has_its_published_heads(size, heads):
    with torch.device("meta"):
        model = timm.create_model(f"evit_deit_{size}_patch16")
    assert {block.attn.num_heads for block in model.blocks} == {heads}


@pytest.mark.parametrize(
    ("size", "heads", "skip_lam"), [("t", 4, 1.0), ("s", 6, 2.0), ("m", 8, 2.0)]
)
def test_an_lvvit_has_its_published_heads_and_residuals(size, heads, skip_lam):
    with torch.device("meta"):
        model = timm.create_model(f"evit_lvvit_{size}")
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.ls1.factor for block in model.blocks} == {1 / skip_lam}


@pytest.mark.parametrize("name", ["deit_small_patch16", "lvvit_s"])
def test_a_dynamicvit_has_dynamicvits_reducer(name):
    with torch.device("meta"):
        assert timm.create_model(f"dynamicvit_{name}").reducer.name == "dynamicvit"


@pytest.mark.parametrize("name", ["evit_deit_tiny_patch16", "lvvit_s", "evit_lvvit_t"])
def test_a_model_takes_imagenets_mean_and_deviation_at_one_size(name):
    with torch.device("meta"):
        config = timm.create_model(name).pretrained_cfg
    assert (config["mean"], config["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert config["fixed_input_size"] and config["input_size"] == (3, 224, 224)
