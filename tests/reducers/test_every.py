"""What holds for every token reducer."""

import pytest
import torch
from torch import nn

import evit
from evit.reducers import REDUCERS, Reducer
from evit.reducers.tome import removals
from tests.reducers.tiny import AT, COUNTS, DROPS, PATCHES, gradients, images, reduced, run, vit

NAMES = sorted(REDUCERS)
PREFIXES = {"class": {}, "distilled": dict(distilled=True), "registers": dict(reg_tokens=4)}
every = pytest.mark.parametrize("name", NAMES)
on_prefixes = pytest.mark.parametrize("prefix", PREFIXES)


def inert(**kwargs):
    """A ViT whose blocks add nothing, so that what leaves it is its tokens, reduced."""
    model = vit(**kwargs)
    for block in model.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    model.norm = nn.Identity()
    return model


def embedded(model, x):
    return model._pos_embed(model.patch_embed(x))


def test_the_methods_promised_are_there():
    promised = "evit drop random merge diffrate tome pitome mctf squeeze ats dynamicvit cover topk"
    assert set(promised.split()) <= set(NAMES)


@every
@torch.no_grad()
def test_it_is_said_what_reduces_the_model(name):
    model = reduced(name)
    reducer = model.reducer
    assert isinstance(reducer, Reducer) and isinstance(reducer, nn.Module)
    assert reducer.at == AT and model.drop_loc == AT
    assert reducer.counts(PATCHES) == COUNTS
    assert reducer.name in ((name, "drop") if name == "topk" else (name,))
    model.set_keep_rate([0.9, 0.8, 0.7])
    assert reducer.keep_rate == model.keep_rate == (0.9, 0.8, 0.7)


@every
@torch.no_grad()
def test_counts_are_reached_and_every_patch_is_accounted_for(name):
    """tokens_per_block, counts, and the final token of each patch agree."""
    model, x = reduced(name), images()
    logits, source = run(model, x, return_source=True)
    torch.testing.assert_close(run(model, x), logits)
    left = COUNTS  # a fused token among them
    assert model.tokens_per_block() == [PATCHES, *left, left[-1]]
    assert run(model.forward_features, x).shape == (2, 1 + left[-1], 48)
    assert source.dtype == torch.int64 and source.shape == (2, PATCHES)
    final = set(range(1, 1 + left[-1]))
    for row in source.tolist():
        assert set(row) - {-1} <= final
        if name != "ats":  # which pads where two sample points choose one token
            assert set(row) - {-1} == final
        held = [token for token in row if token >= 0]
        if name in DROPS:
            assert len(held) == len(set(held))
        elif name != "diffrate":
            assert len(held) == PATCHES


@every
@torch.no_grad()
def test_a_place_may_remove_a_single_token(name):
    model = reduced(name, counts=[64, 63, 62])
    assert run(model.forward_features, images()).shape == (2, 1 + 62, 48)


@every
def test_sizes_enter_the_attention_where_a_method_says_so(name):
    bias = reduced(name).reducer.key_bias(torch.full((2, 5), 2.0), torch.float32)
    if name in ("merge", "diffrate", "cover", "tome", "mctf", "ats"):
        torch.testing.assert_close(bias, torch.full((2, 1, 1, 5), 2.0).log())
    else:
        assert bias is None


@every
@on_prefixes
@torch.no_grad()
def test_tokens_are_mixed_within_their_group_and_prefix_tokens_with_none(name, prefix):
    model, x = inert(**PREFIXES[prefix]), images()
    before, n = embedded(model, x), model.num_prefix_tokens
    model = reduced(name, model)
    after = run(model.forward_features, x)
    _, source = run(model, x, return_source=True)
    torch.testing.assert_close(after[:, :n], before[:, :n])
    for row, tokens, patches in zip(source, after, before[:, n:], strict=True):
        for token in row[row >= 0].unique().tolist():
            group = patches[row == token]
            if len(group) == 1 or name in ("tome", "pitome"):  # means of all patches, by sizes
                torch.testing.assert_close(tokens[token], group.mean(0), atol=1e-5, rtol=0)
            elif name != "evit":  # whose weights sum to less than 1
                assert (tokens[token] >= group.amin(0) - 1e-5).all()
                assert (tokens[token] <= group.amax(0) + 1e-5).all()


@pytest.mark.parametrize("name", ["tome", "pitome"])
@torch.no_grad()
def test_an_average_pool_counts_every_patch_once(name):
    dense, x = inert(global_pool="avg"), images()
    expected = dense(x)
    torch.testing.assert_close(reduced(name, dense)(x), expected, atol=1e-5, rtol=0)


@every
@torch.no_grad()
def test_an_average_pool_beside_a_class_token_is_served(name):
    dense, x = vit(global_pool="avg"), images()
    expected = dense(x)
    model = reduced(name, dense)
    assert run(model, x).isfinite().all()
    model.set_keep_rate(1)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@every
@on_prefixes
@torch.no_grad()
def test_rate_1_is_timms_model_and_weights_stay_untouched(name, prefix):
    dense, x = vit(**PREFIXES[prefix]), images()
    expected, weights = dense(x), {k: v.clone() for k, v in dense.state_dict().items()}
    model = reduced(name, dense, keep_rate=1.0)
    assert model is dense
    logits, source = model(x, return_source=True)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    n = model.num_prefix_tokens
    assert torch.equal(source, torch.arange(n, n + PATCHES).expand(2, -1))
    own = model.state_dict()
    assert all(own.pop(k).equal(v) for k, v in weights.items())
    assert all(k.startswith("reducer.") for k in own)
    assert bool(own) == (name == "dynamicvit")


