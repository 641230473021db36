"""Units, counters and currencies that stand beside a number, and the words there that change its value instead."""

import re
import unicodedata

from mua_rl.rewards.latex import TEXT_COMMAND

_SIGNS = "".join(map(chr, (*range(0x20A0, 0x20C1), 0x09F3, 0x0E3F, 0xFDFC, 0xFFE5, 0xFFE6)))
_CODES = (
    "USD|EUR|GBP|JPY|CNY|RMB|INR|RUB|KRW|CHF|CAD|AUD|NZD|HKD|SGD|MXN|BRL|SEK|NOK|DKK|PLN|CZK|HUF|TRY|ILS|AED|SAR|THB"
    "|IDR|MYR|PHP|VND|ZAR|NGN|EGP|PKR|BDT|TWD|Rs"
)
_SIGN = rf"(?:(?:US|CA?|AU?|HK|NT|NZ|S|R|Mex)?\\?\$|[¢£¥{_SIGNS}]|(?:{_CODES})\b\.?)"
CURRENCY = rf"(?:{_SIGN}|\\text\{{\s*{_SIGN}\s*\}})"
"""A currency's sign or code, before or after its number."""

# Units that are too short to be told from a product of variables by their length, but are written beside numbers.
_SHORT_UNITS = (
    "[cmkdn]m|ft|in|yd|mi|[mk]g|lb|oz|[mcd][lL]|hr|ms|[ap]m|sq|cu|pt|qt|mo|wk|yr|ha|Hz|k[WJ]|[kKMGT]B|zł|kr|Kč|Ft"
)
_FIRST_SHORT = re.compile(_SHORT_UNITS)
_LATER_SHORT = re.compile(f"{_SHORT_UNITS}|of|an?")
_SCALES = (
    r"hundreds?|thousands?|thou|grand|lakhs?|lacs?|crores?|dozens?|score|gross|k|M|MM|B|T|mn|bn|tn|mio|mln|mld|mrd|tys|tsd"
    r"|\w*illi(?:on|ard)\w*|mill?|mil(?:jo|io|ia|yo|ya|hõ|hã|lo|ló)\w*|mille|milliers?|mila|tausend\w*|hundert\w*"
    r"|dutzend\w*|cien(?:to)?s?|centaines?|douzaines?|docenas?|d[uú]zias?|duizend|honderd|tysi\w+"
    r"|ribu|juta|ratus|lusin|yüz|trăm|nghìn|ngàn|triệu|t[ỷỉ]"
    r"|тыс\w*|млн|млрд|трлн|миллион\w*|миллиард\w*|мільйон\w*|мільярд\w*|сот(?:ен|ни|ня)|десят\w+|дюжин\w*"
    r"|χιλι\w+|\w*εκατομμ\w+|(?:[만억천백십]|조원|할$|반$).*|.*[半割折打多余餘].*|ダース|สิบ|ร้อย|พัน|หมื่น|แสน|ล้าน|โหล"
    r"|सौ|हज़ार|हजार|लाख|करोड़|करोड़|अरब|दर्जन|শত|হাজার|লাখ|কোটি"
    r"|مئة|مائة|ألف|آلاف|الف|مليون|ملايين|مليار|هزار|میلیون|میلیارد|ہزار|لاکھ|کروڑ|מאות|אלף|אלפים|מיליון|מיליארד"
)
_PARTS = (
    r"hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|\w+ths|double|triple"
    r"|squared|cubed|factorial|negative|hälfte|половин\w*|трет\w*|четверт\w*"
)
_NUMBER_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy"
    "|eighty|ninety"
)
_OTHER_VALUES = (
    r"choose|times|plus|minus|over|divided|multiplied|mod|modulo|sqrt|frac|sin|cos|tan|cot|sec|csc|log|exp|infinity"
    r"|infty|alpha|beta|theta|base|more|less|than|per\s*cent|percent\w*|pct|and|not|but|or|to|nor|versus"
)
_SCALE = re.compile(_SCALES, re.IGNORECASE)
_HAN_SCALE = re.compile("[十百千万萬亿億兆]")
_CHANGING = re.compile(f"{_SCALES}|{_PARTS}|{_NUMBER_WORDS}", re.IGNORECASE)
_CASE_MATTERS = frozenset({"m", "mm", "b", "t"})  # metres and tonnes, not millions and trillions
_NOT_UNITS = re.compile(_OTHER_VALUES, re.IGNORECASE)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0903\u093a-\u094d\u0980-\u0983\u09bc-\u09cd\u0e31-\u0e4e"
_UNIT_WORD = re.compile(
    rf"(o'clock|(?:(?![²³])[^\W\d_]|[{_MARKS}])+)(\s*\^\s*(?:[23]|\{{\s*[23]\s*\}})|[²³])?", re.IGNORECASE
)
_UNIT_JOINT = re.compile(r"[\s/.·()\-]*")
_THOUSANDS_OF = re.compile("千(?=[克米瓦卡焦帕赫伏])")  # kilo: kilogram, kilometre, …
_HALF_OF_DAY = re.compile(r"\b([ap])\.\s*m\b\.?", re.IGNORECASE)
_LONGER_SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "MATHEMATICAL")


