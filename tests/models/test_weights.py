"""Checkpoints in."""

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import evit
from evit.models.weights import read_state_dict


@pytest.fixture(scope="module")
def deit_small():
    return timm.create_model("deit_small_patch16_224", num_classes=10)


def evit_small(**kwargs):
    return timm.create_model("evit_deit_small_patch16", num_classes=10, **kwargs)


def test_a_published_file_with_its_namespace_loads_with_nothing_missing(deit_small, tmp_path):
    path = tmp_path / "deit_small_patch16_224.pth"
    torch.save({"model": deit_small.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    model = evit_small()
    evit.load_checkpoint(model, path)
    for name, value in deit_small.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_lightnings_prefix_is_taken_off(deit_small):
    model = evit_small()
    prefixed = {f"model.{name}": value for name, value in deit_small.state_dict().items()}
    evit.load_checkpoint(model, {"state_dict": prefixed})
    assert torch.equal(model.cls_token, deit_small.cls_token)


def test_position_embedding_is_resized_and_the_class_position_kept(deit_small):
    model = evit_small(img_size=304)
    evit.load_checkpoint(model, deit_small.state_dict())
    assert model.pos_embed.shape == (1, 1 + 19 * 19, 384)
    assert torch.equal(model.pos_embed[:, 0], deit_small.pos_embed[:, 0])


def test_another_architecture_is_refused_and_the_difference_named(deit_small):
    other = timm.create_model("evit_deit_tiny_patch16", num_classes=10)
    with pytest.raises(ValueError, match=r"fit ReducedViT: cls_token is \(1, 1, 384\), not"):
        evit.load_checkpoint(other, deit_small.state_dict())


def test_missing_and_surplus_weights_are_named(deit_small):
    weights = deit_small.state_dict()
    weights["unknown"] = weights.pop("blocks.3.attn.proj.bias")
    with pytest.raises(ValueError, match=r"blocks.3.attn.proj.bias is missing; unknown is not"):
        evit.load_checkpoint(evit_small(), weights)


def test_a_classifier_of_another_size_is_left_out_on_request_alone(deit_small):
    model = timm.create_model("evit_deit_small_patch16", num_classes=3)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match="head.weight"):
        evit.load_checkpoint(model, deit_small.state_dict())
    evit.load_checkpoint(model, deit_small.state_dict(), new_head=True)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.cls_token, deit_small.cls_token)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"model": Attack(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        evit.load_checkpoint(evit_small(), tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.pth.*cannot be read"):
        evit.load_checkpoint(evit_small(), path)


def test_weights_that_have_changed_on_the_disk_are_refused(tmp_path):
    path = tmp_path / "flipped.pth"
    torch.save({"model": {"x": torch.randn(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="flipped.pth.*cannot be read.*not as it was written"):
        read_state_dict(path)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="nowhere.pth' does not exist"):
        evit.load_checkpoint(evit_small(), "nowhere.pth")


WRAPPED = {
    "data parallel and compiled": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "backbone and head": lambda w: {
        k if k.startswith("head") else f"backbone.{k}": v for k, v in w.items()
    },
    "encoder in a container": lambda w: {
        "model_state_dict": {f"model.encoder.{k}": v for k, v in w.items()}
    },
    "compiled blocks": lambda w: {k.replace("mlp.", "mlp._orig_mod."): v for k, v in w.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_come_in_every_wrapping(deit_small, how):
    model = evit_small()
    evit.load_checkpoint(model, WRAPPED[how](deit_small.state_dict()))
    assert torch.equal(model.head.weight, deit_small.head.weight)
    assert torch.equal(model.blocks[5].mlp.fc1.weight, deit_small.blocks[5].mlp.fc1.weight)


def test_safetensors_load(deit_small, tmp_path):
    save_file(deit_small.state_dict(), tmp_path / "model.safetensors")
    model = evit_small()
    evit.load_checkpoint(model, tmp_path / "model.safetensors")
    assert torch.equal(model.cls_token, deit_small.cls_token)


def test_an_average_is_taken_on_request_and_not_passed_over_in_silence(deit_small):
    weights = deit_small.state_dict()
    content = dict(model=weights, model_ema={k: v + 1 for k, v in weights.items()})
    with pytest.warns(UserWarning, match="model_ema is not used: ema=True"):
        assert torch.equal(read_state_dict(content)["cls_token"], weights["cls_token"])
    averaged = read_state_dict(content, ema=True)["cls_token"]
    assert torch.equal(averaged, weights["cls_token"] + 1)
    with pytest.raises(ValueError, match="no average"):
        read_state_dict(weights, ema=True)


def test_a_checkpoint_without_a_head_starts_a_new_one(deit_small, capsys):
    weights = {k: v for k, v in deit_small.state_dict().items() if not k.startswith("head")}
    with pytest.raises(ValueError, match="head.weight is missing.*new_head=True"):
        evit.load_checkpoint(evit_small(), weights)
    model = evit_small()
    evit.load_checkpoint(model, weights, new_head=True)
    assert torch.equal(model.cls_token, deit_small.cls_token)
    assert "classifier is new" in capsys.readouterr().out


def test_weights_go_into_a_compiled_model(deit_small):
    model = evit_small()
    evit.load_checkpoint(torch.compile(model, backend="eager"), deit_small.state_dict())
    assert torch.equal(model.cls_token, deit_small.cls_token)


@pytest.mark.parametrize(("lost", "more"), [(5, ""), (6, " and 1 more")])
def test_five_misfits_are_named_and_the_others_counted(lost, more):
    model = timm.create_model("evit_deit_tiny_patch16", img_size=32)
    weights = dict(list(model.state_dict().items())[lost:])
    with pytest.raises(ValueError) as caught:
        evit.load_checkpoint(model, weights)
    assert str(caught.value).count("is missing") == 5
    assert re.search(rf"is missing{more}\. ", str(caught.value))
