"""Text files line by line, and JSON Lines."""

import gzip
from decimal import Decimal

import pytest

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.files.lines import read_json_lines, read_lines
from ktae_trl.files.writing import replace_json_lines


@pytest.fixture(params=["rows.jsonl", "rows.jsonl.gz"])
def file(request, tmp_path):
    def write(content: bytes):
        path = tmp_path / request.param
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


def test_lines_are_counted_and_only_a_newline_ends_one(file):
    path = file("\ufeffa\u2028b\r\n\n\ufeffc".encode())
    assert list(read_lines(path)) == [(1, "a\u2028b\r\n"), (2, "\n"), (3, "\ufeffc")]


def test_objects_come_with_their_line_numbers(file):
    path = file(b'\xef\xbb\xbf{"a": 0.1}\n\n  \n{"b": null}')
    assert list(read_json_lines(path)) == [(1, {"a": 0.1}), (4, {"b": None})]
    assert next(read_json_lines(path, parse_float=Decimal)) == (1, {"a": Decimal("0.1")})


BROKEN = [
    (b'{"b": ', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", r"an object was expected, not \[1\]"),
    (b"caf\xe9", r"byte 4 \(0xe9\) is not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=["cut", "deep", "list", "latin-1"])
def test_a_line_that_holds_no_object_is_named(file, line, message):
    path = file(b'{"a": 1}\n' + line + b'\n{"c": 3}\n')
    with pytest.raises(UserError, match=rf"{path}, line 2: {message}.*\. Delete it$"):
        list(read_json_lines(path, remedy="Delete it"))


def test_damaged_lines_are_left_out_on_request(file, caplog):
    path = file(b'{"a": 1}\n' + b"\n".join(line for line, _ in BROKEN) + b'\n{"c": 3}\n')
    assert list(read_json_lines(path, skip_damaged=True)) == [(1, {"a": 1}), (6, {"c": 3})]
    assert caplog.text.count("Skipped a damaged line") == len(BROKEN)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=f"There is no file {tmp_path}/none.jsonl"):
        next(read_lines(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-10])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz is a damaged gzip file"):
        list(read_json_lines(tmp_path / "cut.jsonl.gz", skip_damaged=True))


def test_what_is_written_is_read(tmp_path):
    rows = [{"text": "a\u2028\n\ud800"}, {"b": [0.1, None]}]
    replace_json_lines(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read_json_lines(tmp_path / "rows.jsonl")] == rows
