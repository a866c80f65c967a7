from pathlib import Path

import pytest

from rwkvinside.support.text import (
    did_you_mean,
    listed,
    nearest,
    rounded_bytes,
    rounded_count,
    rounded_flop,
    rounded_time,
    short_count,
    spans,
)


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 K"),
        (1_234_567, "1.235 M"),
        (999_949, "999.9 K"),
        (999_999, "1 M"),  # not 1000 K
        (12_345_678_901, "12.35 B"),
        (999_999_999_999, "1 T"),
        (45_600_000_000_000_000, "45600 T"),
    ],
)
def test_counts(number, text):
    assert rounded_count(number) == text


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1020 * 2**10, "1020 KiB"),
        (2**20 - 1, "1 MiB"),  # not 1024 KiB
        (1_320_000_000, "1.23 GiB"),
        (10 * 2**30, "10 GiB"),
        (1003.4 * 2**30, "1003 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes(number, text):
    assert rounded_bytes(number) == text


@pytest.mark.parametrize("number", [10**i * k for i in range(20) for k in (1, 9.996, 9.9996)])
def test_no_number_is_in_scientific_notation(number):
    for text in (rounded_count(number), rounded_bytes(number), rounded_flop(number)):
        value = float(text.split(" ")[0])
        assert "e" not in text.split(" ")[0] and value >= 1


def test_operations():
    assert [rounded_flop(n) for n in (4.27e9, 1.5e12, 2e17, 989.4e12)] == [
        "4.27 GFLOP",
        "1.5 TFLOP",
        "200 PFLOP",
        "989 TFLOP",
    ]


def test_durations():
    day = 86400
    assert [rounded_time(n) for n in (0.413, 12, 89, 90)] == ["0.41 s", "12 s", "89 s", "1.5 min"]
    assert [rounded_time(n) for n in (200, 7300, 1.96 * day)] == ["3.3 min", "2 h", "2 days"]
    assert [rounded_time(n) for n in (500 * day, 600 * day, 120_000 * day)] == ["500 days", "1.6 years", "330 years"]


def test_short_counts_are_exact():
    assert [short_count(n) for n in (7, 4096, 600_000, 2_500_000, 10**7, 10**9)] == [
        "7",
        "4096",
        "600k",
        "2500k",
        "10M",
        "1B",
    ]


def test_a_single_text_is_a_list_of_one():
    path = Path("a.jsonl")
    assert listed("ab") == ["ab"] and listed(path) == [path] and listed({"seed": 1}) == [{"seed": 1}]
    assert listed(("a", "b")) == ["a", "b"] and listed([]) == []


def test_spans_of_numbers():
    assert [spans(numbers) for numbers in ([], [3], [0, 1, 4], [0, 2, 3, 4, 7])] == ["", "3", "0-1, 4", "0, 2-4, 7"]


def test_the_nearest_word_in_any_case():
    known = ["calibrate", "align", "Qwen3-0.6B"]
    assert nearest("alling", known) == "align"
    assert nearest("qwen3-0.6b", known) == "Qwen3-0.6B"
    assert nearest("something", known) is None
    assert did_you_mean("aling", known, "stages.") == "; did you mean stages.align?"
    assert did_you_mean("something", known) == ""
