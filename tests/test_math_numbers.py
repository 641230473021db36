"""The plain-number conventions of mua_rl.rewards.numbers, as tables."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mua_rl.rewards.numbers import NumberInBase, parse_in_base, parse_number, same_number

READ = [
    # integers, signs, thousands
    ("72", 72),
    ("-72", -72),
    ("+72", 72),
    ("- 72", -72),
    ("−72", -72),
    ("007", 7),
    ("1,234", 1234),
    ("1,234,567.50", Fraction("1234567.5")),
    ("1{,}234", 1234),
    ("14\\,916", 14916),
    ("11,\\! 111,\\! 111,\\! 100", 11111111100),
    # decimals and powers of ten
    (".5", Fraction(1, 2)),
    ("5.", 5),
    ("0.10", Fraction(1, 10)),
    ("1e3", 1000),
    ("1.5 \\times 10^{-3}", Fraction(15, 10000)),
    ("10^{-8}", Fraction(1, 10**8)),
    ("0.\\overline{3}", Fraction(1, 3)),
    ("-0.1\\overline{6}", Fraction(-1, 6)),
    (".\\overline{142857}", Fraction(1, 7)),
    ("1{,}000.\\bar3", Fraction(3001, 3)),
    # fractions
    ("3/4", Fraction(3, 4)),
    ("\\frac{3}{4}", Fraction(3, 4)),
    ("-\\dfrac{3}{4}", Fraction(-3, 4)),
    ("\\frac34", Fraction(3, 4)),
    ("\\frac{-3}{4}", Fraction(-3, 4)),
    ("1\\frac{3}{4}", Fraction(7, 4)),
    ("-1 3/4", Fraction(-7, 4)),
    # markup, currency, units
    ("$72$", 72),
    ("\\(72\\)", 72),
    ("**72**.", 72),
    ("$1,000.99", Fraction("1000.99")),
    ("\\$5", 5),
    ("-$5", -5),
    ("5€", 5),
    ("12 apples", 12),
    ("60 miles per hour", 60),
    ("60 km/h", 60),
    ("5cm", 5),
    ("15\\mbox{ cm}^2", 15),
    ("1000.99m²", Fraction("1000.99")),
    ("5\\text{ m}", 5),
    ("90^\\circ", 90),
    ("90^{\\circ}", 90),
    ("90°", 90),
]

NOT_PLAIN = [
    "", " ", "$", "-", "--5", "+-5", ".", "x", "5x", "5 x", "5 m", "5\\pi", "5 pi", "\\sqrt{2}", "2+3", "3^5", "5!",
    "12/0", "\\frac{1}{0}", "2\\frac{7}{3}", "1,2345", "1,22", "12,34,567", "1 000", "0x10", "1_000", "3:30",
    "5 or 6", "5, 6", "5;6", "5 and 6", "(5, 6)", "5 \\text{ or } 6", "5 but 6", "5 not",
    "\\overline{3}", "3\\overline{3}", "0.\\overline{}", "0.\\overline{x}",
    "5 million", "3 halves", "two", "5 squared", "5 dozen", "5 factorial", "5 times",
    "nan", "NaN", "inf", "-inf", "infinity", "\\infty", "1e9999",
    "١٢", "５", "²", "5\x00", "\ud800", "9" * 501, "5" + " " * 600,
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), READ)
def test_reads_plain_numbers_exactly(text, value):
    number = parse_number(text)
    assert number is not None and number.value == value and not number.percent


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_anything_else_is_not_a_plain_number(text):
    assert parse_number(text) is None


IN_BASE = [
    "12_8", "12_{8}", "$12_8$", "12_{ 8 }.", "0012_8", "+12_8", "12 _ 8", "12\\_8", "(12)_8", "(12_8)", "\\{12_8\\}",
    "12_\\text{8}", "12_{\\text{base }8}", "\\mathrm{12}_{8}", "12_{(8)}", "12 base 8", "12 \\text{ (base 8)}",
]  # fmt: skip
NOT_IN_BASE = [
    "12", "_8", "12_", "base 8", "12_1", "12_17", "19_8", "12_8_8", "12_{8,3}", "12_8^2", "1.2_8", "12_b", "12_{eight}",
    "A_{12}", "ab_{12}", "x_1", "1A_8", "1aA_{16}", "10C_3", "f(12)_8", "12_8, 13_8", "12_8 = 10", "-(12)_8", "1 2_8",
    "١٢_8", "1" * 500 + "_2", "",
]  # fmt: skip


@pytest.mark.parametrize("text", IN_BASE)
def test_reads_an_integer_in_a_base_however_it_is_marked(text):
    assert parse_in_base(text) == NumberInBase("12", 8) and parse_number(text) is None


@pytest.mark.parametrize("text", NOT_IN_BASE)
def test_anything_else_is_no_integer_in_a_base(text):
    assert parse_in_base(text) is None


def test_integers_in_a_base_have_a_sign_digits_beyond_nine_and_the_base_that_they_name():
    assert parse_in_base("-012_8") == NumberInBase("-12", 8) and parse_in_base("0_2") == NumberInBase("0", 2)
    assert parse_in_base("1a_{16}") == parse_in_base("1A_16") == NumberInBase("1A", 16)
    assert parse_in_base("DEE_{16}") == NumberInBase("DEE", 16)
    assert parse_in_base("12", 8) == parse_in_base("12_8", 9) == NumberInBase("12", 8)
    assert parse_in_base("19", 8) is None


@pytest.mark.parametrize("text", ["28%", "28\\%", "28 percent", "28 pct", "28\\text{ percent}", "$28\\%$"])
def test_percent_is_read_as_a_mark_on_the_number(text):
    number = parse_number(text)
    assert number is not None and number.value == 28 and number.percent


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("1/2", "0.5", True),
        ("1,000", "1000.00", True),
        ("0.1", "1/10", True),
        ("0.1", "0.1000001", False),
        ("0", "0.00000001", False),  # Math-Verify rounds both to 0
        ("10^{-8}", "10^{-9}", False),
        ("12345678901234567890", "12345678901234567891", False),  # floats would be equal
        ("1/3", "0.333333", True),
        ("2/3", "0.666667", True),
        ("2/3", "0.666666", False),  # truncated, not rounded
        ("1/3", "0.33333", False),  # five digits
        ("1/3", "0.33", False),
        ("1/3000000000", "0.000000", False),
        ("1/8", "0.1250001", False),  # a terminating fraction has an exact decimal
        ("28%", "28", True),
        ("28%", "0.28", True),
        ("28%", "28%", True),
        ("28%", "0.28%", False),
        ("28%", "2800", False),
    ],
)
def test_equality_is_exact_but_for_rounded_fractions_and_percent(left, right, same):
    a, b = parse_number(left), parse_number(right)
    assert a is not None and b is not None
    assert same_number(a, b) is same
    assert same_number(b, a) is same


@given(st.text(max_size=60))
def test_total_on_any_text(text):
    parse_number(text)


@given(st.text(alphabet="0123456789.,-+eE/\\{}frac$% ^*tims\n", max_size=60))
def test_total_on_number_like_text(text):
    parse_number(text)


@given(st.fractions(max_denominator=10**9))
def test_every_written_fraction_is_read_back(value):
    number = parse_number(str(value))
    assert number is not None and number.value == value
