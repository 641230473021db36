"""Which record a learning rate comes from."""

from dataclasses import replace

import pytest
import yaml
from helpers import make_record

from mua_rl.adapter.adapters import LoRA
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import parse as parse_grpo
from mua_rl.lm.models import load_model
from mua_rl.lr.rank import parse_rank
from mua_rl.run.arguments import AdapterArguments, parse_arguments
from mua_rl.run.folder import RunFolder
from mua_rl.run.learning_rate import Base, find_record, resolve_learning_rate


@pytest.fixture(scope="module")
def embedded():
    """The fingerprint of the embedded model, and its rank-32 configuration."""
    model = load_model("embedded")
    return fingerprint(model), LoRA(32).configuration(model)


def after(record):
    """The base that a run with this record leaves behind."""
    return Base("embedded after RUN", "f" * 16, record)


def test_a_run_that_starts_from_another_of_its_algorithm_has_its_record():
    record = make_record(algorithm="grpo")
    assert find_record(AdapterArguments(start_from="RUN"), after(record), "grpo") == (record, "the record of RUN")


def test_after_supervised_finetuning_grpo_has_the_shipped_record_of_the_model_that_was_finetuned(embedded):
    fingerprint_, configuration = embedded
    base = after(make_record(algorithm="sft", base_fingerprint=fingerprint_, learning_rate=2**-5))
    rate = resolve_learning_rate(AdapterArguments(start_from="RUN"), configuration, base, "grpo")
    record, _ = find_record(AdapterArguments(), Base("embedded", fingerprint_), "grpo")
    assert rate.value == record.learning_rate
    assert rate.reason.startswith("the shipped record arithmetic-1m (that of RUN is of sft) has")


def test_after_supervised_finetuning_of_an_unknown_model_the_rate_is_called_a_guess(embedded):
    base = after(make_record(algorithm="sft"))
    rate = resolve_learning_rate(AdapterArguments(start_from="RUN"), embedded[1], base, "grpo")
    assert rate.reason.startswith("a guess, since no record fits")


def test_a_record_of_supervised_finetuning_is_refused_where_it_is_asked_for(tmp_path):
    record = make_record(algorithm="sft", base_fingerprint="f" * 16)
    record.save(tmp_path)
    with pytest.raises(UserError, match="record of a sft run, not of grpo"):
        find_record(AdapterArguments(lr_from=str(tmp_path)), after(record), "grpo")


def test_a_run_that_is_resumed_keeps_its_rate_though_the_record_is_gone_or_another(tmp_path, embedded):
    record, (fingerprint_, configuration) = make_record(algorithm="grpo", base_fingerprint="f" * 16), embedded
    base = Base("embedded after RUN", fingerprint_, record)
    rate = resolve_learning_rate(AdapterArguments(start_from="RUN"), configuration, base, "grpo")
    run = RunFolder.create(str(tmp_path / "run"), "")
    run.start({}, rate.as_dict())
    changed = Base(base.name, fingerprint_, replace(record, learning_rate=record.learning_rate / 8))
    for resumed in (
        AdapterArguments(start_from="RUN", resume=str(run.path)),
        AdapterArguments(lr_from=str(tmp_path / "gone"), resume=str(run.path)),
    ):
        again = resolve_learning_rate(resumed, configuration, changed, "grpo")
        assert (again.value, again.reason, again.warning) == (rate.value, rate.reason, rate.warning)


@pytest.mark.parametrize("flags", [[], ["--lr", "0.001"]])
def test_a_rank_exponent_that_is_none_is_refused_also_where_no_rate_depends_on_it(flags):
    with pytest.raises(UserError, match=r"takes a number from 0 .* to 1, not 2"):
        parse_arguments([AdapterArguments], [*flags, "--rank_exponent", "2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank: 0", ("full", "mlp")),
        ("rank: 16\ntarget_modules: all-linear", ("16", "all-linear")),
        ("target_modules: [up_proj]", ("32", ["up_proj"])),
        ("target-modules: [up_proj, down_proj]", ("32", ["up_proj", "down_proj"])),
    ],
)
def test_a_yaml_value_means_what_it_means_as_a_flag(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    (arguments,), _ = parse_arguments([AdapterArguments], ["--config", str(tmp_path / "c.yaml")])
    rank, targets = expected
    adapter = arguments.adapter("mlp")
    assert (adapter.rank, adapter.target_modules) == (parse_rank(rank), targets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3", "unknown keys: rnak"),
        ("init: C", "--init: invalid choice: 'C'"),
        ("lr: fast", "in the --config file: argument --lr.*: invalid float value: 'fast'"),
        ("start_from: [one, two]", "in the --config file: unrecognized arguments: two"),
        ("config: another.yaml", "unknown keys: config"),
        ("- rank", "YAML mapping"),
        ("", "YAML mapping"),
    ],
)
def test_a_yaml_file_that_says_nothing_usable_is_refused(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_arguments([AdapterArguments], ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("config", [False, True])
def test_what_is_given_counts_as_given_also_where_it_is_the_default(config, tmp_path):
    (tmp_path / "c.yaml").write_text("init: B\nlr: null\n")
    argv = ["--config", str(tmp_path / "c.yaml")] if config else ["--init", "B"]
    assert parse_arguments([AdapterArguments], argv)[1] == {"init": "B"}
    assert parse_arguments([AdapterArguments], [])[1] == {}


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--num_train_epochs", "3"], -1),  # HF's default
        (["--num_train_epochs", "2"], -1),
        (["--num_train_epochs", "2", "--max_steps", "300"], 300),  # ours
        ([], 300),
    ],
)
def test_epochs_that_are_given_are_trained_for_unless_steps_are(flags, steps, tmp_path):
    arguments, _, given = parse_grpo(flags)
    assert arguments.max_steps == steps
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    assert parse_grpo(["--config", str(tmp_path / "config.yaml")])[0].max_steps == steps


@pytest.mark.parametrize(
    ("flags", "every"),
    [
        ([], 50),
        (["--num_iterations", "3"], 51),
        (["--num_iterations", "3", "--save_steps", "6"], 6),
        (["--steps_per_generation", "8", "--save_steps", "5"], 6),
        (["--steps_per_generation", "6", "--save_steps", "4"], 6),
        (["--steps_per_generation", "2"], 50),
        (["--save_steps", "0.5", "--num_iterations", "3"], 150),
        (["--save_steps", "0.25", "--max_steps", "10", "--num_iterations", "3"], 3),
        (["--save_steps", "0.25", "--max_steps", "10"], 3),
        (["--save_steps", "0.25", "--num_train_epochs", "2", "--num_iterations", "3"], 0.25),
    ],
)
def test_a_checkpoint_is_written_where_a_batch_of_completions_has_been_used_up(flags, every):
    """Steps of four passes: TRL draws a new batch when it resumes."""
    batch = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"]
    assert parse_grpo([*batch, *flags])[0].save_steps == every


@pytest.mark.parametrize(
    ("flags", "integrations"),
    [
        ([], ["tensorboard"]),
        (["--report_to", "none"], []),
        (["--report_to", "tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)
def test_a_run_reports_to_tensorboard_unless_it_is_told_otherwise(flags, integrations):
    assert parse_grpo(flags)[0].report_to == integrations


def test_a_yaml_file_names_one_integration_or_several(tmp_path):
    for text, integrations in (("none", []), ("wandb", ["wandb"]), ("[tensorboard, wandb]", ["tensorboard", "wandb"])):
        (tmp_path / "c.yaml").write_text(f"report_to: {text}\n")
        assert parse_grpo(["--config", str(tmp_path / "c.yaml")])[0].report_to == integrations