def changes_value(word: str) -> bool:
    """Whether a word beside a number makes it another number: `million`, `K`, `thirds`, `squared`."""
    word = _THOUSANDS_OF.sub("", word)
    if not word.isascii() and any(char.isnumeric() and char not in "²³" for char in word):  # 万, 五
        return True
    return word not in _CASE_MATTERS and _CHANGING.fullmatch(word) is not None


def is_scale(word: str) -> bool:
    """Whether a word multiplies the number before it: `million`, `k`, `dozen`."""
    word = _THOUSANDS_OF.sub("", word)
    return word not in _CASE_MATTERS and (_SCALE.fullmatch(word) is not None or _HAN_SCALE.match(word) is not None)


def changing_words(text: str) -> list[str]:
    r"""The words in the `\text{…}` of a `plain_latex` that change the value beside them, sorted."""
    commands = re.findall(r"\\text\{([^{}]*)\}", text)  # \mathrm{T} may be a transpose
    words = (word for command in commands for word in re.findall(r"[^\W\d_]+", command))
    return sorted(word.casefold() for word in words if changes_value(word))


def is_unit(suffix: str) -> bool:
    """Whether `suffix`, of a `plain_latex`, is nothing but a unit: words of at least three letters, or known ones."""
    text, in_text_command = TEXT_COMMAND.subn(r" \1 ", suffix)
    text = _HALF_OF_DAY.sub(r"\1m", text)
    position = words = 0
    while True:
        joint = _UNIT_JOINT.match(text, position)
        position = joint.end() if joint else position
        if position == len(text):
            return True
        match = _UNIT_WORD.match(text, position)
        if match is None or words == 6:
            return False
        word = match[1]
        # A lone letter is a unit only where the writing says so; otherwise `5 m` is the product of 5 and m.
        said_so = bool(in_text_command or match[2] in ("²", "³") or (words and joint is not None and "/" in joint[0]))
        if not _may_be_unit(word, said_so, first=words == 0):
            return False
        words += 1
        position = match.end()


def _may_be_unit(word: str, said_so: bool, first: bool) -> bool:
    if word.casefold() in ("squared", "cubed") and not first:  # `inches squared`
        return True
    if _NOT_UNITS.fullmatch(word) or changes_value(word):
        return False
    if len(word) >= 3 or said_so or (_FIRST_SHORT if first else _LATER_SHORT).fullmatch(word):
        return True
    script = unicodedata.name(word[0], "").split(" ")[0]
    return script not in _LONGER_SCRIPTS or (script == "CYRILLIC" and len(word) == 2)
