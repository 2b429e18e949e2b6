"""What stands for vLLM and for FlashAttention 3 around TRL's asynchronous trainer, on a CPU."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample


class Worker:
    """A rollout worker whose samples are there from the start; an empty queue raises, not hangs."""

    def __init__(self, samples: Iterable[RolloutSample]) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        self.versions: list[int] = []
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def update_model_version(self, version: int) -> None:
        self.versions.append(version)

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("no samples are left")


class Server:
    """TRL's client of a vLLM server, which it makes even where another worker samples."""

    logprobs_mode = "processed_logprobs"

    def __init__(self, *_: object) -> None:
        pass

    def wait_for_server_ready(self) -> None:
        pass

    def get_server_info(self) -> dict[str, dict[str, str]]:
        return {"model_config": {"logprobs_mode": self.logprobs_mode}}


class NoTransfer:
    """Weights that go to no server."""

    def init_weight_transfer(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None:
        pass

    def destroy(self) -> None:
        pass


def sample(
    prompt: list[int],
    completion: list[int],
    *,
    logprobs: list[float],
    mask: list[int] | None = None,
    advantage: float = 1.0,
    group: int = 0,
    version: int = 1,
) -> RolloutSample:
    """A scored completion; ``logprobs`` and ``mask`` are of its tokens."""
    context = [0] * len(prompt)
    return RolloutSample(
        prompt=[],
        completion=[],
        input_ids=np.array(prompt + completion),
        completion_mask=np.array(context + (mask or [1] * len(completion))),
        old_log_probs=np.array(context + logprobs, dtype=np.float32),
        advantage=advantage,
        model_version=version,
        group_id=group,
        metrics={"reward": advantage},
    )


def varlen_attention(
    query: torch.Tensor,  # [queries, heads, size]
    key: torch.Tensor,  # [keys, heads, size]
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *_: object,
    softmax_scale: float | None = None,
    **__: object,
) -> torch.Tensor:
    """FlashAttention 3's interface: causal, the queries being the last of their keys."""
    outputs = []
    queries = cu_seqlens_q.tolist()
    keys = cu_seqlens_k.tolist()
    for segment in range(len(queries) - 1):
        q, k, v = (
            tensor[ends[segment] : ends[segment + 1]].transpose(0, 1)
            for tensor, ends in ((query, queries), (key, keys), (value, keys))
        )
        repeated = q.shape[0] // k.shape[0]
        k, v = (tensor.repeat_interleave(repeated, dim=0) for tensor in (k, v))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=softmax_scale
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


kernels = SimpleNamespace(flash_attn_varlen_func=varlen_attention)
