"""Whether two texts on standard output are the same answer."""

from decimal import Decimal, InvalidOperation


def same_output(output: bytes, expected: str) -> bool:
    """Line by line, without trailing white space and blank lines at the end; else word by word, where numbers are
    equal by value (`1.50` and `1.5`), with no tolerance."""
    try:
        given = _lines(output.decode())
    except UnicodeDecodeError:
        return False
    wanted = _lines(expected)
    if given == wanted:
        return True
    if len(given) != len(wanted):
        return False
    return all(map(_same_line, given, wanted))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_line(given: str, wanted: str) -> bool:
    words, expected = given.split(), wanted.split()
    return len(words) == len(expected) and all(
        a == b or _same_number(a, b) for a, b in zip(words, expected, strict=True)
    )


def _same_number(given: str, wanted: str) -> bool:
    if len(given) > 1000 or not (given.isascii() and wanted.isascii()):
        return False
    try:
        a, b = Decimal(given), Decimal(wanted)
    except InvalidOperation:
        return False
    return a.is_finite() and b.is_finite() and a == b
