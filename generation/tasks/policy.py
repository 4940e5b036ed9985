"""A generator as the policy that it is sampled by, and what groups of its samples say about it.

Legend: B images, N codes, P prompts, G images of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from generation.model.transformer import LaytonGenTransformer
from generation.model.vocabulary import LinearHead
from generation.sampling.codes import SamplingOptions
from generation.sampling.shares import entropy
from generation.tasks.loss import next_code_losses, rows_at_once
from generation.text.encoders import TextFeatures


def policy_losses(
    transformer: LaytonGenTransformer,
    codes: Tensor,
    text: TextFeatures,
    *,
    sampling: SamplingOptions,
    guidance_scale: float = 1.0,
) -> Tensor:
    """-log of the probability with which `generation.sampling.decoding.generate_codes` draws each code.

    Guided logits are linear in the features, so that they cost no second set of logits. The unconditional half has no
    gradient: what it says is taken as given. Drawing is done in float32: under autocast this is another distribution.

    Args:
        transformer: The model.
        codes: (B, N) int64.
        text: Features (B, L, dim) with their mask.
        sampling: Temperature and ``min_entropy``; nothing else.
        guidance_scale: Of classifier-free guidance, the same for all codes.

    Returns:
        (B, N) float32.

    Raises:
        ValueError: If sampling is greedy or leaves codes out.
    """
    require_policy(sampling)
    head = transformer.vocabulary.linear_head(transformer.hidden(codes, text.features, text.mask, layout=text.layout))
    features = head.features
    if guidance_scale != 1.0:
        with torch.no_grad():
            none = transformer.hidden(codes, transformer.null_condition(text.features), text.mask)
            unguided = transformer.vocabulary.linear_head(none).features
        features = unguided + guidance_scale * (features - unguided)
    factor = features.new_full((*features.shape[:-1], 1), 1 / sampling.temperature)
    if sampling.min_entropy:
        sure = (entropies(head) < sampling.min_entropy)[..., None]
        features = torch.where(sure, head.features, features)
        factor = torch.where(sure, 1.0, factor)
    if head.bias is None:
        return next_code_losses(LinearHead(features * factor, head.weight, None), codes)
    scaled = torch.cat([features, torch.ones_like(factor)], dim=-1) * factor  # the bias is divided, too
    return next_code_losses(LinearHead(scaled, torch.cat([head.weight, head.bias[:, None]], dim=1), None), codes)


def require_policy(sampling: SamplingOptions) -> None:
    """Refuse sampling that leaves codes out: they would have no probability whose gradient could be followed.

    Raises:
        ValueError: If it is greedy, or has top-k or top-p.
    """
    if sampling.greedy or sampling.top_k is not None or sampling.top_p < 1.0:
        raise ValueError(f"a policy must be able to draw every code: give temperature and min_entropy, got {sampling}")


@torch.no_grad()
def entropies(head: LinearHead) -> Tensor:
    """Entropy of each next code in nats, (B, N), without ever having all logits."""
    found = []
    with torch.autocast(head.features.device.type, enabled=False):
        rows = head.features.flatten(0, -2).float()
        weight, bias = head.weight.float(), head.bias
        for chunk in rows.split(rows_at_once(weight)):
            logits = chunk @ weight.T if bias is None else torch.addmm(bias.float(), chunk, weight.T)
            found.append(entropy(logits))
    return torch.cat(found).view(head.features.shape[:-1])


def most_telling(rewards: Tensor, kept: int) -> Tensor:
    """The best and the worst of each group, half of each (PODS, arXiv 2504.13818).

    Args:
        rewards: (P, G).
        kept: How many of each group, 2 to G.

    Returns:
        (P, kept) int64 places in the groups.
    """
    order = rewards.argsort(dim=1, descending=True, stable=True)
    best = kept // 2
    return torch.cat([order[:, :best], order[:, order.shape[1] - (kept - best) :]], dim=1)


def group_advantages(rewards: Tensor) -> Tensor:
    """How much better an image is than its group, in standard deviations (GRPO, arXiv 2402.03300).

    Args:
        rewards: (P, G).

    Returns:
        (P, G); 0 where all of a group are alike.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(spread > 1e-4, centred / spread.clamp_min(1e-4), 0.0)


def credit_advantages(credit: Tensor, group_size: int) -> Tensor:
    """How much better a place did than the mean of all places of its group that have credit.

    Args:
        credit: (P * G, N); 0 where there is none.
        group_size: G.

    Returns:
        (P * G, N); 0 where there is none.
    """
    groups = credit.view(-1, group_size, credit.shape[1])
    there = groups != 0
    mean = groups.sum((1, 2), keepdim=True) / there.sum((1, 2), keepdim=True).clamp_min(1)
    return torch.where(there, groups - mean, 0.0).view_as(credit)
