"""Agreement with Math-Verify on its own suite's cases and on ours, every difference argued in docs/math_verdicts.md.

`python tests/test_math_agreement.py` writes that page. The suite's cases come from Math-Verify's source distribution,
which pip fetches once (or which `MATH_VERIFY_SDIST` names); without it their test is skipped. A case there is (gold,
prediction, whether they are equal), here called by its place in that suite: `test function[index]`. A side is what our
extraction finds where it has a marker, else the whole of a short expression; unmarked prose goes through the whole
reward.
"""

import ast
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import math_verify
import pytest
from math_verify import parse

from mua_rl.rewards.extract_math import extract_answer
from mua_rl.rewards.math import WORKER_MODULE, MathVerdict, judge_answers
from mua_rl.rewards.worker_pool import WorkerPool

ARGUMENTS = {
    "commas": (
        "A comma groups thousands or separates; `1,22` is a pair to us, 1.22 to Math-Verify. A space groups "
        "thousands where a completion says so, not in a gold."
    ),
    "whole prose": "Prose handed over as the answer itself is no number (as a completion, its last number counts).",
    "work": ("A plain-number gold wants a number: an expression that still has to be worked out may be the question."),
    "line breaks": "A line break inside `$…$` matters to a search for formulas in prose, which we do not make.",
    "prose formula": (
        "Unmarked prose: the last number counts, a formula does not, since any formula on the way could be the last."
    ),
    "last box": "The last box wins; Math-Verify makes a set of neighbouring boxes.",
    "box first": "A box counts before any unmarked sentence; here the boxes held steps on the way.",
    "decimals": "The suite asks for two decimals; we keep one in a million.",
    "loose": ("The suite asks for the loose mode (other variables, or a relation for a set); we keep the strict one."),
    "mathrm": "Math-Verify 0.9 loses the text after `\\mathrm{e}`, and calls 1 - 1/e and 1 + 1/e equal.",
    "writing": (
        "Another writing of the same value, which Math-Verify does not read: fonts, sizes, colours, spaces, marks "
        "of thousands, characters of Unicode, `5! = 120`, an empty set, angle brackets, a repeating decimal."
    ),
    "labels": "Words that announce an answer, or a unit after it, are no part of it, whatever stands between them.",
    "hedges": "What is taken back, or holds under a condition, is no answer.",
    "counters": "Currencies and counters of every script are units.",
    "scales": (
        "A word that changes the value is no unit, and beside a gold that has one, an answer has it too; "
        "Math-Verify leaves `\\text{million}` out."
    ),
    "prose": (
        "A number of a sentence is read as a whole, with its sign, its fraction, its groups of digits and what is "
        "attached to it; an ordinal is no quantity, and prose in an `<answer>` is no number."
    ),
    "times": (
        "A time of day is no ratio, and am is not pm; where one side names no half of the day, the question names it."
    ),
    "words": (
        "Words, amounts and dates are compared as such: to Math-Verify they are products, differences and quotients."
    ),
    "base": "An integer in a base has the digits and the base of its gold; Math-Verify leaves the subscript out.",
    "equations": "An equation is not what stands on its right.",
    "sets": "A set is not a pair.",
    "double signs": "A formula with a double sign is its two values; Math-Verify reads none in a fraction.",
    "primes": "Math-Verify leaves primes out.",
    "tiny": "Math-Verify calls all tiny values equal; we ask for one in a million of the value.",
}
"""Why our verdict differs from what Math-Verify's suite expects, or from what Math-Verify says of our cases."""

