"""Every format: real responses, and files laid out as the hosts' code writes them."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ipo_ext.mismatch.readers import Found, Problem, Refused, read, records
from ipo_ext.mismatch.rollouts import Rollout
from tests.mismatch.planted import written

RESPONSES = Path(__file__).parent / "responses"


def read_all(path: Path) -> tuple[list[Rollout], Found, list[Problem]]:
    problems: list[Problem] = []
    found = Found(path)
    return list(read(path, found, problems.append)), found, problems


def the_rollout(path: Path) -> Rollout:
    (rollout,), _, problems = read_all(path)
    assert problems == []
    return rollout


def prompt_of(rollout: Rollout) -> list[int]:
    return rollout.token_ids[~rollout.sampled].tolist()


def answer_of(rollout: Rollout) -> list[int]:
    return rollout.token_ids[rollout.sampled].tolist()


def logprobs_of(rollout: Rollout) -> list[float]:
    return rollout.inference_logprobs[rollout.sampled].tolist()


# ---------------------------------------------------------------------------------------------
# Our own


def own(**changed: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": [5, 6],
        "token_ids": [7, 8, 9],
        "logprobs": [-0.5, -1.0, -1.5],
        **changed,
    }


def test_our_own_format_with_all_that_it_may_hold(tmp_path: Path) -> None:
    row = own(
        trainer_logprobs=[-0.6, -1.1, -1.6],
        temperature=[0.7, 0.7, 0.8],
        version=["3", "3", "4"],
        environment="sums",
        rank=[1, 2, 3],
    )
    rollout = the_rollout(written(tmp_path / "f", [row]))
    assert (prompt_of(rollout), answer_of(rollout)) == ([5, 6], [7, 8, 9])
    assert logprobs_of(rollout) == [-0.5, -1.0, -1.5]
    assert rollout.trainer_logprobs is not None
    assert rollout.trainer_logprobs[2:].tolist() == [-0.6, -1.1, -1.6]
    assert rollout.temperature is not None
    assert rollout.temperature[2:].tolist() == [0.7, 0.7, 0.8]
    assert rollout.versions is not None
    assert list(rollout.versions[2:]) == ["3", "3", "4"]
    assert rollout.environment == "sums"
    assert rollout.where == f"{tmp_path / 'f'}:1"


@pytest.mark.parametrize("layout", ["lines", "list", "indented list", "one object", "gzip"])
def test_json_in_every_layout(tmp_path: Path, layout: str) -> None:
    rows = [own(token_ids=[number, 8, 9]) for number in range(3)]
    path = tmp_path / "without an extension"
    if layout == "lines":
        written(path, rows)
    elif layout == "gzip":
        path.write_bytes(gzip.compress(written(tmp_path / "g", rows).read_bytes()))
    elif layout == "one object":
        rows = rows[:1]
        path.write_text(json.dumps(rows[0], indent=1))
    else:
        path.write_text(json.dumps(rows, indent=2 if layout == "indented list" else None))
    found, _, problems = read_all(path)
    assert problems == []
    assert [answer_of(each) for each in found] == [row["token_ids"] for row in rows]


def test_a_list_is_read_across_the_ends_of_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 7)
    rows = [own(environment="Grüße, 東京"), own(version="é")]
    path = tmp_path / "f"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    found, _, problems = read_all(path)
    assert problems == []
    assert [each.environment for each in found] == ["Grüße, 東京", None]


def test_parquet(tmp_path: Path) -> None:
    rows = [own(version="1"), own(token_ids=[1, 2, 3], version=None)]
    path = tmp_path / "f"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found, what, problems = read_all(path)
    assert problems == []
    assert [answer_of(each) for each in found] == [[7, 8, 9], [1, 2, 3]]
    assert str(what) == f"{path}: ipo_ext's own format (parquet), 2 records, 2 rollouts"


# ---------------------------------------------------------------------------------------------
# vLLM


def test_a_real_completion_of_vllm() -> None:
    rollout = the_rollout(RESPONSES / "vllm_completion.json")
    assert (prompt_of(rollout), answer_of(rollout)) == ([6403, 1980, 253], [1774, 19447, 828, 523])
    assert logprobs_of(rollout)[0] == -5.8962907791137695


def test_a_real_completion_whose_ids_are_spelled_in_its_tokens(tmp_path: Path) -> None:
    path = RESPONSES / "vllm_completion_spelled_ids.json"
    response = json.loads(path.read_text())
    assert answer_of(the_rollout(path)) == [3746, 42, 198, 1589]
    response["choices"][0]["token_ids"] = None
    assert answer_of(the_rollout(written(tmp_path / "f", [response]))) == [3746, 42, 198, 1589]


def test_a_real_chat_completion_of_vllm() -> None:
    rollout = the_rollout(RESPONSES / "vllm_chat.json")
    assert len(prompt_of(rollout)) == 35
    assert answer_of(rollout) == [5195, 506, 253, 24021]
    assert logprobs_of(rollout)[1] == -0.2187223881483078


def test_a_real_generate_response_with_its_request(tmp_path: Path) -> None:
    response = json.loads((RESPONSES / "vllm_generate.json").read_text())
    response["choices"][0]["weight_versions"] = [
        {"version": "7", "start": 0, "end": 3},
        {"version": "8", "start": 3, "end": 4},
    ]
    request = {"token_ids": [6403, 1980, 253], "sampling_params": {"temperature": 0.5}}
    exchange = {"request": request, "response": response}
    rollout = the_rollout(written(tmp_path / "f", [exchange]))
    assert (prompt_of(rollout), answer_of(rollout)) == ([6403, 1980, 253], [1141, 79, 26, 19163])
    assert rollout.temperature is not None
    assert rollout.temperature.tolist() == [0.5] * 7
    assert rollout.versions is not None
    assert list(rollout.versions)[3:] == ["7", "7", "7", "8"]


def test_values_of_an_echoed_prompt_are_left_out(tmp_path: Path) -> None:
    response = json.loads((RESPONSES / "vllm_completion.json").read_text())
    logprobs = response["choices"][0]["logprobs"]
    logprobs["token_logprobs"] = [None, -9.0, -9.5, *logprobs["token_logprobs"]]
    rollout = the_rollout(written(tmp_path / "f", [response]))
    assert logprobs_of(rollout)[0] == -5.8962907791137695


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vllm_completion_without_ids", "has text alone, and tokenising text again changes ids"),
        ("vllm_chat_without_ids", "has text alone, and tokenising text again changes ids"),
        ("vllm_generate", r"prompt_token_ids: the response has none; .*\"request\""),
    ],
)
def test_what_a_response_lacks_is_said_with_how_to_ask(name: str, reason: str) -> None:
    _, _, (problem,) = read_all(RESPONSES / f"{name}.json")
    assert re.search(reason, problem.why)
    assert '"return_token_ids": true' in problem.why


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"logprobs": [-0.5, 0.25, -1]}, "logprobs[1]: expected a natural logarithm of a "),
        ({"logprobs": [-0.5, -1.0]}, "logprobs: expected as many as token_ids has, 3, got 2"),
        ({"logprobs": [-0.5, "x", -1.0]}, "logprobs[1]: expected a number, got 'x'"),
        ({"logprobs": None}, "logprobs: expected a list of numbers, got nothing"),
        ({"token_ids": "text"}, "token_ids: expected a list of token ids, got str"),
        ({"token_ids": [7, -8, 9]}, "token ids: expected none below 0, got -8"),
        ({"token_ids": [7, 8.5, 9]}, "token_ids[1]: expected a token id, got 8.5"),
        ({"token_ids": [7, 2**70, 9]}, "token_ids: expected token ids below 2**63"),
        ({"token_ids": [], "logprobs": []}, "expected at least one sampled token, got none"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"temperature": -1}, "temperature: expected finite numbers above 0"),
        ({"version": ["1"]}, "version: expected as many as token_ids has, 3, got 1"),
        ({"trainer_logprobs": [0]}, "trainer_logprobs: expected as many as token_ids has, 3, got"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_goes_on(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    path = written(tmp_path / "f", [own(), own(**changed), own()])
    found, _, (problem,) = read_all(path)
    assert len(found) == 2
    assert problem.where == f"{path}:2"
    assert problem.why.startswith(why)


def test_lines_that_are_no_json_are_named_too(tmp_path: Path) -> None:
    path = tmp_path / "f"
    line = json.dumps(own()).encode()
    path.write_bytes(b"\n".join([b"{broken", line, b"\xff\xfe", b"[" * 100_000, line, line[:20]]))
    found, _, problems = read_all(path)
    assert len(found) == 2
    assert [problem.where for problem in problems] == [
        f"{path}:{number}" for number in (1, 3, 4, 6)
    ]
    assert all("expected" in problem.why for problem in problems)


def test_nan_and_null_are_values_that_are_missing(tmp_path: Path) -> None:
    rollout = the_rollout(written(tmp_path / "f", [own(logprobs=[None, float("nan"), -1])]))
    assert rollout.inference_logprobs[2:].isnan().tolist() == [True, True, False]


def test_a_list_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(json.dumps([own(), own(), own()])[:-40])
    found, _, (problem,) = read_all(path)
    assert len(found) == 2
    assert problem.where == f"{path}, element 3"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n \n", "is no JSON, msgpack or parquet"),
        (b"step,reward\n1,2\n", "is no JSON, msgpack or parquet: it starts with 'step,reward"),
        (b"\x80\x04\x95\x10\x00", "is a pickle: it is not loaded"),
        (b"PK\x03\x04rest", "is a zip archive, as torch.save writes it: it is not loaded"),
        (b"\x1f\x8bnonsense", "is packed by gzip, and broken"),
        (b"PAR1nonsense", "starts as parquet does, but cannot be read"),
        (b'{"loss": 1.5, "step": 3}\n', "found an object with the keys loss, step"),
        (b'{"a": ', "starts as JSON does, but"),
        (b"[]", "holds no records"),
        (b"[1, 2]", "found int '1'"),
    ],
)
def test_a_file_of_another_format_is_refused_with_what_was_found(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(Refused) as refused:
        read_all(path)
    assert why in str(refused.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(Refused, match="cannot be opened: No such file"):
        read_all(Path("/nowhere/at all"))


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(Refused, match="would run whatever code it holds"):
        read_all(path)
    assert not _Trap.sprung


class _Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _spring, ()


def _spring() -> None:
    _Trap.sprung = True
