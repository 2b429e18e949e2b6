"""Puts every causal language model of transformers through our head, and writes docs/models.md.

Of each architecture that ``AutoModelForCausalLM`` may make, a tiny, randomly initialised instance
runs on the CPU. What it does between its head's output and its logits is measured, once more with
each setting whose name may scale or cap them set to a number that shows; then log-probabilities,
loss and gradients of ``IPOLMHead`` on what went into its head are compared with those of its own
logits. Needs the extra `transformers`, and timm for a few.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made here, none is downloaded
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from models import heads, tiny  # noqa: E402
from models.heads import Outcome  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

_INTRODUCTION = """\
# Models

How the heads of transformers' causal language models are put through
[`IPOLMHead`](api.md#modules) and `ipo_loss_from_hidden`. Made by `python scripts/model_matrix.py`
from tiny, randomly initialised instances of all {count} architectures that `AutoModelForCausalLM`
of transformers {version} may make. What a model does between its head's output and its logits is
measured, with every setting whose name may scale or cap logits set to a number that shows; then
log-probabilities, loss and gradients are compared with those of its own logits.

{works} work, {with_argument} work with an argument, {refused} are refused, {other} have no linear
head, {not_run} do not run alone. `config` is the model's, or its text model's. Of a class that is
not here, look at what follows `lm_head` in its `forward`.

"""

_SECTIONS = {
    heads.WITH_ARGUMENT: (
        "Works with an argument",
        "Without it the loss is that of other logits, and nothing can tell: a head does not know "
        "what its model makes of its output.",
    ),
    heads.REFUSED: ("Refused", "Use `ipo_loss_from_logits` on the model's logits."),
    heads.OTHER: ("No linear head", "Use `ipo_loss_from_logits` on the logits that are meant."),
    heads.NOT_RUN: ("Not run", "What keeps a tiny instance from running alone."),
}

_HIDDEN = """\
## What goes into the head

For most models the base model's last hidden states, as they are. For these, something else:

| hidden states | architectures |
|---|---|
"""

_WORDS = {
    heads.ELSEWHERE: "what `lm_head` is called with: the head has layers before its linear, or the "
    "base model is called in parts",
}


def page(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    text = _INTRODUCTION.format(
        count=len(outcomes),
        version=transformers.__version__,
        works=counts[heads.WORKS],
        with_argument=counts[heads.WITH_ARGUMENT],
        refused=counts[heads.REFUSED],
        other=counts[heads.OTHER],
        not_run=counts[heads.NOT_RUN],
    )
    for verdict, (title, words) in _SECTIONS.items():
        rows = [_row(outcome) for outcome in outcomes if outcome.verdict == verdict]
        if rows:
            column = "argument" if verdict == heads.WITH_ARGUMENT else "why"
            head = f"| architecture | {column} |\n|---|---|\n"
            text += f"## {title}\n\n{words}\n\n{head}{''.join(rows)}\n"
    working = [o for o in outcomes if o.verdict in (heads.WORKS, heads.WITH_ARGUMENT)]
    text += f"{_HIDDEN}{''.join(_rows_of_hidden(working))}\n"
    text += f"## Works\n\n{_names(o for o in outcomes if o.verdict == heads.WORKS)}.\n\n"
    return f"{text}With a bias: {_names(o for o in working if o.has_bias)}.\n"


def _row(outcome: Outcome) -> str:
    why = f"`{outcome.arguments}`" if outcome.arguments else outcome.note
    return f"| {outcome.architecture} | {why} |\n"


def _rows_of_hidden(outcomes: list[Outcome]) -> list[str]:
    ways: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        ways.setdefault(outcome.hidden, []).append(outcome)
    ways.pop(heads.AS_THEY_ARE, None)
    return [f"| {_WORDS.get(way, way)} | {_names(ways[way])} |\n" for way in sorted(ways)]


def _names(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(outcome.architecture for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="default: all, which also writes the page")
    options = parser.parse_args()
    known = tiny.architectures()
    if unknown := set(options.architectures) - set(known):
        parser.error(f"architectures: no causal language models: {', '.join(sorted(unknown))}")
    chosen = {name: known[name] for name in options.architectures or known}
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = []
    for number, kind in enumerate(chosen.values(), 1):
        outcome = heads.examine(kind)
        outcomes.append(outcome)
        details = outcome.arguments or outcome.note or outcome.hidden
        print(
            f"{number}/{len(chosen)} {outcome.architecture}: {outcome.verdict}; {details}",
            flush=True,
        )
    if not options.architectures:
        PAGE.write_text(page(outcomes))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