IN_ITS_SUITE = {
    "commas": [
        "test_number_extraction[2]",
        "test_number_extraction[5]",
        "test_number_extraction[6]",
        "test_number_extraction[7]",
        "test_number_extraction[17]",
    ],
    "whole prose": [
        "test_number_extraction[13]",
        "test_number_extraction[14]",
        "test_number_extraction[15]",
        "test_number_extraction[16]",
    ],
    "work": [
        "test_latex_notation[4]",
    ],
    "line breaks": [
        "test_latex_notation[5]",
        "test_latex_notation[6]",
    ],
    "prose formula": [
        "test_simple_fraction_notation[0]",
        "test_simple_fraction_notation[1]",
        "test_latex_notation[9]",
        "test_latex_notation_math[3]",
        "test_relations_math[0]",
        "test_relations_math[1]",
        "test_relations_math[2]",
        "test_relations_math[3]",
        "test_relations_math[4]",
        "test_relations_math[7]",
        "test_matrix_extraction[1]",
        "test_matrix_extraction[2]",
        "test_matrix_extraction[3]",
        "test_matrix_extraction[4]",
        "test_matrix_extraction[5]",
        "test_matrix_extraction[6]",
        "test_math_extraction_edge_cases[2]",
        "test_math_extraction_edge_cases[11]",
        "test_math_extraction_additional_cases[19]",
    ],
    "last box": [
        "test_math_extraction_additional_cases[27]",
        "test_math_extraction_additional_cases[28]",
        "test_boxed[0]",
        "test_numina_cases[12]",
        "test_numina_cases[13]",
        "test_open_thoughts[0]",
        "test_open_thoughts[12]",
        "test_open_thoughts[13]",
        "test_open_thoughts[14]",
        "test_open_thoughts[16]",
        "test_open_thoughts[18]",
        "test_open_thoughts[19]",
        "test_open_thoughts[23]",
        "test_open_thoughts[24]",
        "test_open_thoughts[25]",
        "test_open_thoughts[26]",
        "test_open_thoughts[27]",
    ],
    "box first": [
        "test_math_extraction_additional_cases[17]",
    ],
    "decimals": [
        "test_complex_math_expressions[7]",
        "test_complex_math_expressions[13]",
    ],
    "loose": [
        "test_set_rel_assymetry[2]",
        "test_strict_variable_comparison[1]",
    ],
    "mathrm": [
        "test_string_extraction[9]",
    ],
}
CASES_FILE = Path(__file__).parent / "data" / "math_cases.jsonl"
CASES = [json.loads(line) for line in CASES_FILE.read_text(encoding="utf-8").splitlines()]
PAGE = Path(__file__).parent.parent / "docs" / "math_verdicts.md"
HEAD = """# What a verdict of the math reward means, and where it differs from Math-Verify's

A reward is 1 for `right`, 0 for every other verdict, and `None`, which TRL leaves out, for `bad_gold`.

| verdict | meaning | metric |
| --- | --- | --- |
| `right`, `wrong` | The answer equals the gold, or it does not. | |
| `no_answer` | There is no marked answer and no last number; strictly, no single marked answer at the end. | \
`math/no_answer` |
| `unreadable` | An answer is there, but it has over 500 characters or is no mathematics. | `math/unreadable` |
| `timeout` | The comparison took more than 2 seconds, twice. | `math/timeout` |
| `killed`, `memory` | The comparison ended its process, twice, or took more than 1 GiB. | `math/error` |
| `bad_gold` | The gold is empty, too long, cannot be read or does not equal itself; the log has it. | |

A `timeout`, `killed` or `memory` is not remembered: the same answer is compared anew the next time. Above one answer in
a hundred, the log says so.

## Differences

`math_reward` compares plain numbers, times, dates, amounts and words itself, exactly, and leaves everything else to
Math-Verify 0.9. The table has every difference on the cases of Math-Verify's own test suite, by their places there, and
on ours (`tests/data/math_cases.jsonl`), where Math-Verify is used as its documentation has it: the gold in `$…$`, the
whole completion parsed. `tests/test_math_agreement.py` fails on a difference that is not in it, and on one too many.

| Why | Right here, wrong to Math-Verify | Wrong here, right to Math-Verify | In its own suite |
| --- | --- | --- | --- |
"""
GOLD_IN_PROSE = 5
"""Cases whose gold is unmarked prose, which no row of a dataset is."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    installed = version("math-verify")
    archive = os.environ.get("MATH_VERIFY_SDIST")
    if archive is None:
        folder = tmp_path_factory.mktemp("sdist")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            str(folder),
        ]
        done = subprocess.run([*command, f"math-verify=={installed}"], capture_output=True, timeout=120)
        found = list(folder.glob("*.tar.gz"))
        if done.returncode or not found:
            pytest.skip("Math-Verify's source distribution is not to be had; set MATH_VERIFY_SDIST to its file")
        archive = found[0]
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if re.search(r"/tests/test_\w+\.py$", name))
        return [case for name in names for case in cases(tar.extractfile(name).read().decode())]


def cases(source):
    """(place, gold, prediction, equal) for each parametrized row of one test file, without running it."""
    for function in ast.parse(source).body:
        for decorator in getattr(function, "decorator_list", []):
            if not isinstance(decorator, ast.Call) or "parametrize" not in ast.unparse(decorator.func):
                continue
            names = [name.strip() for name in ast.literal_eval(decorator.args[0]).split(",")]
            try:
                rows = ast.literal_eval(decorator.args[1])
            except ValueError:  # one row is computed; tests/test_math_reward.py has its like (a rounded root)
                continue
            if "gold" in names:
                for index, row in enumerate(rows):
                    row = dict(zip(names, row, strict=False))
                    equal = bool(row.get("expected", row.get("result")))
                    yield f"{function.name}[{index}]", row["gold"], row["pred"], equal


EXPRESSION = re.compile(
    r"\s*(?:Answer )?(\$\$.*\$\$|\$[^$]*\$|\\\[.*\\\]|\\\(.*\\\)|[^$\\]{1,40})\s*", re.DOTALL
)  # fmt: skip


def side(text):
    if re.search(r"\\boxed|####|<answer>", text):
        extract = extract_answer(text)
        return extract.text if extract else None
    match = EXPRESSION.fullmatch(text)
    return match[1] if match else None


@pytest.mark.slow
def test_every_difference_from_math_verify_is_listed(suite):
    assert len(suite) > 250
    pairs, places, expected, gold_in_prose = [], [], [], 0
    for place, gold_text, prediction, equal in suite:
        gold = side(gold_text)
        if gold is None:
            gold_in_prose += 1
            continue
        answer = side(prediction)
        if answer is None:
            extract = extract_answer(prediction)
            answer = extract.text if extract else ""
        pairs.append((gold, answer))
        places.append(place)
        expected.append(equal)
    pool = WorkerPool(WORKER_MODULE, seconds=20.0)  # a busy machine is no difference
    verdicts = judge_answers(pairs, pool=pool)
    pool.close()
    differences = {
        place
        for place, verdict, equal in zip(places, verdicts, expected, strict=True)
        if (verdict is MathVerdict.RIGHT) != equal
    }
    listed = [place for places in IN_ITS_SUITE.values() for place in places]
    assert len(listed) == len(set(listed))
    assert differences == set(listed)
    assert gold_in_prose == GOLD_IN_PROSE


def test_every_difference_from_math_verify_on_our_cases_is_argued():
    logging.disable(logging.CRITICAL)  # it warns of every expression that it does not read
    try:
        theirs = [math_verify.verify(parse(f"${case['gold']}$"), parse(case["completion"])) for case in CASES]
    finally:
        logging.disable(logging.NOTSET)
    differences = [case for case, equal in zip(CASES, theirs, strict=True) if bool(equal) != bool(case["expect"])]
    assert differences == [case for case in CASES if "differs" in case]


def test_the_page_of_verdicts_has_every_argument():
    assert PAGE.read_text(encoding="utf-8") == page()


def page():
    """docs/math_verdicts.md."""
    lines = [HEAD]
    for key, argument in ARGUMENTS.items():
        ours = [case for case in CASES if case.get("differs") == key]
        shown = ["; ".join(map(shown_case, (case for case in ours if case["expect"] == score))) for score in (1.0, 0.0)]
        lines.append(f"| {argument} | {shown[0]} | {shown[1]} | {', '.join(IN_ITS_SUITE.get(key, []))} |\n")
    return "".join(lines)


def shown_case(case):
    completion = case["completion"].removeprefix("Therefore the final answer is $").removesuffix("$.")
    return f"`{completion}` for `{case['gold']}`".replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
