"""A server's response, with the request that it answers where the file holds both."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A record ``{"request": ..., "response": ...}``, or a response by itself.

    Attributes:
        request, response: JSON objects, empty where there is none.
        prompt_token_ids: the request's, under any of the names that servers have for them.
        temperature: what the engine sampled with, if the record says so.
    """

    request: dict[str, Any]
    response: dict[str, Any]

    @property
    def prompt_token_ids(self) -> list[int] | None:
        for name in ("prompt_token_ids", "token_ids", "input_ids", "prompt"):
            ids = self.request.get(name)
            if isinstance(ids, list) and ids and isinstance(ids[0], int):
                return ids
        return None

    @property
    def temperature(self) -> Any:
        for holder in (
            self.request,
            self.request.get("sampling_params"),
            self.response.get("generation_settings"),  # llama.cpp's
        ):
            if isinstance(holder, dict) and holder.get("temperature") is not None:
                return holder["temperature"]
        return None


def exchange_of(record: Any) -> Exchange:
    if not isinstance(record, dict):
        return Exchange({}, {})
    request, response = record.get("request"), record.get("response")
    if isinstance(request, dict) and isinstance(response, dict):
        return Exchange(request, response)
    return Exchange({}, record)
