"""The task registry, and what becomes of bad rows."""

import importlib
import inspect
import json
import pickle
from dataclasses import replace

import pytest

from mua_rl.envs import tasks
from mua_rl.envs.row_files import read_split
from mua_rl.envs.tasks import checked, get_task, register_task, task_names
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import parse as parse_grpo

GSM8K_ROWS = [
    {"question": "What is 2+3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"},
    {"question": "What is 600+700?", "answer": "#### 1,300"},
]
MATH_ROWS = [
    {"problem": "Half?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."},
    {"problem": "Roots?", "level": "Level 5", "type": "Algebra", "solution": "\\boxed{1 \\pm \\sqrt{19}}"},
]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def score(task, split, completions):
    columns = {name: split[name] for name in split.column_names if name != "prompt"}
    return task.correct(prompts=split["prompt"], completions=completions, **columns)


def test_every_built_in_task_is_listed_and_unknown_ones_are_refused():
    names = {"arithmetic", "gsm8k", "math", "reasoning-gym", "humaneval", "mbpp", "one-liners", "jsonl"}
    names |= {"apps", "taco", "livecodebench", "humanevalplus", "mbppplus"}
    assert names <= set(task_names())
    with pytest.raises(UserError, match="there is no task 'nope'; the tasks are: apps, arithmetic"):
        get_task("nope")


def test_every_task_that_a_module_of_ours_registers_is_found_without_importing_it_first():
    for module in set(tasks._BUILT_IN.values()):
        importlib.import_module(module)
    ours = {name for name, build in tasks._TASKS.items() if build.__module__.startswith("mua_rl.")}
    assert ours == set(tasks._BUILT_IN)


def test_arithmetic_still_builds():
    task = get_task("arithmetic")
    assert {"prompt", "answer"} <= set(task.held_out(False).column_names)


def test_easy_arithmetic_has_sums_and_products_of_digits_and_no_problem_in_both_splits():
    task = get_task("easy-arithmetic")
    train, held_out = task.train(False), task.held_out(False)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert [eval(prompt.rstrip("=")) for prompt in train["prompt"]] == train["answer"]
    products = [prompt for prompt in train["prompt"] if "*" in prompt]
    assert len(products) == pytest.approx(len(train) / 2, rel=0.05)
    assert {len(prompt) for prompt in products} == {len("1*1=")}
    assert max(len(prompt) for prompt in train["prompt"]) == len("10+10=")


def test_differences_are_right_below_zero_too_and_none_is_in_both_splits():
    task = get_task("differences")
    train, held_out = task.train(False), task.held_out(False)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert [eval(prompt.rstrip("=")) for prompt in train["prompt"]] == train["answer"]
    answers = held_out["answer"][:]
    assert min(answers) < 0
    assert score(task, held_out, [f"so {answer}" for answer in answers]) == [1.0] * len(answers)
    assert sum(score(task, held_out, [str(-answer) for answer in answers])) == answers.count(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arithmetic:5", "takes no argument"),
        ("gsm8k:", "ends with a colon"),
        ("jsonl", "needs a path"),
        ("jsonl:/no/such/file.jsonl", "no file or folder"),
        ("no_such_file.py:x", "no task file"),
        ("reasoning-gym", "say which generator"),
        ("reasoning-gym:nope", "no generator 'nope'"),
        ("reasoning-gym:chain_sum,max_terms", "key=value"),
        ("reasoning-gym:chain_sum,size=0", "size is 0"),
    ],
)
def test_a_bad_spec_is_one_clear_error(spec, message):
    with pytest.raises(UserError, match=message):
        get_task(spec)


def test_bad_rows_option_is_checked():
    with pytest.raises(UserError, match="'skip' or 'refuse'"):
        get_task("gsm8k", bad_rows="ignore")


