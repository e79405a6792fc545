"""timm's Eva (EVA-02, DINOv3): rotary positions go with the tokens that they belong to."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva

import evit
from evit import measure
from evit.reducers import REDUCERS

AT, COUNTS = (1, 2), [20, 9]
KINDS = dict(
    dinov3=dict(rope_type="dinov3", num_reg_tokens=4, init_values=0.5, use_abs_pos_emb=False),
    resizes=dict(rope_type="dinov3", num_reg_tokens=4, dynamic_img_size=True, qkv_bias=False),
    eva02=dict(rope_type="cat", swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    averages=dict(rope_type="cat", global_pool="avg", attn_type="rope", qk_norm=True),
    flat=dict(use_rot_pos_emb=False, class_token=False, global_pool="avg"),
)
on_kinds = pytest.mark.parametrize("kind", KINDS)


def eva(kind):
    torch.manual_seed(0)
    options = dict(use_rot_pos_emb=True, global_pool="token", head_init_scale=0) | KINDS[kind]
    model = Eva(32, 4, embed_dim=48, depth=4, num_heads=3, num_classes=7, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model.eval()


def images(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@on_kinds
@torch.no_grad()
def test_at_rate_1_it_is_timms(kind):
    model = eva(kind)
    logits, maps = model(images()), model.forward_intermediates(images(), intermediates_only=True)
    assert evit.reduce(model, "evit", 1.0) is model
    torch.testing.assert_close(model(images()), logits, atol=1e-5, rtol=0)
    for a, b in zip(
        model.forward_intermediates(images(), intermediates_only=True), maps, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def plainly(model, x, name):
    """Logits of drop or of merge, with whole attention matrices and rotated queries and keys."""
    x, rope = model._pos_embed(model.patch_embed(x))
    x, P = model.norm_pre(x), model.num_prefix_tokens
    sizes = torch.ones_like(x[:, :, 0])
    if rope is not None:
        rope = rope.expand(len(x), -1, -1)[:, None]
    counts = dict(zip(AT, COUNTS, strict=True))
    for i, block in enumerate(model.blocks):
        attn, y = block.attn, block.norm1(x)
        if attn.qkv is None:
            q, k, v = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
        else:
            biased = getattr(attn, "q_bias", None) is not None
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if biased else 0
            q, k, v = (attn.qkv(y) + bias).chunk(3, 2)
        q, k, v = (t.unflatten(2, (3, 16)).transpose(1, 2) for t in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            for t in (q, k):
                t[:, :, P:] = apply_rot_embed_cat(t[:, :, P:], rope, half=attn.rotate_half)
        bias = sizes.log()[:, None, None] if name == "merge" else 0
        attention = (q @ k.mT / 4 + bias).softmax(-1)
        out = attn.proj(attn.norm((attention @ v).transpose(1, 2).flatten(2)))
        x = x + (out if block.gamma_1 is None else block.gamma_1 * out)
        if i in counts:
            row = attention[:, :, 0] if model.cls_token is not None else attention.mean(2)
            kept = row.mean(1)[:, P:].topk(counts[i]).indices
            unit = F.normalize(x[:, P:], dim=2)
            tokens, weight = [], []
            for b, index in enumerate(kept):
                cosine, host = (unit[b] @ unit[b, index].T).max(1)
                host[index], cosine[index] = torch.arange(len(index)), 1.0
                member = F.one_hot(host, len(index)).T.to(x)
                share = member / member.sum(1, keepdim=True)
                tokens.append(share @ x[b, P:] if name == "merge" else x[b, P:][index])
                weight.append((member @ (sizes[b, P:] * cosine)).clamp(1))
            x = torch.cat([x[:, :P], torch.stack(tokens)], 1)
            sizes = torch.cat([sizes[:, :P], torch.stack(weight)], 1)
            if rope is not None:
                rope = torch.stack([r[:, index] for r, index in zip(rope, kept, strict=True)])
        out = block.mlp(block.norm2(x))
        x = x + (out if block.gamma_2 is None else block.gamma_2 * out)
    if name == "merge" and model.global_pool == "avg":
        share = sizes[:, P:, None] / sizes[:, P:, None].mean(1, keepdim=True)
        x = torch.cat([x[:, :P], model.norm(x[:, P:]) * share], 1)
        return model.forward_head(x)
    return model.forward_head(model.norm(x))


@on_kinds
@pytest.mark.parametrize("name", ["drop", "merge"])
@torch.no_grad()
def test_positions_go_with_the_tokens(kind, name):
    model, x = eva(kind).double(), images().double()
    expected = plainly(model, x, name)
    reduced = evit.reduce(model, name, counts=COUNTS, at=AT)
    torch.testing.assert_close(reduced(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_every_method_reduces_learns_and_accounts_for_the_patches(name):
    model = evit.reduce(eva("dinov3"), name, 0.6, at=AT).eval()
    with torch.no_grad():
        _, source, maps = model(images(), return_source=True, return_map=True)
    assert source.shape == (2, 64) and source.max() <= 4 + model.tokens_per_block()[-1]
    assert maps.shape == (2, 48, 8, 8)
    model.train()(images()).square().sum().backward()
    parts = [n for n, p in model.named_parameters() if p.grad is None]
    assert not parts, parts


@torch.no_grad()
def test_images_of_another_size_and_one_graph():
    model = evit.reduce(eva("resizes"), "cover", 0.6)
    assert model(images(size=48)).shape == (2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()))


def test_macs_count_every_matrix_product():
    model = evit.reduce(eva("averages"), "drop", 1.0)
    executed, published = measure.count_macs(model, executed=True), measure.count_macs(model)
    assert executed <= published <= 1.2 * executed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(use_post_norm=True), "block 0 of Eva is a EvaBlockPostNorm"),
        (dict(attn_type="rope", num_kv_heads=1, qkv_fused=False), "with a gate or shared keys"),
        (dict(use_rot_pos_emb=True, rope_type="mixed"), "its own rotary positions in each block"),
    ],
)
def test_what_cannot_be_served_is_named(options, reason):
    with pytest.raises(ValueError, match=reason):
        evit.reduce(Eva(32, 4, embed_dim=48, depth=2, num_heads=3, **options), "evit")


def test_an_attention_pool_is_counted():
    model = Eva(32, 4, embed_dim=48, depth=2, num_heads=3, global_pool="map", class_token=False)
    assert measure.count_macs(evit.reduce(model, "tome", 0.7), executed=True) > 0
    assert all(p.requires_grad for p in model.parameters())
