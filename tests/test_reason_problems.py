"""Problems, answers, traces: what is read, what is right, what a child may not learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reasoning import jsonl

from slm_export.errors import InputError
from slm_export.learning.judging import answer_in, known_answers, same_answer
from slm_export.learning.problems import Leaks, Problem, joined, part, read_problems
from slm_export.learning.teaching import Solution
from slm_export.learning.traces import select


def problems(count: int) -> list[Problem]:
    return [Problem(f"{number} plus {number} is", str(2 * number), f"p:{number}") for number in range(count)]


@pytest.mark.parametrize(
    ("given", "known", "same"),
    [
        ("42", "42", True),
        ("42.0", "42", True),
        ("1,234", "1234", True),
        ("12,34", "1234", False),
        ("1/2", "0.5", True),
        ("+5", "5", True),
        ("-5", "5", False),
        ("$7$", "7", True),
        ("**7**", "7", True),
        ("Paris.", "paris", True),
        ("north  west", "North West", True),
        ("7 apples", "7", False),
        ("1e3", "1000", False),
        ("0.1", "1/10", True),
        ("9" * 500, "9" * 500, True),
        ("9" * 500, "9" * 499 + "8", False),
        ("1/0", "1", False),
    ],
)
def test_answers_say_the_same_or_not(given: str, known: str, same: bool) -> None:
    assert same_answer(given, known) is same
    assert same_answer(known, given) is same


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("1 + 1 is 2\nAnswer: 2", "2"),
        ("Answer: 3\nNo, wait.\nAnswer: 4", "4"),
        ("**Answer:** 5", "5"),
        ("answer : 6", "6"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"Answer: \boxed{8}", "8"),
        ("Answer:", None),
        ("the answer is 9", None),
        ("", None),
    ],
)
def test_the_answer_is_found_in_a_solution(solution: str, answer: str | None) -> None:
    assert answer_in(solution) == answer


def test_a_solution_is_right_wrong_or_without_answer() -> None:
    problem = Problem("1 + 1", "2", "p:1")
    assert known_answers(problem, "Answer: 2.0") is None
    assert known_answers(problem, "Answer: 3") == "wrong"
    assert known_answers(problem, "it is 2") == "no answer"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "p.jsonl:2: not JSON"),
        ("[1]", "p.jsonl:2: expected an object"),
        ('{"problem": "x", "answr": "1"}', "unknown key 'answr'; did you mean 'answer'?"),
        ('{"problem": " ", "answer": "1"}', "'problem' must be a text that is not blank"),
        ('{"answer": "1"}', "'problem' is missing"),
        ('{"problem": "x"}', "no 'answer'"),
        ('{"problem": "x", "answer": true}', "'answer' must be a text or a number"),
        ('{"problem": "A  b", "answer": "2"}', "the same problem as"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"problem": "a B", "answer": 1}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_problems(file, answers_needed=True)
    assert words in str(caught.value)
    assert "p.jsonl:2" in str(caught.value)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "a"}\n{"problem": "\xe4"}')
    for name, words in (
        ("empty.jsonl", "empty"),
        ("latin.jsonl", "latin.jsonl:2: not UTF-8"),
        ("no", "no such"),
    ):
        with pytest.raises(InputError, match=words):
            read_problems(tmp_path / name, answers_needed=False)


def test_answers_are_not_needed_where_a_checker_judges(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", [{"problem": "x"}, {"problem": "y", "answer": 1.5}])
    assert [each.answer for each in read_problems(file, answers_needed=False)] == [None, "1.5"]


def test_in_another_order_the_same_problems_are_held_out() -> None:
    given = part(problems(100), 20)
    assert len(given.held_out) == 20
    assert not {each.key for each in given.held_out} & {each.key for each in given.training}
    turned = part(problems(100)[::-1], 20)
    assert {each.key for each in turned.held_out} == {each.key for each in given.held_out}


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(InputError, match="at least 10"):
        part(problems(40), 9)
    with pytest.raises(InputError, match="at least 10"):
        part(problems(12), 12)


def test_a_held_out_problem_that_is_taught_is_refused() -> None:
    held_out = [*problems(10), Problem("7  PLUS 7 is", "14", "h:3")]
    with pytest.raises(InputError, match="h:3: held out, but p:7 teaches it"):
        joined(problems(20)[7:8], held_out[10:])


def test_a_leak_is_found_as_whole_words() -> None:
    leaks = Leaks([Problem("12 + 7 =", "19", "p:1")])
    assert leaks.in_text("As 12 + 7 = 19, ...") is not None
    assert leaks.in_text("as 12+7=19") is not None
    assert leaks.in_text("112 + 7 = 119") is None
    assert leaks.in_text("12 + 70 = 82") is None


def test_of_all_solutions_only_good_ones_are_kept() -> None:
    taught, held_out = problems(3), [Problem("9 plus 9 is", "18", "h:1")]
    written = {
        0: ["Steps.\nAnswer: 0", "steps. ANSWER: 0", "  steps.\nanswer: 0", "Other steps.\nAnswer: 0"],
        1: ["Answer: 3", "", "As 9 plus 9 is 18.\nAnswer: 2", r"So \boxed{2}"],
        2: ["Answer: 5", "no", "Answer: 6", "Answer: 7"],
    }
    solutions = {
        (taught[index].key, sample): Solution(text, finished=text != "Answer: 6")
        for index, texts in written.items()
        for sample, text in enumerate(texts)
    }
    found = select(taught, solutions, known_answers, Leaks(held_out), lambda count: None)
    assert [trace.solution for trace in found.traces] == [
        "Steps.\nAnswer: 0",
        "Other steps.\nAnswer: 0",
        "So \\boxed{2}\nAnswer: 2",
    ]
    assert found.rejected == {
        "duplicate": 2,
        "wrong": 3,
        "empty": 1,
        "leaked": 1,
        "no answer": 1,
        "unfinished": 1,
    }
    assert (found.asked, found.unsolved) == (12, 1)
    assert json.dumps(found.as_json())


def test_the_shortest_right_solution_can_be_preferred() -> None:
    taught = problems(1)
    texts = ["Long, long steps.\nAnswer: 0", "Short.\nAnswer: 0", "S.\nAnswer: 1"]
    solutions = {(taught[0].key, sample): Solution(text, True) for sample, text in enumerate(texts)}
    found = select(taught, solutions, known_answers, Leaks([]), lambda count: None, len)
    assert [trace.solution for trace in found.traces] == ["Short.\nAnswer: 0"]
    assert found.rejected == {"not the shortest": 1, "wrong": 1}
