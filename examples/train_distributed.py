"""Trains a small decoder over ranks: FSDP2 over data parallel x context parallel, packed sequences
whose tokens the context-parallel ranks share, one verdict on each sequence, metrics of all ranks, a
checkpoint that any number of ranks resumes.

    torchrun --nproc-per-node 4 examples/train_distributed.py --folder run

On CPUs by gloo, on GPUs by nccl. The loss is the one-process run's to rounding. A rank that dies
ends all: torchrun stops the others, and without it they stop waiting after TIMEOUT. The same
command then goes on from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ipo_ext import IPOConfig, IPOLMHead, IPOMetrics, LossBatch
from ipo_ext.distributed import local_sequences, normalizer

VOCABULARY, WIDTH, HEADS, LAYERS = 64, 32, 4, 2
PACKS, LENGTHS = 2, (24, 8, 40, 16, 8)  # packed batches of a step, and the sequences of each
TIMEOUT = timedelta(seconds=60)
CONFIG = IPOConfig(rollout_min_ratio=0.2)  # a rule on whole sequences, which ranks share


# -------------------------------------------------------------------------------------------------
# What is learned from


@dataclass
class Pack:
    """A rank's tokens of a packed batch, and what the loss takes of them."""

    tokens: torch.Tensor  # [local]
    labels: torch.Tensor  # [local], shifted before the batch was sharded
    batch: LossBatch
    order: torch.Tensor  # [tokens], where each token of the batch lies among those of all ranks
    mask: torch.Tensor  # [local, tokens], whom each token of this rank may attend to
    index: torch.Tensor  # [local], this rank's tokens

    @staticmethod
    def of(step: int, number: int, cp_mesh: DeviceMesh, device: torch.device) -> Pack:
        """The same whatever the number of ranks: the seed is the step's and the pack's."""
        generator = torch.Generator().manual_seed(1000 * step + number)
        total = sum(LENGTHS)
        tokens = torch.randint(VOCABULARY, (total,), generator=generator)
        cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        labels = tokens.roll(-1)
        is_last = sequence != sequence.roll(-1)
        sampled = -math.log(VOCABULARY) + 0.5 * torch.randn(total, generator=generator)
        # What to learn: the successor of each token is even where the token is.
        advantages = torch.where((labels - tokens) % 2 == 0, 1.0, -1.0)

        ranks = cp_mesh.size()
        parts = [local_sequences(cu_seqlens, rank, ranks, "zigzag") for rank in range(ranks)]
        ends, ids, index = parts[cp_mesh.get_local_rank()]
        order = torch.cat([part.token_index for part in parts]).argsort()
        places = torch.arange(total)
        may_see = (sequence[index, None] == sequence) & (index[:, None] >= places)
        batch = LossBatch(
            sampled[index],
            advantages[index],
            ~is_last[index],
            cu_seqlens=ends,
            sequence_ids=ids,
            num_sequences=len(LENGTHS),
            cp_group=cp_mesh.get_group(),
        ).to(device)
        local = (tokens[index], labels[index])
        others = (order, may_see, index)
        tokens_here, labels_here, order, may_see, index = (
            tensor.to(device) for tensor in (*local, *others)
        )
        return Pack(tokens_here, labels_here, batch, order, may_see, index)


# -------------------------------------------------------------------------------------------------
# The decoder


class GatherTokens(torch.autograd.Function):
    """Keys or values of all context-parallel ranks in the batch's own order; its backward pass adds
    up what the ranks have of each gradient."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, pack: Pack, group: dist.ProcessGroup) -> Any:
        ctx.index, ctx.group = pack.index, group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)[pack.order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.index], None, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: torch.Tensor, pack: Pack, group: dist.ProcessGroup) -> torch.Tensor:
        heads = self.qkv(self.before_attention(hidden)).view(len(hidden), 3, HEADS, -1)
        queries, keys, values = heads.unbind(1)
        keys, values = (GatherTokens.apply(part, pack, group) for part in (keys, values))
        attended = F.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (queries, keys, values)), attn_mask=pack.mask
        )
        hidden = hidden + self.out(attended.transpose(0, 1).flatten(1))
        return hidden + self.mlp(self.before_mlp(hidden))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = IPOLMHead(nn.Linear(WIDTH, VOCABULARY, bias=False), CONFIG)

    def forward(self, pack: Pack, group: dist.ProcessGroup) -> Any:
        hidden = self.embedding(pack.tokens)
        for block in self.blocks:
            hidden = block(hidden, pack, group)
        return self.head(self.norm(hidden), pack.labels, pack.batch)


# -------------------------------------------------------------------------------------------------
# The run


class Run:
    """A model, its optimizer and a checkpoint, over the ranks of this job."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        ranks = dist.get_world_size()
        cp = 2 if ranks % 2 == 0 else 1
        self.world = init_device_mesh(device.type, (ranks,))
        self.mesh = init_device_mesh(device.type, (ranks // cp, cp), mesh_dim_names=("dp", "cp"))
        self.folder, self.device = folder, device
        torch.manual_seed(0)
        self.model = Decoder().to(device)
        for block in self.model.blocks:
            fully_shard(block, mesh=self.world)
        fully_shard(self.model, mesh=self.world)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.step = 0

    def packs(self) -> list[Pack]:
        """This data-parallel rank's share of the step's."""
        dp, cp = self.mesh["dp"], self.mesh["cp"]
        mine = range(dp.get_local_rank(), PACKS, dp.size())
        return [Pack.of(self.step, number, cp, self.device) for number in mine]

    def train_step(self) -> tuple[float, IPOMetrics]:
        """The loss and the metrics of all ranks."""
        packs = self.packs()
        # FSDP2 averages gradients over all of these ranks, which all have different tokens.
        counts = [pack.batch.loss_mask.sum() for pack in packs]
        count = normalizer(sum(counts, torch.zeros_like(counts[0])), self.world)
        total, metrics = torch.zeros((), dtype=torch.float64, device=self.device), []
        for pack in packs:
            pack.batch.normalizer = count
            out = self.model(pack, self.mesh["cp"].get_group())
            out.loss.backward()
            total += out.loss.detach()
            metrics.append(out.metrics.total())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        dist.all_reduce(total)
        return float(total) / self.world.size(), sum(metrics[1:], metrics[0]).all_reduce()

    def save(self) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "step": self.step}
        checkpoint.save(state, checkpoint_id=self.folder / f"step-{self.step}")

    def resume(self) -> None:
        """From the last checkpoint that is whole, if there is one, of any number of ranks."""
        whole = [path.parent for path in self.folder.glob("step-*/.metadata")]  # written last
        if not whole:
            return
        latest = max(whole, key=lambda path: int(path.name.removeprefix("step-")))
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        checkpoint.load(state, checkpoint_id=latest)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of checkpoints and log")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--die-at", type=int, default=-1, help="the step before which rank 1 dies")
    asked = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    asked.folder.mkdir(parents=True, exist_ok=True)
    run = Run(asked.folder, device)
    run.resume()
    while run.step < asked.steps:
        if run.step == asked.die_at and dist.get_rank() == 1:
            os._exit(1)
        loss, metrics = run.train_step()
        if dist.get_rank() == 0:
            row = {"step": run.step, "loss": loss, **metrics.tolist()}
            with (asked.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(
                f"step {run.step:3d}  loss {loss:+.6f}  dropped {row['is_masked']:.3f}", flush=True
            )
        if run.step % asked.save_every == 0:
            run.save()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
