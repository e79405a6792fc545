"""Follow patches through reductions: ids of kept ones, their final token, and dense maps."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evit.reducers import Reducer, Reduction


def moved(reduction: Reduction, place_BN: Tensor, num_tokens: int) -> Tensor:
    """Update the token index of each patch by a reduction of num_tokens tokens; -1: dropped."""
    host_BN = reduction.hosts(num_tokens).gather(1, place_BN.clamp(0))
    return torch.where(place_BN >= 0, host_BN, place_BN)


def source(found: list[Reduction], ids_BN: Tensor, num_prefix: int) -> Tensor:
    """Index of the final token of each patch, prefix tokens included, (B, N); -1: dropped."""
    place_BN, n = ids_BN, ids_BN.shape[1]
    for reduction in found:
        place_BN, n = moved(reduction, place_BN, n), reduction.num_left
    return torch.where(place_BN >= 0, place_BN + num_prefix, place_BN)


def survivors(found: list[Reduction], reducer: Reducer, ids_BN: Tensor) -> list[Tensor]:
    """Ids of the patches kept at each place (also if all are kept); -1 is a fused token."""
    n, kept, left = ids_BN.shape[1], [], iter(found)
    for k in reducer.kept(n):
        if k < n:
            reduction = next(left)
            ids_BN, n = reduction.ids(ids_BN), reduction.num_left
        kept.append(ids_BN[:, :k])
    return kept


def put_back(states: list[Any], num_prefix: int) -> Iterator[Tensor]:
    """Yield dense tokens (B, P + N, C) after each block: each patch has the token it went into.

    A dropped patch has its state from before the block that dropped it. `states` are the embedded
    tokens, then for each block its reduction (if any) and its tokens.
    """
    first, *later = states
    map_BNC = first[:, num_prefix:]
    n = map_BNC.shape[1]
    place_BN = torch.arange(n, device=first.device).expand(first.shape[0], -1)
    reduced = False
    for state in later:
        if type(state) is Reduction:
            place_BN, n, reduced = moved(state, place_BN, n), state.num_left, True
            continue
        if reduced:
            index = place_BN.clamp(0)[..., None].expand_as(map_BNC)
            tokens = state[:, num_prefix:].gather(1, index)
            map_BNC = torch.where(place_BN[..., None] >= 0, tokens, map_BNC)
        else:
            map_BNC = state[:, num_prefix:]
        yield torch.cat([state[:, :num_prefix], map_BNC], 1)


def weigh(x: Tensor, sizes_BT: Tensor, num_prefix: int) -> Tensor:
    """Multiply image tokens by their sizes, normalised to a mean weight of 1."""
    sizes = sizes_BT[:, num_prefix:, None]
    share = (sizes * (sizes.shape[1] / sizes.sum(1, keepdim=True))).to(x.dtype)
    return torch.cat([x[:, :num_prefix], x[:, num_prefix:] * share], 1)
