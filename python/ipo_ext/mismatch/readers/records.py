"""A file as a stream of records, in memory that does not grow with it: JSON, msgpack, parquet.

The kind of a file is decided by its first bytes, never by its name. Pickles are recognised in order
to be refused: they run code when they are loaded.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..extras import need
from ..rollouts import BadRecord

_CHUNK = 1 << 20  # bytes that are read at a time where lines do not say how many
_CUT = 16  # characters: a value that was cut is wrong no farther than this from where it ends
_LINES_TO_TRY = 16  # of a file whose first line is no JSON value: is it lines, or one long value?


class Refused(ValueError):
    """A file that cannot be read at all: what was found, and what to do, in words."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A JSON object, a row of parquet or an array of msgpack, or what is wrong in its place."""

    where: str
    value: Any = None
    error: str | None = None


def records_of(path: Path) -> tuple[str, Iterator[Record]]:
    """The kind of a file, and its records one after the other."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise Refused(f"cannot be opened: {error.strerror}") from error
    if not start:
        raise Refused("is empty")
    if start[:4] == b"PAR1":
        return "parquet", _parquet_rows(path)
    if start[:2] == b"\x1f\x8b":
        start = _start_of_gzip(path)
    _refuse_pickles(start)
    if _is_msgpack_array(start[0]):
        return "msgpack", _up_to_a_break(path, _msgpack_arrays(path))
    return "JSON", _up_to_a_break(path, _json_values(path))


def _up_to_a_break(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    """Of a file that cannot be read to its end, as one packed by gzip that was cut."""
    try:
        yield from records
    except (EOFError, OSError, zlib.error) as error:
        yield Record(f"{path}", error=_break(error))


def _break(error: Exception) -> str:
    return f"cannot be read to its end ({type(error).__name__}: {error}); what follows is left out"


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is packed by gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _start_of_gzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            start = file.read(16)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"is packed by gzip, and broken: {error}") from error
    if not start:
        raise Refused("is empty, packed by gzip")
    return start


def _refuse_pickles(start: bytes) -> None:
    if (
        start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        or start[:4] == b"PK\x03\x04"
    ):
        what = "a pickle" if start[0] == 0x80 else "a zip archive, as torch.save writes it"
        raise Refused(
            f"is {what}: it is not loaded, since that would run whatever code it holds; write the "
            "rollouts as JSON lines or parquet instead (ipo_ext.mismatch.dump)"
        )


# ---------------------------------------------------------------------------------------------
# JSON


def _json_values(path: Path) -> Iterator[Record]:
    if _has_a_value_a_line(path):
        yield from _json_lines(path)
    else:
        yield from _long_json(path)


def _has_a_value_a_line(path: Path) -> bool:
    """Whether one of the first lines is an object by itself; a list of objects is no such line."""
    with opened(path) as file:
        while (first := file.read(1)).isspace():
            pass
        if first == b"[":  # its line may be as long as the file
            return False
        lines = (line.strip() for line in itertools.chain([first + file.readline()], file))
        filled = (line for line in lines if line)
        return any(
            len(line) > 2 and line.startswith(b"{") and isinstance(_value_or_none(line), dict)
            for line in itertools.islice(filled, _LINES_TO_TRY)
        )


def _value_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _json_lines(path: Path) -> Iterator[Record]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = _json_line(f"{path}:{number}", line)
                yield from [record] if record else _values_in_line(f"{path}:{number}", line)


def _json_line(where: str, line: bytes) -> Record | None:
    """The one value of a line, or what is wrong with it; None where it is followed by another."""
    try:
        return Record(where, json.loads(line))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        return Record(where, error=f"expected a JSON object: {error}")
    except UnicodeDecodeError as error:
        return Record(where, error=f"expected UTF-8 text: {error.reason} at byte {error.start}")
    except ValueError as error:
        return Record(where, error=f"expected a JSON object: {error}")
    except RecursionError:
        return Record(where, error="expected a JSON object, got one that is nested too deeply")


def _values_in_line(where: str, line: bytes) -> Iterator[Record]:
    text = _Text(io.BytesIO(line))
    number = 0
    while text.peek():
        number += 1
        yield from _value(f"{where}, value {number}" if number > 1 else where, text)


def _long_json(path: Path) -> Iterator[Record]:
    """Of values over several lines, and of lists, whose elements are read one at a time."""
    with opened(path) as file:
        text = _Text(file)
        opening = text.peek()
        if not opening or opening not in "[{":
            raise Refused(f"is no JSON, msgpack or parquet: it starts with {text.shown()}")
        if opening == "{":
            yield Record(f"{path}", _whole(text))
        else:
            yield from _elements(f"{path}", text)
        while text.peek():
            yield from _value(f"{path}:{text.line}", text)


def _value(where: str, text: _Text) -> Iterator[Record]:
    """The next value, of a list its elements, or what stands in its place and ends the text."""
    opening = text.peek()
    if opening == "[":
        yield from _elements(where, text)
    elif opening == "{":
        yield _one(where, text)
    else:
        expected = "expected a JSON object or a list of them"
        yield Record(where, error=f"{expected}, got {text.shown()}; what follows is not read")
        text.give_up()


def _elements(where: str, text: _Text) -> Iterator[Record]:
    text.skip(1)
    number = 0
    while (character := text.peek()) != "]":
        if character == "":
            yield Record(where, error="ends within a list, as a file that was cut does")
            return
        if character == ",":
            text.skip(1)
            continue
        number += 1
        yield _one(f"{where}, element {number}", text, in_list=True)
        if text.given_up:
            return
    text.skip(1)


def _one(where: str, text: _Text, in_list: bool = False) -> Record:
    """The next value, or what is wrong with it; of a list the element after it can be found."""
    try:
        return Record(where, text.value())
    except ValueError as error:
        if not (in_list and text.skip_element()):
            text.give_up()
        rest = "; what follows is not read" if text.given_up else ""
        return Record(where, error=f"expected a JSON object: {error}{rest}")


def _whole(text: _Text) -> Any:
    try:
        return text.value()
    except ValueError as error:
        raise Refused(f"starts as JSON does, but: {error}") from error


# A string, which may be cut, and what the structure of a list's elements shows in.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*(?P<closed>")?|[][{},]', re.DOTALL)


class _Text:
    """Text from which JSON values are taken; it holds one value, and what was read on."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self.decoder = json.JSONDecoder()
        self.held = ""
        self.ended = False
        self.given_up = False
        self.line = 1  # of what is held

    def _read_on(self) -> None:
        """As much again as is held: a value is not tried once for each of its chunks."""
        read = self.file.read(max(_CHUNK, len(self.held)))
        self.ended = not read
        self.held += self.decode(read, final=self.ended)

    def peek(self) -> str:
        """The next character that is no white space, or nothing at the end."""
        while True:
            self.skip(len(self.held) - len(self.held.lstrip()))
            if self.held or self.ended:
                return self.held[:1]
            self._read_on()

    def skip(self, characters: int) -> None:
        self.line += self.held.count("\n", 0, characters)
        self.held = self.held[characters:]

    def give_up(self) -> None:
        """Nothing more is taken from it: where the next value would begin is not known."""
        self.held, self.ended, self.given_up = "", True, True

    def skip_element(self) -> bool:
        """Goes past an element that cannot be read, to the list's next comma or to its end.

        What it reads on the way is not held. Returns whether there is one.
        """
        depth = 0
        while True:
            read = len(self.held)
            for found in _STRUCTURE.finditer(self.held):
                if found[0][0] == '"':
                    if not found["closed"]:  # goes on in what was not read yet
                        read = found.start()
                        break
                elif found[0] in "[{":
                    depth += 1
                elif depth > 0:
                    depth -= found[0] in "]}"
                elif found[0] in ",]":
                    self.skip(found.start())
                    return True
            if self.ended:
                return False
            self.skip(read)
            self._read_on()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held)
                # A number at the end of what is held may go on; objects and lists do not.
                if end < len(self.held) or self.ended or isinstance(value, (dict, list)):
                    self.skip(end)
                    return value
            except RecursionError as error:
                raise ValueError("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                if self.ended or self._is_broken(error):
                    raise
            self._read_on()

    def _is_broken(self, error: json.JSONDecodeError) -> bool:
        """Whether more text would not mend it; a string that does not end may end later."""
        cut = error.msg.startswith("Unterminated string")
        return not cut and error.pos < len(self.held) - _CUT

    def shown(self) -> str:
        return repr(self.held[:40])


# ---------------------------------------------------------------------------------------------
# msgpack and parquet


def _is_msgpack_array(byte: int) -> bool:
    return 0x90 <= byte <= 0x9F or byte in (0xDC, 0xDD)


def _msgpack_arrays(path: Path) -> Iterator[Record]:
    """The elements of the one array that the file holds."""
    msgpack = need("msgpack", "a msgpack file")
    with opened(path) as file:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, max_buffer_size=1 << 30)
        try:
            count = unpacker.read_array_header()
        except Exception as error:  # the package has no common class for what it raises
            kind = type(error).__name__
            raise Refused(f"starts as msgpack does, but cannot be read ({kind})") from error
        for number in range(1, count + 1):
            where = f"{path}, element {number}"
            try:
                value = unpacker.unpack()
            except Exception as error:
                kind = type(error).__name__
                yield Record(where, error=f"cannot be unpacked ({kind}); what follows is not read")
                return
            yield Record(where, value)


def _parquet_rows(path: Path) -> Iterator[Record]:
    parquet = need("pyarrow.parquet", "a parquet file")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own classes, which are not there where it is not
        raise Refused(f"starts as parquet does, but cannot be read: {error}") from error
    number = 0
    with file:
        batches = file.iter_batches(batch_size=64)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except Exception as error:
                yield Record(f"{path}, after row {number}", error=_break(error))
                return
            for row in rows:
                number += 1
                yield Record(f"{path}, row {number}", row)


__all__ = ["BadRecord", "Record", "Refused", "opened", "records_of"]
