"""What other people's code does to a ViT's modules works on a reduced one as on the dense one."""

import copy
import io
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torchvision.models import VisionTransformer as TorchvisionViT

import evit
from tests.reducers.tiny import gradients, images, logits_of, reduced, run, vit

CASES = {
    "dense": None,
    "rate 1": ("evit", dict(keep_rate=1.0)),
    "fused": ("evit", {}),
    "dropped": ("evit", dict(fusion=False)),
    "tome": ("tome", {}),
    "dynamicvit": ("dynamicvit", {}),
    "mctf": ("mctf", {}),  # takes over its blocks
}
on_all = pytest.mark.parametrize("case", CASES)
LINEARS = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"


def build(case, **kwargs):
    if CASES[case] is None:
        return vit(**kwargs)
    name, options = CASES[case]
    return reduced(name, vit(**kwargs), **options)


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def replace(model, path, make):
    """Put make(linear) where the linear was, in every block."""
    for block in model.blocks:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))


@on_all
@torch.no_grad()
def test_hooks_are_called_once_for_each_block(case):
    model, seen = build(case), []
    for i, block in enumerate(model.blocks):
        for path in ("", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp", *LINEARS[2:], "mlp.act"):
            hook = partial(lambda place, *_: seen.append(place), (i, path))
            block.get_submodule(path).register_forward_hook(hook)
    model(images())
    assert len(set(seen)) == 9 * len(model.blocks)
    again = {place for place in seen if seen.count(place) > 1}
    if case == "mctf":  # whose values come from tokens merged after the queries and keys
        again -= {(i, path) for i in model.drop_loc for path in ("norm1", "attn.qkv")}
    assert again == set()


@on_all
@torch.no_grad()
def test_hooks_change_no_logits(case):
    model, x = build(case), images()
    expected = model(x)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    same(model(x), expected)


@on_all
@torch.no_grad()
def test_a_hook_on_fc1_keeps_what_the_layer_gave(case):
    """Not what the GELU makes of it, be it in place."""
    model, seen = build(case), []
    for block in model.blocks:
        block.mlp.fc1.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
    model(images())
    assert len(seen) == len(model.blocks)
    for fc1, into, out in seen:
        same(out, F.linear(into, fc1.weight, fc1.bias))


class Adapter(nn.Module):
    """A low-rank addition to a frozen linear layer, which shows that layer's weight as its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, g = base.requires_grad_(False), torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=g) / 7)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=g) / 3)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    @torch.no_grad()
    def merged(self):
        self.base.weight += self.up @ self.down
        return self.base


@on_all
def test_low_rank_adapters_learn_and_merge(case):
    model, x = build(case).double(), images().double()
    plain = model(x)
    for path in LINEARS:
        replace(model, path, lambda linear: Adapter(linear).double())
    grads = [g for name, g in gradients(model, x).items() if name.endswith((".down", ".up"))]
    assert len(grads) == 2 * len(LINEARS) * len(model.blocks)
    assert all(grad is not None and grad.any() for grad in grads)
    with torch.no_grad():
        expected = run(model.eval(), x)
        for path in LINEARS:
            replace(model, path, Adapter.merged)
        same(run(model, x), expected, 1e-9)
    assert (expected - plain).abs().max() > 0.01


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(1.5 * x)


def louder(linear):
    other = Louder(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    other.load_state_dict(linear.state_dict())
    return other


def scale(linear):
    linear.weight *= 1.5
    return linear


def hooked(method, hook):
    def wrap(linear):
        getattr(linear, method)(hook)
        return linear

    return wrap


WRAPS = {
    "a pre-hook": hooked("register_forward_pre_hook", lambda m, args: (1.5 * args[0],)),
    "a hook": hooked(
        "register_forward_hook", lambda m, args, out: out + F.linear(args[0], 0.5 * m.weight)
    ),
    "a parametrization": lambda m: parametrize.register_parametrization(m, "weight", Scaled()),
    "a subclass": louder,
}


@on_all
@pytest.mark.parametrize("wrap", WRAPS)
@torch.no_grad()
def test_whatever_changes_a_linear_layer_is_heard(case, wrap):
    x, wrapped, plain = images().double(), build(case).double(), build(case).double()
    for path in LINEARS:
        replace(wrapped, path, WRAPS[wrap])
        replace(plain, path, scale)
    same(run(wrapped, x), run(plain, x), 1e-9)


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@on_all
def test_each_block_may_be_sharded(gloo, case):
    model, x = build(case), images()
    plain = gradients(copy.deepcopy(model), x)
    with torch.no_grad():
        expected = run(model, x)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        same(run(model, x), expected)
    sharded = gradients(model, x)
    for name, gradient in sharded.items():
        same(gradient.full_tensor(), plain[name], 1e-4)


@pytest.mark.filterwarnings("ignore")
@on_all
@torch.no_grad()
def test_dynamic_quantization_is_near(case):
    model, x = build(case), images()
    expected = model(x)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(block.attn.qkv) for block in quantized.blocks}
    assert kinds == {torch.ao.nn.quantized.dynamic.Linear}
    limit = 0.99 if case in ("dense", "rate 1") else 0.95
    assert F.cosine_similarity(quantized(x), expected).min() > limit


@on_all
def test_it_can_be_traced_while_gradients_are_enabled(case):
    model, x = build(case), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    other = images(4)[2:]
    same(traced(other), model(other))


@on_all
@torch.no_grad()
def test_a_batch_of_no_images_has_no_logits(case):
    model = build(case)
    assert model(images(0)).shape == (0, 7)
    if case != "dense":
        logits, source = model(images(0), return_source=True)
        assert logits.shape == (0, 7) and source.shape == (0, 64)


@on_all
@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_a_whole_model_is_pickled_saved_and_copied(case, distilled):
    model, x, file = build(case, distilled=distilled), images(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for other in (*copies, torch.load(file, weights_only=False)):
        assert type(other) is type(model)
        same(other(x), model(x))
    if case != "dense":
        before = model.tokens_per_block()
        model.set_keep_rate(0.6)
        assert all(other.tokens_per_block() == before for other in copies)


@pytest.mark.slow
@torch.no_grad()
def test_a_process_that_never_reduced_a_model_reads_one():
    models, x = [build(case, distilled=True) for case in CASES], images()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        others = process.submit(logits_of, pickle.dumps(models), x.numpy()).result()
    for model, other in zip(models, others, strict=True):
        same(torch.from_numpy(other), model(x))


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = vit()


WRAPPED = {
    "DataParallel": (nn.DataParallel, r"model\.module"),
    "OptimizedModule": (lambda m: torch.compile(m, backend="eager"), r"model\._orig_mod"),
    "Lit": (lambda _: Lit(), r"not a timm VisionTransformer.*model\.model"),
    "VisionTransformer of torchvision": (
        lambda _: TorchvisionViT(32, 4, 1, 3, 48, 96, num_classes=7),
        r"timm\.create_model",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_something_wrapped_is_named_with_what_to_hand_over(kind):
    wrap, way_out = WRAPPED[kind]
    for convert in (evit.reduce, lambda model: evit.reduce(model, "tome")):
        with pytest.raises(ValueError, match=f"{kind}.*{way_out}") as error:
            convert(wrap(vit()))
        assert "\n" not in str(error.value)


def test_distributed_data_parallel_is_named_too(gloo):
    wrapped = nn.parallel.DistributedDataParallel(vit())
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*model\.module"):
        evit.reduce(wrapped)