@every
@torch.no_grad()
def test_an_image_does_not_see_the_rest_of_its_batch(name):
    if name == "random":
        pytest.skip("draws for a batch of 1 are not those for a batch of 4")
    model, x = reduced(name).double(), images(4).double()
    logits, source = model(x, return_source=True)
    alone = [model(one[None], return_source=True) for one in x]
    torch.testing.assert_close(torch.cat([a for a, _ in alone]), logits, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([s for _, s in alone]), source)


@every
def test_every_parameter_receives_a_gradient_with_checkpointing_the_same(name):
    x, plain = images(3), gradients(reduced(name), images(3))
    assert [k for k, grad in plain.items() if grad is None or not grad.any()] == []
    model = reduced(name)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, x), plain)


@every
@pytest.mark.parametrize("at", [AT, (0, 1, 4)])
def test_equal_tokens_give_numbers(name, at):
    """Images of one value, no position: zero distances, tied scores, tokens of length zero."""
    model, flat = vit(), torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    nn.init.zeros_(model.pos_embed)
    nn.init.zeros_(model.patch_embed.proj.bias)
    model = reduced(name, model, at=at)
    with torch.no_grad():
        logits, source = run(model, flat, return_source=True)
    assert logits.isfinite().all()
    assert (source < 1 + model.tokens_per_block()[-1]).all()
    assert all(grad.isfinite().all() for grad in gradients(model, flat).values())


@every
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_it_runs_in_bfloat16(name, autocast):
    model, x = reduced(name), images()
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, source = run(model, x, return_source=True)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert source.max() <= model.tokens_per_block()[-1]


@every
@torch.no_grad()
def test_surviving_patches_are_ids_that_follow_one_another(name):
    if name not in (*DROPS, "evit"):
        pytest.skip("mixes tokens: return_source says where patches went")
    model, x = reduced(name), images()
    logits, kept = run(model, x, return_kept=True)
    torch.testing.assert_close(logits, run(model, x))
    _, source = run(model, x, return_source=True)
    before = [set(range(PATCHES))] * 2
    for ids, count in zip(kept, COUNTS, strict=True):
        assert ids.dtype == torch.int64 and ids.shape == (2, count - (name == "evit"))
        after = [set(row) - {-1} for row in ids.tolist()]
        assert all(a < b for a, b in zip(after, before, strict=True))
        before = after
    for row, ids in zip(source, before, strict=True):
        if name != "evit":  # whose last fused token holds the others
            assert set(torch.nonzero(row >= 0)[:, 0].tolist()) == ids


@pytest.mark.parametrize("name", ["merge", "tome", "cover"])
@torch.no_grad()
def test_of_a_group_its_leader_survives(name):
    model, x = reduced(name), images()
    _, kept, source = run(model, x, return_kept=True, return_source=True)
    for row, ids in zip(source, kept[-1], strict=True):
        assert sorted(row[ids].tolist()) == list(range(1, 1 + COUNTS[-1]))


@pytest.mark.parametrize("name", ["tome", "pitome", "mctf"])
@torch.no_grad()
def test_merging_tokens_that_are_equal_in_pairs_changes_nothing(name):
    """So sizes, weights and the sizes in the attention are right."""
    dense = vit()
    image = dense.pos_embed[:, 1:]
    image.copy_(image[:, ::2].repeat_interleave(2, 1))
    x = images()
    x = x.unflatten(3, (8, 4))[:, :, :, ::2].repeat_interleave(2, 3).flatten(3)
    expected = dense(x)
    logits, source = reduced(name, dense, counts=[32], at=[1], prop_attn=True)(
        x, return_source=True
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(source[:, ::2], source[:, 1::2])


@torch.no_grad()
def test_drop_is_evit_without_fusion():
    where = dict(keep_rate=0.5, at=(0, 2, 4))  # not where it is by default
    other = reduced("evit", fusion=False, **where)
    assert torch.equal(reduced("drop", **where)(images()), other(images()))


@torch.no_grad()
def test_a_model_may_be_reduced_again_by_another_method():
    model = reduced("evit")
    for name in ("tome", "drop"):
        assert reduced(name, model) is model
        assert torch.equal(model(images()), reduced(name)(images()))


@torch.no_grad()
def test_images_of_another_size_where_the_model_takes_them():
    model = reduced("tome", vit(dynamic_img_size=True), keep_rate=0.7)
    _, source = model(images(1, 48), return_source=True)
    n = PATCHES * 9 // 4
    for _ in AT:
        n = -(-7 * n // 10)
    assert source.shape == (1, 144) and source.max() == n


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (3, [61, 58, 55, 52, 49]),
        ([0, 40, 5], [64, 32, 27, 27, 27]),  # at most half of the tokens; then none
        ((4, -1.0), [56, 50, 46, 44, 44]),
    ],
)
def test_tome_s_own_ways_to_say_how_many(r, expected):
    assert evit.reduce(vit(), "tome", r=r).tokens_per_block() == expected


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_an_inflected_schedule_removes_as_many_from_2_r_to_0(depth):
    falls, rises = removals((10, -1.0), depth), removals((10, 1.0), depth)
    assert falls[0] == 20 and rises[0] == 0
    if depth > 1:
        assert falls[-1] == 0 and rises[-1] == 20
        assert 10 * depth - depth < sum(falls) <= 10 * depth
