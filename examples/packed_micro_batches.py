"""One step over packed micro-batches: a global normalizer, metrics that add up without bias."""

from __future__ import annotations

import torch

from ipo_ext import IPOConfig, ipo_loss


def micro_batch(lengths: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random rollouts of these lengths, packed into one row of tokens."""
    tokens = sum(lengths)
    inference = -3 * torch.rand(tokens, generator=generator)
    return {
        "inference_logprobs": inference,
        "advantages": torch.randn(tokens, generator=generator),
        "loss_mask": torch.rand(tokens, generator=generator) < 0.7,  # prompts do not train
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [micro_batch(lengths, generator) for lengths in ([300, 40, 700], [512, 128])]
    drift = torch.nn.Parameter(torch.zeros(()))  # stands for the policy's weights
    config = IPOConfig(dppo_mask_low=0.2, dppo_mask_high=5.0, kl_tau=1e-3)

    # The number of loss tokens of the whole step, over all micro-batches (and ranks): every token
    # then weighs the same whatever micro-batch it fell in.
    normalizer = sum(batch["loss_mask"].sum() for batch in batches)

    metrics = []
    for batch in batches:
        noise = torch.randn(batch["inference_logprobs"].shape, generator=generator)
        trainer_logprobs = batch["inference_logprobs"] + drift + noise
        out = ipo_loss(trainer_logprobs, **batch, normalizer=normalizer, config=config)
        out.loss.backward()
        print(
            "dropped, by sequence:",
            [round(share, 3) for share in out.metrics["is_masked"].tolist()],
        )
        metrics.append(out.metrics.total())

    step = sum(metrics[1:], start=metrics[0])
    for name, value in step.tolist().items():
        print(f"{name:>26} {value: .4f}")
    print(f"{'gradient':>26} {drift.grad.item(): .4f}")


if __name__ == "__main__":
    main()
