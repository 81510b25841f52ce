"""`visattn bench attention`: one row per pair, and names and numbers that are checked first."""

import re

import pytest

from visattn.__main__ import main


@pytest.fixture
def call():
    import torch

    threads = torch.get_num_threads()
    yield lambda *options: main(["bench", "attention", "--time-only", "--repeats", "1", *options])
    torch.set_num_threads(threads)


def test_a_row_per_pair_and_a_table_per_length(call, capsys):
    assert call("--pairs", "linear-l1,scaled_dot-entmax15", "--tokens", "11,13") == 0
    out = capsys.readouterr().out
    assert re.findall(r"\(B, H, N, D\) = \(8, 6, (\d+), 64\)", out) == ["11", "13"]
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in out.splitlines()
        if re.match(r"\| \w+-", line)
    ]
    assert [(row[1], row[2]) for row in rows] == 2 * [
        ("linear-l1", "associative"),
        ("scaled_dot-entmax15", "blocked"),
    ]
    assert all(re.fullmatch(r"\d+\.\d+x / \d+\.\d+x", row[5]) and row[8] == "-" for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--pairs", "scaled_dott-softmax"), "scaled_dot"),
        (("--pairs", "scaled_dot-softmx"), "softmax"),
        (("--tokens", "many"), "tokens must be whole numbers with commas between, got 'many'"),
        (("--tokens", "0"), "tokens must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(call, capsys, options, message):
    assert call(*options) == 2
    assert message in capsys.readouterr().err
