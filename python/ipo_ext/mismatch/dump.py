"""vLLM's offline outputs written as the file that ``python -m ipo_ext mismatch`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .extras import need


def dump(
    request_outputs: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    temperature: float | None = None,
    version: str | int | None = None,
    environment: str | None = None,
) -> int:
    """Writes what ``vllm.LLM.generate`` or ``.chat`` returned, an answer a line.

    Args:
        request_outputs: vLLM's ``RequestOutput`` objects, made with ``SamplingParams(logprobs=0)``.
        path: a file, written anew: parquet if it ends with ``.parquet`` (needs pyarrow), else JSON
            lines.
        temperature: what the trainer will divide logits by, usually what was sampled with.
        version: of the weights, for instance the step.
        environment: the task's name.

    Returns:
        The number of answers written.

    Raises:
        ValueError: an output has no log-probabilities.
    """
    facts = {"temperature": temperature, "version": version, "environment": environment}
    known = {
        name: str(value) if name == "version" else value
        for name, value in facts.items()
        if value is not None
    }
    rows = ({**row, **known} for row in _answers(request_outputs))
    if Path(path).suffix == ".parquet":
        return _write_parquet(rows, path)
    return _write_lines(rows, path)


def _answers(request_outputs: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for request in request_outputs:
        for answer in request.outputs:
            if answer.logprobs is None:
                raise ValueError(
                    f"request_outputs: request {request.request_id} has no log-probabilities; "
                    "sample with SamplingParams(logprobs=0)"
                )
            token_ids = [int(token) for token in answer.token_ids]
            yield {
                "prompt_token_ids": [int(token) for token in request.prompt_token_ids],
                "token_ids": token_ids,
                "logprobs": [
                    float(answer.logprobs[place][token].logprob)
                    for place, token in enumerate(token_ids)
                ],
            }


def _write_lines(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str]) -> int:
    pyarrow, parquet = need("pyarrow", "a parquet file"), need("pyarrow.parquet", "a parquet file")
    table = pyarrow.Table.from_pylist(list(rows))
    parquet.write_table(table, path)
    return int(table.num_rows)
