"""ATS (Fayyaz et al., ECCV 2022, arXiv 2111.15667): sample tokens by the CDF of their scores.

The score of a token is its class attention times the norm of its value, summed over the heads.
K evenly spaced points of the cumulative sum each choose the nearest token; a token chosen twice
counts once, so easy images keep fewer tokens. This code keeps K tokens and hides duplicates from
the attention: same logits, static shapes, and an image does not depend on the rest of its batch.
"""

import torch
import torch.nn.functional as F

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen


class ATS(Reducer):
    """Keep at most K tokens, sampled by class attention and value."""

    name = "ats"
    selects = True
    proportional = True

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        lengths_BHT = seen.v_BHTD.norm(dim=-1)
        score_BN = (seen.rows() * lengths_BHT).sum(1)[:, seen.num_prefix :].detach().float()
        cdf_BN = (score_BN / (score_BN.sum(1, keepdim=True) + 1e-6)).cumsum(1)
        K = torch.arange(num_kept, device=cdf_BN.device)
        points_K = (2 * K + 1) / (2 * num_kept + 2)
        index_BK = (points_K[:, None] - cdf_BN[:, None]).abs().argmin(2)
        again_BK = F.pad(index_BK.diff(), (1, 0), value=1) == 0
        first_BK = torch.where(again_BK, 0, K).cummax(1).values  # first of each run of duplicates
        host_BN = torch.full_like(cdf_BN, -1, dtype=torch.int64).scatter(1, index_BK, first_BK)
        sizes_BT = F.pad((~again_BK).float(), (seen.num_prefix, 0), value=1.0)
        return Reduction(index_BK, seen.num_prefix, host_BN=host_BN, sizes_BT=sizes_BT)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * dim + n * k
