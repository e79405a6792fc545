"""DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034): predictors choose the tokens to keep.

Before each block in `at`, a small learned network scores the tokens; int(N * product of the rates)
tokens are kept and the others dropped. Cost: 13/8 C^2 products per token for the network. Training
removes no token: decisions are sampled, and the attention is masked.
"""

import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit.reducers.base import Reducer
from evit.reducers.blocks import Step
from evit.reducers.tokens import Reduction, Seen


class Predictor(nn.Module):
    """Predict log-probabilities (B, N, 2) of keeping and dropping each token (PredictorLG), by
    features that are half its own, half the mean over the tokens still kept."""

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        wide = nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU()
        self.out_conv = nn.Sequential(*wide, nn.Linear(dim // 4, 2), nn.LogSoftmax(-1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BNC: Tensor, kept_BN: Tensor) -> Tensor:
        own, shared = self.in_conv(x_BNC).chunk(2, -1)
        kept_BN1 = kept_BN[:, :, None].float()
        total_B1C = (shared.float() * kept_BN1).sum(1, keepdim=True)
        mean = total_B1C / kept_BN1.sum(1, keepdim=True).clamp(1)  # of no token: 0, not NaN
        return self.out_conv(torch.cat([own, mean.to(own.dtype).expand_as(own)], -1))


class DynamicViT(Reducer):
    """Keep the tokens that a learned predictor prefers: at place s, N times the product of the
    first s rates, rounded down."""

    name = "dynamicvit"
    stage = "input"
    masked = True  # False: a Squeeze without predictors
    published_names = {"score_predictor.": "reducer.predictors."}

    def build(self, dim: int) -> None:
        if self.masked:
            self.predictors = nn.ModuleList(Predictor(dim) for _ in self.at)

    def shares(self) -> Any:
        return itertools.accumulate(self.keep_rate, operator.mul)

    def kept(self, n: int) -> list[int]:
        if self.masked and not self.given:
            return [int(n * share) for share in self.shares()]
        return super().kept(n)

    def scores(self, i: int, seen: Seen) -> Tensor:
        """Log-probability of keeping each token, by the predictor of place i, (B, N)."""
        x_BNC = seen.image()
        return self.predictors[i](x_BNC, torch.ones_like(x_BNC[:, :, 0]))[:, :, 0]

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        index_BK = self.scores(i, seen).topk(num_kept, sorted=False).indices
        return Reduction(index_BK, seen.num_prefix)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * (13 * dim**2 // 8 + 2 * dim)

    def masked_features(self, model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Training forward pass: all tokens (B, T, C) after all blocks, and each decision (B, N): 1
        for tokens kept by this predictor and all earlier ones (straight-through Gumbel-softmax)."""
        P = model.num_prefix_tokens
        prefix, kept = x.new_ones(len(x), P), x.new_ones(len(x), x.shape[1] - P)
        decisions: list[Tensor] = []
        rope = model.rotary(x.shape[1] - P)
        for i, block in enumerate(model.blocks):
            if i in self.at:
                log_prob = self.predictors[len(decisions)](x[:, P:], kept)
                kept = kept * F.gumbel_softmax(log_prob.float(), hard=True)[:, :, 0]
                decisions.append(kept)
            step = Step(P, mask_BT=torch.cat([prefix, kept], 1)) if decisions else None
            x = model.run(block, x, step=step, rope=rope)
        return x, decisions

    def losses(
        self, model: Any, images: Tensor, targets: Tensor, criterion: Any, teacher: Any, recipe: Any
    ) -> dict[str, Tensor]:
        """Cross-entropy, the loss on the share of kept tokens and, with a dense teacher of the same
        architecture, distillation from its class logits and its tokens (see token_outputs)."""
        x, decisions = self.masked_features(model, model.embed(images))
        x = model.norm(x)
        pairs = zip(decisions, self.shares(), strict=True)
        squares = [(kept.float().mean(1) - share).square().mean() for kept, share in pairs]
        parts = dict(ratio_loss=torch.stack(squares).mean())
        logits, features = (model.forward_head(x), x) if teacher is None else model.token_outputs(x)
        loss = criterion(logits, targets) + recipe.ratio_weight * parts["ratio_loss"]
        if teacher is not None:
            with torch.no_grad():
                wanted, wanted_features = teacher.token_outputs(teacher.forward_features(images))
            parts["class_distillation"] = divergence(logits, wanted).mean()
            distance = model.token_distance(features, wanted_features)
            kept = decisions[-1].detach()
            parts["token_distillation"] = (distance * kept).sum() / kept.sum().clamp(1)
            total = parts["class_distillation"] + parts["token_distillation"]
            loss = loss + recipe.distill_weight * total
        return dict(loss=loss, **parts)


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits (..., K); returns (...)."""
    student, teacher = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
