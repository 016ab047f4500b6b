"""The options of the command `hierarchical-sae`: every one is explained, and checked before anything is done."""

import pytest

from hf_hierarchical_sae import HierarchicalSaeConfig, cli
from hf_hierarchical_sae.cli import main
from hf_hierarchical_sae.cli_options import make_parser


TEXT_OPTIONS = {
    "--tokens": (["0", "-1", "1.5", "many", "inf"], "an integer of at least 1"),
    "--context_length": (["1", "0", "-3", "2.0"], "an integer of at least 2"),
    "--layer": (["x", "1.5", "nan"], "an integer"),
    "--max_norm_ratio": (["-1", "0", "nan", "inf", "x"], "a positive number"),
    "--batch_tokens": (["0", "-1", "1.5"], "an integer of at least 1"),
}
OPTIONS = {
    "harvest states --model m --layer 0": {
        **TEXT_OPTIONS,
        "--shard_tokens": (["0", "-1", "1e3"], "an integer of at least 1"),
        "--num_processes": (["0", "-1"], "an integer of at least 1"),
        "--process_index": (["-1", "0.5"], "an integer of at least 0"),
    },
    "train states sae": {
        "--layer": (["x", "1.5", "nan"], "an integer"),
        **dict.fromkeys(
            ("--d_sae", "--k", "--budgets", "--steps", "--batch_size", "--save_steps"),
            (["0", "-5", "1.5", "nan", ""], "an integer of at least 1"),
        ),
        **dict.fromkeys(
            ("--matryoshka_prefixes", "--aux_k", "--dead_after_tokens", "--encoder_chunk_size"),
            (["0", "-5", "1.5"], "an integer of at least 1"),
        ),
        **dict.fromkeys(
            ("--budget_weights", "--aux_loss_coefficient"), (["-1", "inf", "nan", "x"], "a number of at least 0")
        ),
        "--learning_rate": (["0", "-1e-3", "inf", "nan", "fast"], "a positive number"),
        "--seed": (["-1", "4294967296", "0.5"], "an integer of at least 0 and at most 4294967295"),
    },
    "evaluate sae": {**TEXT_OPTIONS, "--budgets": (["0", "-1", "2.5"], "an integer of at least 1")},
    "dashboard sae --model m": {
        **TEXT_OPTIONS,
        "--latents": (["-1", "0.5"], "an integer of at least 0"),
        "--max_megabytes": (["0", "-1", "nan", "inf"], "a positive number"),
    },
    "convert sae out": {"--k": (["0", "-1", "1.5"], "an integer of at least 1")},
}
NUMBERS = [
    (command, option, value, expected)
    for command, options in OPTIONS.items()
    for option, (values, expected) in options.items()
    for value in values
]


@pytest.mark.parametrize("command, option, value, expected", NUMBERS)
def test_every_number_is_checked(command, option, value, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), f"{option}={value}"])

    assert stopped.value.code == 2
    names = f"{option}/{option.replace('_', '-')}" if "_" in option else option
    assert f"argument {names}: expected {expected}, got {value!r}" in capsys.readouterr().err


def test_numbers_are_all_of_a_checked_type():
    parts = make_parser(None, cli.COMMANDS)._subparsers._group_actions[0].choices
    unchecked = [
        (name, action.dest) for name, part in parts.items() for action in part._actions if action.type in (int, float)
    ]

    assert not unchecked


@pytest.mark.parametrize("value", ["foo", "float64", "torch.float32", "int8"])
def test_a_dtype_is_one_of_those_that_language_models_are_run_in(value, capsys):
    with pytest.raises(SystemExit):
        main(["harvest", "states", "--model", "m", "--layer", "0", "--dtype", value])

    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["harvest", "train", "evaluate", "dashboard", "convert"])
def test_help_explains_every_option_and_shows_examples(part, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([part, "--help"])
    shown = " ".join(capsys.readouterr().out.split())

    assert stopped.value.code == 0
    assert shown.count(f"hierarchical-sae {part} ") >= 2
    parser = make_parser(None, cli.COMMANDS)._subparsers._group_actions[0].choices[part]
    assert all(action.help for action in parser._actions)


def test_training_has_an_option_for_all_that_the_config_says():
    known = {
        action.dest
        for action in make_parser(None, cli.COMMANDS)._subparsers._group_actions[0].choices["train"]._actions
    }
    harvested = {"d_in", "d_out", "model_name", "hook_point"}

    assert {name.removeprefix("no_") for name in known} >= set(HierarchicalSaeConfig.__annotations__) - harvested
