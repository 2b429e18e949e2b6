"""The options of a host whose names may mean something to a loss, from its own config classes.

Each is known to the tests of its host: honoured, refused, warned of, or without a meaning for this
loss. So a later version of the host cannot add one that is silently ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

_STEMS = (
    *("loss", "mask", "clip", "eps", "kl", "beta", "delta", "tau", "entrop", "ratio", "importance"),
    *("correct", "tis", "opsm", "opd", "polic", "adv", "estimator", "norm", "std", "agg", "reduc"),
    *("temperature", "top", "penal", "sampl", "prob", "logprob", "threshold", "coef", "scal"),
    *("filter", "trunc", "cap", "weights", "gamma", "lambd", "generation"),
)


def may_touch_a_loss(option: str) -> bool:
    words = option.strip("_").split("_")
    return option.endswith("min_p") or any(word.startswith(_STEMS) for word in words)


def assert_all_are_known(options: Iterable[str], known: Collection[str]) -> None:
    options = list(options)
    assert sum(map(may_touch_a_loss, options)) > 3, "these are not the options"
    unknown = {option for option in options if may_touch_a_loss(option)} - set(known)
    assert not unknown, f"neither honoured nor refused nor known to mean nothing here: {unknown}"
