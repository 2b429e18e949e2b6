"""A trainer's model from a directory, as hidden states and a head: no logits of the whole text.

A model may scale or cap what its head puts out, under names of its own. Which it does is found by
comparing one sequence with the model's own logits, so that no architecture is silently misread.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ipo_ext import linear_token_logprobs

from .extras import need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What models make of their head's output, and the settings that say how much.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling")
_AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # of log-probabilities


class BadModel(ValueError):
    """A directory that holds no model of which this command can make log-probabilities."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into log-probabilities.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scaling: ``softcap`` and ``logit_scale`` as ``linear_token_logprobs`` takes them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scaling: dict[str, float]

    def logprobs(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | None
    ) -> torch.Tensor:
        """float32 ``[...]`` of hidden states ``[..., H]``; 0 where a label is -100."""
        logprobs: torch.Tensor
        logprobs, _ = linear_token_logprobs(
            hidden,
            self.weight,
            labels,
            bias=self.bias,
            temperature=temperature,
            **self.scaling,  # type: ignore[arg-type]
        )
        return logprobs

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[rows, V]`` as the model makes them, for what needs a row as a whole."""
        bias = None if self.bias is None else self.bias.float()
        logits = torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)
        logits = logits * self.scaling.get("logit_scale", 1.0)
        softcap = self.scaling.get("softcap")
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model on one device, its head and, if the directory has one, its tokenizer."""

    name: str
    model: Any
    head: Head
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def vocabulary(self) -> int:
        return len(self.head.weight)

    @torch.no_grad()
    def hidden(self, token_ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[B, T, H]`` of sequences, padded on the right to the longest."""
        ids, mask = _padded(token_ids, self.device)
        return _hidden_states(self.model, ids, mask)


def load(directory: str, *, dtype: str = "float32", device: str | None = None) -> Policy:
    """The model and the tokenizer of a directory; nothing is downloaded.

    Raises:
        BadModel: in words, what the directory lacks, or that there is no such device.
    """
    path = Path(directory)
    if not path.is_dir():
        raise BadModel(f"{directory}: expected a directory of a model, found none")
    transformers = need("transformers", "recomputing log-probabilities")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = _where_its_weights_are(path)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(chosen)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], local_files_only=True, **where
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise BadModel(
            f"{directory}: no model could be loaded from it: {_one_line(error)}"
        ) from error
    model = model.to(chosen).eval()
    return Policy(directory, model, _head_of(directory, model), _tokenizer(directory, where))


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own classes
        raise BadModel(
            f"--device {device}: expected a device that is there, for instance cpu or cuda: "
            f"{_one_line(error)}"
        ) from error


def _where_its_weights_are(path: Path) -> dict[str, str]:
    """The one GGUF file of a directory without a config: transformers reads it when it is named."""
    weights = list(path.glob("*.gguf"))
    if (path / "config.json").is_file():
        return {}
    if len(weights) != 1:
        raise BadModel(f"{path}: expected config.json or one .gguf file in it, found neither")
    return {"gguf_file": weights[0].name}


def _tokenizer(directory: str, where: dict[str, str]) -> Any:
    """None where the directory has none: then tokens are shown by their ids."""
    transformers = need("transformers", "recomputing log-probabilities")
    with contextlib.suppress(Exception):  # whatever a directory without one makes it raise
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, **where)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------------------
# The head


@torch.no_grad()
def _head_of(name: str, model: Any) -> Head:
    """The head whose log-probabilities are those of the model's own logits."""
    linear = model.get_output_embeddings()
    if not isinstance(getattr(linear, "weight", None), torch.Tensor):
        raise BadModel(f"{name}: expected a language model with a linear head, found none")
    weight, bias = linear.weight.detach(), getattr(linear, "bias", None)
    ids = torch.arange(2, 18, device=weight.device)[None] % len(weight)
    labels = ids.roll(-1, 1)
    hidden = _hidden_states(model, ids, torch.ones_like(ids))
    own = model(input_ids=ids).logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    apart = {}
    for scaling in _scalings(model.config):
        head = Head(weight, None if bias is None else bias.detach(), scaling)
        apart[str(scaling)] = float((head.logprobs(hidden, labels, None) - own).abs().max())
        if apart[str(scaling)] <= _AGREE[weight.dtype]:
            return head
    raise BadModel(
        f"{name}: {type(model).__name__} makes something of its hidden states or of its head's "
        f"output that is not known here (log-probabilities {min(apart.values()):.3g} apart); dump "
        "the trainer's own log-probabilities with the rollouts instead"
    )


def _scalings(config: Any) -> list[dict[str, float]]:
    """Nothing first; then each setting of the config that may scale or cap logits."""
    of_text = getattr(config, "text_config", config)
    found: list[dict[str, float]] = [{}]
    for name in _SOFTCAPS:
        if (softcap := getattr(of_text, name, None)) is not None:
            found.append({"softcap": float(softcap)})
    for name in _SCALES:
        if scale := getattr(of_text, name, None):
            found += [{"logit_scale": float(scale)}, {"logit_scale": 1 / float(scale)}]
    return found


def _hidden_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    output = model.base_model(input_ids=ids, attention_mask=mask)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _padded(
    token_ids: Sequence[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(list(token_ids), batch_first=True).to(device)
    lengths = torch.tensor([len(each) for each in token_ids], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return ids, mask.long()