def test_a_task_from_a_file_needs_no_change_here(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from datasets import Dataset\n"
        "from mua_rl.envs.tasks import Task, register_task\n"
        "def reward(completions, **columns):\n"
        "    return [float(c == 'yes') for c in completions]\n"
        "@register_task('say-yes')\n"
        "def say_yes():\n"
        "    rows = lambda conversational: Dataset.from_dict({'prompt': ['Say yes.']})\n"
        "    return Task('say-yes', rows, rows, (reward,), reward)\n"
    )
    task = get_task(f"{file}:say-yes")
    assert score(task, task.held_out(False), ["yes"]) == [1.0]
    assert pickle.loads(pickle.dumps(task.correct)) is task.correct
    with pytest.raises(UserError, match="registers no task 'other'"):
        get_task(f"{file}:other")


def test_a_broken_task_file_says_why(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\n")
    with pytest.raises(UserError, match="no_such_module"):
        get_task(f"{file}:x")


def test_a_later_registration_replaces_the_earlier(monkeypatch):
    first = get_task("arithmetic")
    monkeypatch.setattr(tasks, "_TASKS", {})
    second = replace(first, max_completion_length=9)
    register_task("a")(lambda: first)
    register_task("a")(lambda: second)
    assert get_task("a") is second


def test_a_builder_that_fails_or_makes_no_task_is_refused(monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", {"a": lambda: 1 / 0, "b": lambda: "b"})
    with pytest.raises(UserError, match=r"the task 'a' failed: ZeroDivisionError: division by zero \(.*test_tasks.py:"):
        get_task("a")
    with pytest.raises(UserError, match="'b' returns a str, not a Task"):
        get_task("b")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "gives 1 scores for 2 answers"),
        (1.0, "gives no list of scores: 1.0"),
        (["good", "bad"], "gives no list of scores: "),
        ([1.0, float("nan")], "not finite"),
    ],
)
def test_what_is_no_score_is_refused(scores, message):
    with pytest.raises(UserError, match=f"the reward mine of the task t gives .*{message.removeprefix('gives ')}"):
        checked(named("mine", scores), "t")(prompts=["", ""], completions=["a", "b"])


def test_a_checked_reward_has_the_scores_the_name_and_the_signature_of_its_own():
    reward = checked(named("mine", [True, None]), "t")
    assert reward(prompts=["", ""], completions=["a", "b"]) == [1.0, None]
    assert reward.__name__ == "mine"
    assert set(inspect.signature(reward).parameters) == {"prompts", "completions", "columns"}


def named(name, scores):
    def reward(prompts, completions, **columns):
        return scores

    reward.__name__ = name
    return reward


def test_too_few_rows_to_hold_one_out_are_refused_with_the_cure(tmp_path):
    task = get_task(f"jsonl:{write_jsonl(tmp_path / 'rows.jsonl', [{'prompt': '1+1=', 'answer': '2'}])}")
    with pytest.raises(UserError, match=r"has no rows to (hold out|train on) .* a folder with train.jsonl"):
        task.train(False), task.held_out(False)


