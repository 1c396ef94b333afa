"""DeepSpeed 0.9.5's gates and MoE layer (deepspeed/moe/sharded_moe.py) in PyTorch, told from what they do.

Tokens ask for their experts one after another, and an expert hands out its slots until there are none left. Where
DeepSpeed draws random numbers, these functions are given them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Gate(NamedTuple):
    """What a gate decides about S tokens and E experts with C slots.

    Attributes:
        combine: weight of each token in each slot of each expert, [S, E, C]; zero where it is not.
        kept: per choice the tokens that have found a slot, bool [S, k].
        experts: their choices, [S, k].
        aux: the load-balancing loss.
    """

    combine: torch.Tensor
    kept: torch.Tensor
    experts: torch.Tensor
    aux: torch.Tensor


def num_slots(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    """C. The factor is a float32 tensor in DeepSpeed, so the product is rounded to float32 before it is rounded up."""
    return max(int(torch.ceil(torch.tensor(factor) * (num_tokens / num_experts))), min_capacity)


def deal(experts: torch.Tensor, queue: Iterable[tuple[int, int]], num_experts: int, slots: int) -> torch.Tensor:
    """The slot of each choice [S, k] when (token, rank) pairs are served in the order of ``queue``; -1 where none."""
    places, given = torch.full_like(experts, -1), [0] * num_experts
    for token, rank in queue:
        expert = int(experts[token, rank])
        if given[expert] < slots:
            places[token, rank] = given[expert]
            given[expert] += 1
    return places


def in_turn(order: Sequence[int], top_k: int) -> list[tuple[int, int]]:
    """First choices of all tokens in their order, then second choices, and so on."""
    return [(token, rank) for rank in range(top_k) for token in order]


def gate(p: torch.Tensor, experts: torch.Tensor, places: torch.Tensor, slots: int, renormalise: bool) -> Gate:
    """Weights of the choices that have a slot, in float32 as everything in these gates."""
    (tokens, num_experts), kept = p.shape, places >= 0
    weights = p.gather(1, experts) * kept
    if renormalise:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    combine = torch.zeros(tokens, num_experts, slots)
    for rank in range(experts.shape[1]):
        of = kept[:, rank].nonzero()[:, 0]
        combine = combine.index_put((of, experts[of, rank], places[of, rank]), weights[of, rank], accumulate=True)
    first = nn.functional.one_hot(experts[:, 0], num_experts).float()
    aux = num_experts * (p.mean(dim=0) * first.mean(dim=0)).sum()
    return Gate(combine, kept, experts, aux)


def top2gating(logits: torch.Tensor, factor: float, min_capacity: int, noise: torch.Tensor | None = None) -> Gate:
    """Two experts per token, by position; ``noise`` [S, E] is DeepSpeed's Gumbel draw."""
    p = torch.softmax(logits, dim=1)
    first = p.argmax(dim=1, keepdim=True)
    noisy = logits.detach() if noise is None else logits.detach() + noise
    second = noisy.scatter(1, first, -torch.inf).argmax(dim=1, keepdim=True)
    experts = torch.cat([first, second], dim=1)
    slots = num_slots(*logits.shape, 2 * factor, min_capacity)
    places = deal(experts, in_turn(range(len(logits)), 2), logits.shape[1], slots)
    return gate(p, experts, places, slots, renormalise=True)


def top1gating(logits: torch.Tensor, factor: float, min_capacity: int, uniform: torch.Tensor) -> Gate:
    """One expert per token; those with the largest draws ``uniform`` [S] keep their place at it (``use_rts``)."""
    p = torch.softmax(logits, dim=1)
    experts = p.argmax(dim=1, keepdim=True)
    slots = num_slots(*logits.shape, factor, min_capacity)
    drawn = uniform[:, None] * nn.functional.one_hot(experts[:, 0], logits.shape[1])  # [S, E]
    winners = drawn.topk(min(slots, len(logits)), dim=0).indices
    kept = torch.zeros_like(drawn, dtype=torch.bool).scatter(0, winners, True).gather(1, experts)
    # Winners are then numbered by position.
    order = [token for token in range(len(logits)) if kept[token]]
    return gate(p, experts, deal(experts, in_turn(order, 1), logits.shape[1], slots), slots, renormalise=False)


def moe_layer(x: torch.Tensor, decided: Gate, experts: Sequence[nn.Module]) -> torch.Tensor:
    """y [S, D] of x [S, D]: tokens are put into slots, each expert runs on its own, and slots are added up."""
    dispatched = torch.einsum("sec,sd->ecd", (decided.combine > 0).float(), x)
    made = torch.stack([expert(slots) for expert, slots in zip(experts, dispatched, strict=True)])  # [E, C, D]
    return torch.einsum("sec,ecd->sd", decided.combine, made)
