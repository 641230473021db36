"""Flags are spelt one way, with underscores, in all that we say; on input dashes are taken as well."""

import re
from pathlib import Path

import pytest

from mua_rl.flags import FlagParser
from mua_rl.run.arguments import AdapterArguments, parse_arguments

ROOT = Path(__file__).parent.parent
OF_OTHERS = {
    *("cap-add", "no-deps"),
    *("data-parallel-size", "enable-lora", "enforce-eager", "gpu-memory-utilization", "logprobs-mode"),
    *("max-logprobs", "max-lora-rank", "max-num-seqs", "tensor-parallel-size", "weight-transfer-config"),
}


@pytest.mark.parametrize("flag", ["--lr_from", "--lr-from"])
def test_a_flag_is_taken_in_either_spelling(flag):
    parser = FlagParser()
    parser.add_argument("--lr_from")
    for words in ([flag, "a-b"], [f"{flag}=a-b"]):
        assert parser.parse_args(words).lr_from == "a-b"
        assert parse_arguments([AdapterArguments], words)[1] == {"lr_from": "a-b"}
    assert "--lr-from" not in parser.format_help()


def test_what_we_say_spells_flags_with_underscores():
    sources = [path for folder in ("mua_rl", "envs", "rewards") for path in (ROOT / folder).rglob("*.py")]
    dashed = {
        (flag, path.name)
        for path in sources
        for flag in re.findall(r"--([a-z0-9]+(?:-[a-z0-9]+)+)\b", path.read_text(encoding="utf-8"))
        if flag not in OF_OTHERS
    }
    assert dashed == set()