@pytest.mark.parametrize("layout", ["jsonl", "hub parquet", "main folder"])
def test_gsm8k_reads_the_published_layouts(tmp_path, layout):
    if layout == "jsonl":
        for name in ("train", "test"):
            write_jsonl(tmp_path / f"{name}.jsonl", GSM8K_ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        folder = tmp_path / ("main" if layout == "main folder" else "data")
        folder.mkdir()
        for name in ("train", "test"):
            table = pyarrow.Table.from_pylist(GSM8K_ROWS)
            pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    task = get_task(f"gsm8k:{tmp_path}")
    split = task.held_out(True)
    assert split["answer"] == ["5", "1,300"]
    assert split["prompt"][0][0]["role"] == "user" and "What is 2+3?" in split["prompt"][0][0]["content"]
    assert "<answer>" in task.train(False)["prompt"][0]
    assert score(task, split, ["<think>x</think> <answer>5</answer>", "#### 1300"]) == [1.0, 1.0]


def test_the_papers_recipe_is_one_for_right_and_a_tenth_for_format(tmp_path):
    task = get_task(f"gsm8k:{write_jsonl(tmp_path / 'test.jsonl', GSM8K_ROWS)}")
    split = task.held_out(False)
    completions = ["<think>x</think> <answer>5</answer>", "<think>x</think> <answer>6</answer>"]
    scores = [reward(completions=completions, answer=split["answer"]) for reward in task.rewards]
    totals = [sum(w * s for w, s in zip(task.reward_weights, row, strict=True)) for row in zip(*scores, strict=True)]
    assert totals == [1.1, 0.1]


def test_math_reads_solutions_answers_and_the_original_folders(tmp_path):
    original = tmp_path / "MATH"
    for number, row in enumerate(MATH_ROWS):
        folder = original / "test" / "algebra"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.json").write_text(json.dumps(row))
    assert get_task(f"math:{original}").held_out(False)["answer"] == ["\\frac{1}{2}", "1 \\pm \\sqrt{19}"]
    five_hundred = write_jsonl(tmp_path / "test.jsonl", [{"problem": "?", "answer": "2\\sqrt{3}", "solution": "none"}])
    task = get_task(f"math:{five_hundred}")
    assert score(task, task.held_out(False), ["\\boxed{\\sqrt{12}}"]) == [1.0]


BAD_GSM8K = [
    GSM8K_ROWS[0],
    {"question": "No mark", "answer": "5"},
    {"question": "Nothing after it", "answer": "####"},
    {"question": "Absurd", "answer": "#### \\frac{1}{"},
    {"answer": "#### 5"},
    {"question": 7, "answer": "#### 5"},
    "{not json",
    "[1, 2]",
    GSM8K_ROWS[1],
]


def test_bad_rows_are_skipped_and_reported_with_file_and_line(tmp_path, caplog):
    path = write_jsonl(tmp_path / "test.jsonl", BAD_GSM8K)
    split = get_task(f"gsm8k:{path}").held_out(False)
    assert split["answer"] == ["5", "1,300"]
    report = caplog.text
    assert "skipped 7 of 9 rows" in report
    for line, reason in [
        (2, "no '####'"), (3, "no usable answer"), (4, "not find the answer equal to itself"),
        (5, "no column 'question'"), (6, "wrong type"), (7, "not JSON"), (8, "not a JSON object"),
    ]:  # fmt: skip
        assert any(f"{path}:{line}:" in shown and reason in shown for shown in report.splitlines()), (line, reason)


def test_bad_rows_can_be_refused(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", BAD_GSM8K)
    with pytest.raises(UserError, match=rf"7 of 9 rows cannot be scored; the first: {path}:2: "):
        get_task(f"gsm8k:{path}", bad_rows="refuse").held_out(False)


def test_a_split_without_a_good_row_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", BAD_GSM8K[1:3])
    with pytest.raises(UserError, match="no row can be scored"):
        get_task(f"gsm8k:{path}").held_out(False)
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="there are none"):
        get_task(f"gsm8k:{empty}").held_out(False)


def test_what_cannot_be_read_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no file of the split train"):
        get_task(f"gsm8k:{tmp_path}").train(False)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read"):
        get_task(f"gsm8k:{tmp_path}").train(False)
    with pytest.raises(UserError, match="no file or folder"):
        get_task(f"gsm8k:{tmp_path}/missing.jsonl").train(False)


def test_split_names_do_not_match_longer_words(tmp_path):
    write_jsonl(tmp_path / "training_notes.jsonl", [{"a": 1}])
    write_jsonl(tmp_path / "train-1.jsonl", [{"a": 2}])
    assert [row.columns for row in read_split(str(tmp_path), ("train",))] == [{"a": 2}]


def test_jsonl_holds_out_the_same_rows_always_and_no_prompt_twice(tmp_path):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i} for i in range(400)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = get_task(f"jsonl:{path}")
    train, held_out = task.train(False), task.held_out(False)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert len(train) + len(held_out) == 400 and 25 <= len(held_out) <= 80
    assert get_task(f"jsonl:{path}").held_out(False)["prompt"] == held_out["prompt"]
    assert task.train(True)["prompt"][0] == [{"role": "user", "content": train["prompt"][0]}]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gsm8k", lambda i: {"question": f"What is {i % 40}?", "answer": f"#### {i}"}),
        ("math", lambda i: {"problem": f"What is {i % 40}?", "answer": i}),
        ("mbpp", lambda i: {"text": f"Double {i % 40}.", "code": "pass", "test_list": ["assert double(2) == 4"]}),
    ],
)
def test_of_a_lone_file_no_problem_is_both_trained_on_and_held_out(tmp_path, monkeypatch, name, row):
    monkeypatch.setattr("mua_rl.envs.code_tasks._faults", lambda rows, isolation: [None] * len(rows))
    monkeypatch.setattr("mua_rl.envs.math_tasks.gold_faults", lambda golds: [None] * len(golds))
    task = get_task(f"{name}:{write_jsonl(tmp_path / 'train.jsonl', map(row, range(80)))}")
    train, held_out = task.train(False)["prompt"], task.held_out(False)["prompt"]
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 80 and held_out


