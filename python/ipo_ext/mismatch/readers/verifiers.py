"""Traces of verifiers, as prime-rl keeps them: trees of messages, each branch a conversation.

Log-probabilities are compact, one for each token that the mask calls sampled, and rounded to four
decimals. A message that several branches share is counted in the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..rollouts import BadRecord, Rollout, booleans, check_length, checked, integers, label, numbers

NAME = "verifiers traces"
_ENVIRONMENT = ("env_name", "env_id", "environment")


def matches(record: Any) -> bool:
    return bool(_traces(record))


def rollouts_in(record: dict[str, Any], where: str) -> Iterator[Rollout]:
    for trace in _traces(record):
        nodes = trace["nodes"]
        if not any(node.get("token_ids") for node in nodes):
            raise BadRecord(
                "nodes: none has token_ids, as in evaluations over an API; sample with the "
                "renderer client, which keeps them"
            )
        named = [holder.get(name) for holder in (trace, record) for name in _ENVIRONMENT]
        environment = next((label(name) for name in named if isinstance(name, str)), None)
        counted: set[int] = set()
        for leaf in _leaves(nodes):
            path = _path(nodes, leaf)
            rollout = _branch([nodes[place] for place in path], path, counted, where, environment)
            counted.update(path)
            if rollout is not None:
                yield rollout


def _traces(record: Any) -> list[dict[str, Any]]:
    """A trace by itself, or those of an episode."""
    if not isinstance(record, dict):
        return []
    several = record.get("traces")
    candidates = several if isinstance(several, list) else [record]
    return [each for each in candidates if isinstance(each, dict) and _is_tree(each.get("nodes"))]


def _is_tree(nodes: Any) -> bool:
    return isinstance(nodes, list) and all(
        isinstance(node, dict) and "parent" in node for node in nodes
    )


def _leaves(nodes: list[dict[str, Any]]) -> list[int]:
    parents = {node["parent"] for node in nodes}
    return [place for place in range(len(nodes)) if place not in parents]


def _path(nodes: list[dict[str, Any]], leaf: int) -> list[int]:
    """Places from the root to a leaf."""
    path = [leaf]
    while (parent := nodes[path[-1]]["parent"]) is not None:
        if not 0 <= parent < len(nodes) or parent in path:
            raise BadRecord(f"nodes[{path[-1]}].parent: expected an earlier node, got {parent!r}")
        path.append(parent)
    return path[::-1]


def _branch(
    nodes: list[dict[str, Any]],
    path: list[int],
    counted: set[int],
    where: str,
    environment: str | None,
) -> Rollout | None:
    """A conversation; None if all that was sampled in it has been counted."""
    token_ids, sampled, inference, trainer = [], [], [], []
    for node, place in zip(nodes, path, strict=True):
        ids = integers(f"nodes[{place}].token_ids", node.get("token_ids") or [])
        mask = booleans(f"nodes[{place}].mask", node.get("mask") or [False] * len(ids))
        check_length(f"nodes[{place}].mask", mask, len(ids), "token_ids")
        token_ids.append(ids)
        inference.append(_spread(node, place, "logprobs", mask))
        trainer.append(_spread(node, place, "trainer_logprobs", mask))
        sampled.append(mask & (place not in counted))
    mask = torch.cat(sampled)
    if not mask.any():
        return None
    trained = torch.cat(trainer)
    return checked(
        Rollout(
            where,
            torch.cat(token_ids),
            mask,
            torch.cat(inference),
            None if trained[mask].isnan().all() else trained,
            environment=environment,
        )
    )


def _spread(node: dict[str, Any], place: int, name: str, mask: torch.Tensor) -> torch.Tensor:
    """float64 ``[tokens]`` of a compact list; NaN where nothing was sampled or is known."""
    values = torch.full((len(mask),), torch.nan, dtype=torch.float64)
    if node.get(name):
        compact = numbers(f"nodes[{place}].{name}", node[name])
        check_length(f"nodes[{place}].{name}", compact, int(mask.sum()), "its mask")
        values[mask] = compact
    return values
