"""Every format: real responses, and files laid out as the hosts' code writes them."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path
from typing import Any

import msgpack
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


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("layout", "third"),
    [
        ("indented objects", "f:33"),
        ("a list a line", "f:3, element 1"),
        ("a list, then objects", "f:2"),
        ("all on one line", "f:1"),
        ("two on the second line", "f:2, value 2"),
        ("after 20 blank lines", "f:23"),
    ],
)
def test_values_after_the_first_are_read_too_and_known_by_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, third: str, chunk: int
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    rows = [own(token_ids=[number, 8, 9]) for number in range(4)]
    each = [json.dumps(row) for row in rows]
    texts = {
        "indented objects": "\n".join(json.dumps(row, indent=1) for row in rows),
        "a list a line": "".join(f"[{row}]\n" for row in each),
        "a list, then objects": f"[{each[0]}, {each[1]}]\n{each[2]}\n{each[3]}",
        "all on one line": "".join(each),
        "two on the second line": f"{each[0]}\n{each[1]}{each[2]}\n{each[3]}",
        "after 20 blank lines": "\n" * 20 + "\n".join(each),
    }
    path = tmp_path / "f"
    path.write_text(texts[layout])
    found, what, problems = read_all(path)
    assert problems == []
    assert [answer_of(rollout) for rollout in found] == [row["token_ids"] for row in rows]
    assert what.records == 4
    assert found[2].where == f"{tmp_path}/{third}"


@pytest.mark.parametrize(
    ("rest", "where", "why"),
    [
        ("]", ":3", "expected a JSON object or a list of them, got ']'; what follows is not read"),
        ('{"a": ', ":3", "expected a JSON object: "),
        ('[{"a": ', ":3, element 1", "expected a JSON object: "),
    ],
)
def test_what_follows_a_value_and_is_none_is_named(
    tmp_path: Path, rest: str, where: str, why: str
) -> None:
    path = tmp_path / "f"
    path.write_text(json.dumps([own()]) + "\n\n" + rest)
    found, _, (problem,) = read_all(path)
    assert len(found) == 1
    assert problem.where == f"{path}{where}"
    assert problem.why.startswith(why)
    assert "what follows is not read" in problem.why


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
        {"version": "8", "start": 3, "end": 4},
        {"version": "7", "start": 0, "end": 3},
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
    found, what, (problem,) = read_all(path)
    assert len(found) == 2
    assert str(what).endswith("ipo_ext's own format (JSON), 3 records, 2 rollouts, 1 left out")
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


def test_names_cannot_move_a_cursor_or_break_an_encoding(tmp_path: Path) -> None:
    row = own(environment="\x1b[2J\ud800" + "x" * 500, version="\x07")
    rollout = the_rollout(written(tmp_path / "f", [row]))
    assert rollout.environment == "\ufffd[2J\ufffd" + "x" * 55
    assert set(rollout.versions or ()) == {"\ufffd"}


def test_a_list_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(json.dumps([own(), own(), own()])[:-40])
    found, _, (problem,) = read_all(path)
    assert len(found) == 2
    assert problem.where == f"{path}, element 3"


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    "broken",
    [
        '{"token_ids": [1, 2,, 3], "logprobs": []}',
        '{"text": "brackets ]}, and \\"quotes\\"", "logprobs": nothing}',
        "nothing",
        '{"token_ids": [1]}}',
        '{"a": [{"b": {"c": [}]}}]}',
        '"' + "a long text, " * 40 + '", {"token_ids" 1}',
    ],
)
def test_the_elements_after_a_broken_one_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, chunk: int
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    rows = [own(token_ids=[number, 8, 9]) for number in range(3)]
    first, *rest = map(json.dumps, rows)
    path = tmp_path / "f"
    path.write_text(f"[{first}, {broken}, {', '.join(rest)}]")
    found, _, problems = read_all(path)
    assert [answer_of(each) for each in found] == [row["token_ids"] for row in rows]
    assert problems
    assert all("what follows is not read" not in problem.why for problem in problems)
    assert problems[0].where.startswith(f"{path}, element ")


def test_a_list_whose_brackets_do_not_close_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text(f'[{json.dumps(own())}, {{"token_ids": [1, 2,, 3, {json.dumps(own())}]')
    found, _, (problem,) = read_all(path)
    assert len(found) == 1
    assert problem.where == f"{path}, element 2"
    assert "what follows is not read" in problem.why


def test_a_broken_element_does_not_bring_the_rest_of_a_list_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 1 << 12)
    held = []
    read_on = records._Text._read_on

    def watched(text: Any) -> None:
        read_on(text)
        held.append(len(text.held))

    monkeypatch.setattr(records._Text, "_read_on", watched)
    path = tmp_path / "f"
    good = ", ".join([json.dumps(own())] * 2000)
    path.write_text(f'[{good}, {{"token_ids": [1,, 2]}}, {good}]')
    found, _, (problem,) = read_all(path)
    assert len(found) == 4000
    assert problem.where == f"{path}, element 2001"
    assert max(held) < 1 << 14 < path.stat().st_size / 10


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


HUGE = -(10**400)


@pytest.mark.parametrize(
    "bad",
    [
        own(logprobs=[-0.5, HUGE, -1.5]),
        own(temperature=-HUGE),
        own(token_ids=[7, -HUGE, 9]),
        {
            "choices": [
                {
                    "token_ids": [3],
                    "prompt_token_ids": [1],
                    "logprobs": {"token_logprobs": [-1]},
                    "weight_versions": [{"version": "a", "start": 0, "end": float("inf")}],
                }
            ]
        },
    ],
    ids=["logprobs", "temperature", "token_ids", "weight_versions"],
)
def test_numbers_that_are_too_large_are_a_bad_records(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = written(tmp_path / "f", [bad, own()])
    found, _, (problem,) = read_all(path)
    assert len(found) == 1
    assert problem.where == f"{path}:1"


@pytest.mark.parametrize("broken", ["cut", "corrupt"])
@pytest.mark.parametrize("layout", ["lines", "list"])
def test_a_broken_gzip_is_named_and_what_came_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, layout: str
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 1 << 14)
    rows = [own(environment=f"{number * 7919:x}" * 9) for number in range(3000)]
    lines = written(tmp_path / "lines", rows).read_bytes()
    packed = bytearray(gzip.compress(lines if layout == "lines" else json.dumps(rows).encode()))
    if broken == "cut":
        packed = packed[: len(packed) * 9 // 10]
    else:
        packed[-8] ^= 0xFF  # the checksum
    path = tmp_path / "f"
    path.write_bytes(packed)
    found, _, problems = read_all(path)
    assert len(found) > 1000
    assert problems[-1].where == f"{path}"
    assert problems[-1].why.startswith("cannot be read to its end (")


def test_a_gzip_that_is_broken_before_the_first_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(json.dumps([own()] * 3).encode())[:40])
    with pytest.raises(Refused, match="holds no record that can be read"):
        read_all(path)


def test_msgpack_that_ends_in_its_first_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\xdc")
    with pytest.raises(Refused, match="starts as msgpack does, but cannot be read"):
        read_all(path)


def test_a_corrupt_page_of_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f"
    rows = [own(token_ids=[number, 8, 9]) for number in range(5000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table, path, row_group_size=1000, compression="gzip", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 400] = b"\xff" * 400
    path.write_bytes(content)
    found, _, (problem,) = read_all(path)
    assert len(found) >= 1000
    assert problem.where == f"{path}, after row {len(found)}"
    assert problem.why.startswith("cannot be read to its end (")


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


# ---------------------------------------------------------------------------------------------
# SGLang and llama.cpp


def sglang(**changed: Any) -> dict[str, Any]:
    facts = {
        "prompt_tokens": 2,
        "weight_version": "5",
        "input_token_logprobs": [[None, 5, None], [-2.0, 6, None]],
        "output_token_logprobs": [[-0.5, 7, None], [-1.0, 8, " a"]],
    }
    return {"text": "x", "output_ids": [7, 8], "meta_info": {**facts, **changed}}


def test_sglang_with_the_prompt_in_the_response(tmp_path: Path) -> None:
    rollout = the_rollout(written(tmp_path / "f", [sglang()]))
    assert (prompt_of(rollout), answer_of(rollout)) == ([5, 6], [7, 8])
    assert logprobs_of(rollout) == [-0.5, -1.0]
    assert set(rollout.versions or ()) == {"5"}


def test_sglang_with_the_prompt_in_the_request(tmp_path: Path) -> None:
    request = {"input_ids": [3, 4, 5], "sampling_params": {"temperature": 0.7}}
    exchange = {"request": request, "response": sglang(input_token_logprobs=[])}
    rollout = the_rollout(written(tmp_path / "f", [exchange]))
    assert prompt_of(rollout) == [3, 4, 5]
    assert rollout.temperature is not None
    assert rollout.temperature[0] == 0.7


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"input_token_logprobs": [[-2.0, 6, None]]}, "prompt: its token ids are not in the resp"),
        ({"output_token_logprobs": None}, "output_token_logprobs: the response has none; ask SG"),
        ({"output_token_logprobs": [[-0.5]]}, "is not laid out as SGLang responses are (IndexEr"),
    ],
)
def test_sglang_without_what_is_needed(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    _, _, (problem,) = read_all(written(tmp_path / "f", [sglang(**changed)]))
    assert problem.why.startswith(why)


def llama_cpp(name: str = "logprob", values: tuple[float, float] = (-0.5, -1.0)) -> dict[str, Any]:
    entries = [{"id": 7 + place, "token": "x", name: value} for place, value in enumerate(values)]
    return {
        "content": "xx",
        "prompt": "text",
        "completion_probabilities": entries,
        "generation_settings": {"temperature": 0.8},
    }


def test_llama_cpp_with_its_request(tmp_path: Path) -> None:
    exchange = {"request": {"prompt": [5, 6]}, "response": llama_cpp()}
    rollout = the_rollout(written(tmp_path / "f", [exchange]))
    assert (prompt_of(rollout), answer_of(rollout)) == ([5, 6], [7, 8])
    assert logprobs_of(rollout) == [-0.5, -1.0]
    assert rollout.temperature is not None
    assert rollout.temperature[0] == 0.8


def test_llama_cpp_with_probabilities_after_sampling(tmp_path: Path) -> None:
    exchange = {"request": {"prompt": [5, 6]}, "response": llama_cpp("prob", (0.5, 0.0))}
    rollout = the_rollout(written(tmp_path / "f", [exchange]))
    assert logprobs_of(rollout) == [pytest.approx(-0.6931471805599453), -float("inf")]


def test_llama_cpp_without_its_request(tmp_path: Path) -> None:
    _, _, (problem,) = read_all(written(tmp_path / "f", [llama_cpp()]))
    assert problem.why.startswith("prompt: its token ids are not in the response; send ids as the")


# ---------------------------------------------------------------------------------------------
# prime-rl and verifiers


def export(**changed: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "step": 12,
        "env_name": "sums",
        "token_ids": [5, 6, 7, 8],
        "position_ids": [0, 1, 2, 3],
        "loss_mask": [False, False, True, True],
        "advantages": [0.0, 0.0, 1.0, 1.0],
        "inference_logprobs": [0.0, 0.0, -0.5, None],
        "trainer_logprobs": [-3.0, -2.0, -0.6, -1.1],
        **changed,
    }


def test_a_token_export_needs_no_model(tmp_path: Path) -> None:
    rollout = the_rollout(written(tmp_path / "f", [export()]))
    assert (prompt_of(rollout), answer_of(rollout)) == ([5, 6], [7, 8])
    assert rollout.inference_logprobs.isnan().tolist() == [False, False, False, True]
    assert rollout.trainer_logprobs is not None
    assert rollout.trainer_logprobs.tolist() == [-3.0, -2.0, -0.6, -1.1]
    assert (set(rollout.versions or ()), rollout.environment) == ({"12"}, "sums")


@pytest.mark.parametrize("name", ["loss_mask", "inference_logprobs", "trainer_logprobs"])
def test_an_export_whose_columns_are_unequal(tmp_path: Path, name: str) -> None:
    row = export(**{name: export()[name][:-1]})
    _, _, (problem,) = read_all(written(tmp_path / "f", [row]))
    assert problem.why == f"{name}: expected as many as token_ids has, 4, got 3"


def batch(*between: Any) -> list[Any]:
    """Two packed sequences and padding; what stands behind the positions differs by version."""
    return [
        [5, 6, 7, 8, 9, 0],
        [False, True, True, False, True, False],
        [0.0] * 6,
        [0.0, -0.5, -1.0, 0.0, -1.5, 0.0],
        [0, 1, 2, 0, 1, 0],
        *between,
    ]


TEMPERATURES = [1.0, 0.7, 0.7, 1.0, 0.8, 1.0]
ENVIRONMENTS = ["sums", "sums", "sums", "maze", "maze", ""]


@pytest.mark.parametrize(
    ("between", "named"),
    [
        ([[3, 2, 1], TEMPERATURES, ENVIRONMENTS, [3, 2, 1], None], True),
        ([TEMPERATURES, ENVIRONMENTS, None], True),
        ([TEMPERATURES], False),
    ],
    ids=["2026-09", "2026-03", "2026-01"],
)
def test_batches_of_every_version_of_prime_rl(
    tmp_path: Path, between: list[Any], named: bool
) -> None:
    path = tmp_path / "rank_0.bin"
    path.write_bytes(msgpack.packb([batch(*between), batch(*between)]))
    found, what, problems = read_all(path)
    assert problems == []
    assert str(what) == f"{path}: prime-rl batches (msgpack), 2 records, 4 rollouts"
    first, second, *_ = found
    assert (prompt_of(first), answer_of(first)) == ([5], [6, 7])
    assert (prompt_of(second), answer_of(second)) == ([8], [9])
    assert logprobs_of(first) == [-0.5, -1.0]
    assert second.temperature is not None
    assert second.temperature.tolist() == [1.0, 0.8]
    assert first.environment == ("sums" if named else None)
    assert second.environment == ("maze" if named else None)


def test_a_batch_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(msgpack.packb([batch(TEMPERATURES), batch(TEMPERATURES)])[:-9])
    found, _, (problem,) = read_all(path)
    assert len(found) == 2
    assert problem.where == f"{path}, element 2"
    assert "what follows is not read" in problem.why


def trace(**changed: Any) -> dict[str, Any]:
    """A question, an answer, and two ways to go on: the second question is answered twice."""
    question = {"parent": None, "token_ids": [1, 2], "mask": [False, False], "logprobs": []}
    answer = {"parent": 0, "token_ids": [3, 4, 5], "mask": [False, True, True]}
    further = {"parent": 1, "token_ids": [6], "mask": [False], "logprobs": []}
    one = {"parent": 2, "token_ids": [7], "mask": [True], "logprobs": [-0.75]}
    other = {"parent": 2, "token_ids": [8, 9], "mask": [True, True], "logprobs": [-1.0, -2.0]}
    answer = {**answer, "logprobs": [-0.25, -0.5], **changed}
    return {"env_id": "maze", "nodes": [question, answer, further, one, other]}


def test_each_branch_of_a_trace_and_what_branches_share_once(tmp_path: Path) -> None:
    path = written(tmp_path / "f", [trace(), {"traces": [trace()]}])
    found, _, problems = read_all(path)
    assert problems == []
    assert len(found) == 4
    one, other, *_ = found
    assert (one.token_ids.tolist(), answer_of(one)) == ([1, 2, 3, 4, 5, 6, 7], [4, 5, 7])
    assert logprobs_of(one) == [-0.25, -0.5, -0.75]
    assert (other.token_ids.tolist(), answer_of(other)) == ([1, 2, 3, 4, 5, 6, 8, 9], [8, 9])
    assert (one.environment, one.trainer_logprobs) == ("maze", None)


def test_what_a_trainer_stamped_on_a_trace(tmp_path: Path) -> None:
    one = read_all(written(tmp_path / "f", [trace(trainer_logprobs=[-0.3, -0.6])]))[0][0]
    assert one.trainer_logprobs is not None
    assert one.trainer_logprobs.isnan().tolist() == [True, True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"logprobs": [-0.25]}, "nodes[1].logprobs: expected as many as its mask has, 2, got 1"),
        ({"mask": [True]}, "nodes[1].mask: expected as many as token_ids has, 3, got 1"),
        ({"parent": 9}, "nodes[1].parent: expected an earlier node, got 9"),
        ({"parent": 1}, "nodes[1].parent: expected an earlier node, got 1"),
        ({"parent": "x"}, "is not laid out as verifiers traces are"),
    ],
)
def test_a_bad_trace(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    _, _, (problem,) = read_all(written(tmp_path / "f", [trace(**changed)]))
    assert problem.why.startswith(why)


def test_a_trace_of_an_evaluation_has_no_ids(tmp_path: Path) -> None:
    bare = {"nodes": [{"parent": None, "token_ids": []}, {"parent": 0, "token_ids": []}]}
    _, _, (problem,) = read_all(written(tmp_path / "f", [bare]))
    assert problem.why.startswith("nodes: none has token_ids, as in evaluations over an API")


# ---------------------------------------------------------------------------------------------
# Text without ids


@pytest.mark.parametrize(
    ("row", "host", "write"),
    [
        (
            {"step": 1, "prompt": "a", "completion": "b", "reward": 1.0, "advantage": 0.5},
            "TRL's logged completions",
            "sampling_per_token_logps",
        ),
        (
            {"input": "a", "output": "b", "gts": "c", "score": 1.0, "step": 3},
            "verl's rollout_data_dir",
            "rollout_log_probs",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "a log of chat messages", "token ids"),
    ],
)
def test_dumps_of_text_are_refused_with_what_the_host_can_write(
    tmp_path: Path, row: dict[str, Any], host: str, write: str
) -> None:
    lines, table = written(tmp_path / "f", [row]), tmp_path / "g"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    for path in (lines, table):
        with pytest.raises(Refused) as refused:
            read_all(path)
        assert f"is {host}, which has text but no token ids" in str(refused.value)
        assert write in str(refused.value)
        assert "tokenising text again changes ids" in str(refused.value)
