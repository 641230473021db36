"""Agreement with the cases of Math-Verify's own test suite, every difference listed and argued.

The cases are read from Math-Verify's source distribution, which pip fetches once (or which `MATH_VERIFY_SDIST` names);
without it the test is skipped. A case is (gold, prediction, whether they are equal), here called by its place in that
suite: `test function[index]`. A side is what our extraction finds where it has a marker, else the whole of a short
expression; unmarked prose goes through the whole reward.
"""

import ast
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version

import pytest

from mua_rl.rewards.extract_math import extract_answer
from mua_rl.rewards.math import MathVerdict, judge_answers

OUR_ANSWER = {
    "A comma groups thousands or separates; a space does neither. `1,22` is a pair to us, 1.22 to Math-Verify.": [
        "test_number_extraction[2]",
        "test_number_extraction[5]",
        "test_number_extraction[6]",
        "test_number_extraction[7]",
        "test_number_extraction[17]",
    ],
    "Prose handed over as the answer itself is no number (as a completion, its last number counts).": [
        "test_number_extraction[13]",
        "test_number_extraction[14]",
        "test_number_extraction[15]",
        "test_number_extraction[16]",
    ],
    "A plain-number gold wants a number: an expression that still has to be worked out may be the question.": [
        "test_latex_notation[4]",
    ],
    "A line break inside `$…$` matters to a search for formulas in prose, which we do not make.": [
        "test_latex_notation[5]",
        "test_latex_notation[6]",
    ],
    "Unmarked prose: the last number counts, a formula does not, since any formula on the way could be the last.": [
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
    "The last box wins; Math-Verify makes a set of neighbouring boxes.": [
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
    "A box counts before any unmarked sentence; here the boxes held steps on the way.": [
        "test_math_extraction_additional_cases[17]",
    ],
    "The suite asks for two decimals; we keep one in a million.": [
        "test_complex_math_expressions[7]",
        "test_complex_math_expressions[13]",
    ],
    "The suite asks for the loose mode (other variables, or a relation for a set); we keep the strict one.": [
        "test_set_rel_assymetry[2]",
        "test_strict_variable_comparison[1]",
    ],
    "Math-Verify 0.9 loses the text after \\mathrm{e}, and calls 1 - 1/e and 1 + 1/e equal.": [
        "test_string_extraction[9]",
    ],
}
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
    verdicts = judge_answers(pairs)
    differences = {
        place
        for place, verdict, equal in zip(places, verdicts, expected, strict=True)
        if (verdict is MathVerdict.RIGHT) != equal
    }
    listed = [place for places in OUR_ANSWER.values() for place in places]
    assert len(listed) == len(set(listed))
    assert differences == set(listed)
    assert gold_in_prose == GOLD_IN_PROSE
