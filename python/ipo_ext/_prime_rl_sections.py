"""prime-rl's ``trainer.loss`` sections, version by version: each type and its constructor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NEWEST = "2026-10"


class LossType(NamedTuple):
    """A type of loss: what makes its config, and each field's name there.

    Where a field is absent prime-rl's default and the constructor's are the same.
    """

    constructor: str  # of IPOConfig; "" for itself
    fields: dict[str, str]


_BAND = {"ratio_low": "low", "ratio_high": "high", "adv_tau": "adv_tau"}
_CAP = {"max_importance_ratio": "max_importance_ratio"}
_CENTERING = {"score_centering": "score_centering"}
_MASK = ("dppo_mask_low", "dppo_mask_high")
_TAUS = {"adv_tau": "adv_tau", "kl_tau": "kl_tau"}

# Version to its types, the default first. 2026-05 is the branch of pull request 2423, 2026-08 what
# was released before, 2026-10 what replaced it in September.
VERSIONS: dict[str, dict[str, LossType]] = {
    "2026-05": {
        "default": LossType("", {name: name for name in (*_MASK, *_TAUS, "teacher_tau")}),
    },
    "2026-08": {
        "default": LossType("dppo", {**dict(zip(_MASK, ("low", "high"), strict=True)), **_TAUS}),
        "ipo": LossType("prob_diff", {"ipo_threshold": "threshold", **_TAUS}),
    },
    NEWEST: {
        "ipo": LossType("ipo", {"eps": "eps", "adv_tau": "adv_tau", **_CAP, **_CENTERING}),
        "icepop": LossType("icepop", _BAND),
        "ppo": LossType("ppo", {**_BAND, **_CAP}),
        "cispo": LossType("cispo", _BAND),
    },
}


def constructor_and_arguments(
    section: Mapping[str, Any], version: str | None
) -> tuple[str, dict[str, Any]]:
    """Which constructor of ``IPOConfig`` a section stands for, and what it takes."""
    version = NEWEST if version is None else version
    types = VERSIONS.get(version)
    if types is None:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
    given = dict(section)
    name = given.pop("type", next(iter(types)))
    if not isinstance(name, str) or name not in types:
        raise ValueError(
            f"type: expected one of {', '.join(types)} in a section of {version}, got "
            f"{name!r}{_elsewhere(name)}"
        )
    if given.get("score_centering") is False:  # of whatever type
        del given["score_centering"]
    fields = types[name].fields
    for field, value in given.items():
        if field not in fields:
            raise ValueError(
                f"{field}: expected one of {', '.join(fields)} for type={name!r} in a section of "
                f"{version}, got {field}={value!r}{_elsewhere(field)}"
            )
    return types[name].constructor, {fields[field]: value for field, value in given.items()}


def _elsewhere(word: object) -> str:
    """Where a type or a field of another version stands."""
    versions = [
        version
        for version, types in VERSIONS.items()
        if word in types or any(word in each.fields for each in types.values())
    ]
    return f"; sections of version {', '.join(map(repr, versions))} have it" if versions else ""