def test_a_spec_that_a_run_keeps_finds_its_file_from_any_folder(tmp_path, monkeypatch):
    for name in ("rows.jsonl", "mine.py", "chain_sum"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    specs = [
        "jsonl:rows.jsonl",
        "gsm8k:.",
        "mine.py:NAME",
        "gsm8k:openai/gsm8k",
        "arithmetic",
        "reasoning-gym:chain_sum",
    ]
    kept = [parse_grpo(["--task", spec])[2].get("task", spec) for spec in specs]
    assert kept == [f"jsonl:{tmp_path}/rows.jsonl", f"gsm8k:{tmp_path}", f"{tmp_path}/mine.py:NAME", *specs[3:]]


def test_a_lone_file_named_after_the_held_out_split_is_held_out_whole(tmp_path):
    task = get_task(f"gsm8k:{write_jsonl(tmp_path / 'test.jsonl', GSM8K_ROWS * 9)}")
    assert len(task.held_out(False)) == 9 * len(GSM8K_ROWS)
    with pytest.raises(UserError, match="nothing to train on: give the folder"):
        task.train(False)


def test_jsonl_messages_need_a_chat_template(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": i} for i in range(40)]
    task = get_task(f"jsonl:{write_jsonl(tmp_path / 'rows.jsonl', rows)}")
    assert task.train(True)["prompt"][0][0]["role"] == "user"
    with pytest.raises(UserError, match="no chat template"):
        task.train(False)


def test_the_stricter_verifier_accepts_the_exact_form_only(tmp_path):
    task = get_task(f"gsm8k:{write_jsonl(tmp_path / 'test.jsonl', GSM8K_ROWS * 2)}")
    answers = task.held_out(False)["answer"]
    completions = ["#### 5", "so 1,300", "no", "\\boxed{1} \\boxed{1300}"]
    assert task.correct(completions=completions, answer=answers) == [1.0, 1.0, 0.0, 1.0]
    assert task.strict(completions=completions, answer=answers) == [1.0, 0.0, 0.0, 0.0]


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": f"half of an emoji: {HALF}", "answer": 1}, "half of a character"),
        ({"prompt": [{"role": "user", "content": HALF}], "answer": 1}, "half of a character"),
        ({"prompt": [{"role": "user", "content": 5}], "answer": 1}, "other than chat messages of text"),
        ({"prompt": f"half of an emoji: {HALF}", "tests": "assert f() == 1"}, "half of a character"),
    ],
)
def test_jsonl_rows_that_no_tokenizer_could_read_are_named_and_skipped(row, fault, tmp_path, caplog):
    good = {**row, "prompt": "?"}
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [good, row])
    assert len(get_task(f"jsonl:{tmp_path}").train(True)) == 1
    assert f"train.jsonl:2: column 'prompt' {'holds ' * ('half' in fault)}" in caplog.text and fault in caplog.text


def test_a_file_with_a_byte_order_mark_loses_no_row(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "1+1=", "answer": 2}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(get_task(f"jsonl:{tmp_path}").train(False)) == 1


def test_chat_messages_of_several_types_are_refused_in_one_line(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "?", "name": name}], "answer": 1} for name in ("a", 1)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match="values of several types"):
        get_task(f"jsonl:{tmp_path}").train(True)
