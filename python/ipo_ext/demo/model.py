"""The policy, a small causal transformer whose hidden states and LM head are separate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm causal self-attention and a GELU MLP: [B, T, H] -> [B, T, H]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attend(self.attention_norm(hidden))
        update: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))
        return hidden + update

    def attend(self, hidden: Tensor) -> Tensor:
        """Causal multi-head attention: [B, T, H] -> [B, T, H]."""
        # [B, T, 3H] -> three of [B, heads, T, H / heads]
        query, key, value = (
            self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        update: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return update


class Policy(nn.Module):
    """A causal transformer. `forward` ends at the hidden states: the loss takes them as they are.

    Who wants logits applies `lm_head`.
    """

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states before the head: int64 [B, T] -> [B, T, H] in the weights' dtype."""
        positions = torch.arange(tokens.shape[1])
        hidden: Tensor = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in (*self.blocks, self.norm):
            hidden = block(hidden)
        return hidden


def token_logprobs(policy: Policy, tokens: Tensor) -> Tensor:
    """log p(tokens[:, t + 1] | tokens[:, : t + 1]): int64 [B, T] -> fp32 [B, T - 1]."""
    logits: Tensor = policy.lm_head(policy(tokens[:, :-1])).float()
    labels = tokens[:, 1:]
    return logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
