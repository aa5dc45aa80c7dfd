"""What a first hour must hold has a test, by name: a newcomer's tasks, habits of well-loved command lines, the list.

The mistakes and the silent failures are in tests/dptrainer/traps/test_trap_index.py, which is counted here. Rows that
need a word of their own are tested in test_cli_first_hour.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dpbudget_cli.main import app

TESTS = Path(__file__).resolve().parents[1]

WORDS, ASK, MEAN, LEDGER = (f"cli/test_cli_{name}::test_" for name in ("manners", "accounting", "explain", "ledger"))
VOICE, DOCTOR, INIT, TRAIN = (f"cli/test_cli_{name}::test_" for name in ("voice", "doctor", "init", "train"))
LIST, HERE = "cli/test_first_hour_list::test_", "cli/test_cli_first_hour::test_"
DOCS, FUZZ = "docs/test_docs::test_", "fuzz/test_fuzz_commands::test_"
NEXT, NAMED = "cli/test_cli_next_step::test_", "docs/test_commands_in_words::test_"
TRAPS = "dptrainer/traps/test_trap_index::test_"
STATION, REPORT, QUICK = "cli/test_cli_standing::test_", "cli/test_cli_report::test_", "docs/test_quickstart::test_"
LINES = f"{FUZZ}no_line_whatever_breaks_the_command_line"
BAD = f"{WORDS}a_bad_input_gets_one_line_a_fix_and_its_exit_code"
BLOCKS = f"{DOCS}the_blocks_of_a_page_run_as_written"

#: The newcomer's tasks: what ours must do, and where it is held.
TASKS: dict[str, tuple[str, ...]] = {
    "1 a plan without arithmetic and without delta, which is chosen and said": (
        f"{ASK}a_target_alone_is_answered_and_every_assumption_named",
        f"{HERE}the_noise_for_epsilon_three_is_that_of_the_survey",
    ),
    "1 loads no torch": (f"{HERE}questions_and_ledgers_load_no_torch",),
    "1 planner, trainer and verifier agree": (f"{HERE}planner_trainer_and_verifier_name_one_epsilon",),
    "1 planned rate and steps are those that run": (
        "dpbudget/test_plan::test_a_rate_is_one_float_for_planner_accountant_and_sampler",
        f"{TRAIN}it_takes_every_planned_step_and_writes_the_weights",
    ),
    "1 every call ends": (LINES,),
    "2 the quickstart": (
        f"{QUICK}it_is_short_and_names_no_setting_that_weakens_the_guarantee",
        f"{QUICK}it_runs_in_silence_and_learns",
        f"SLOW {QUICK}five_seeds_reach_093_in_the_mean",
    ),
    "2 epsilon before step one is zero, and is looked up": (
        "dpbudget/test_values::test_a_meter_shows_nothing_spent_before_the_first_step",
        "dpbudget/test_calibrate::test_it_always_has_the_first_and_the_last_step",
    ),
    "2 a ledger counts the runs on one dataset": (
        f"{STATION}plans_of_one_portfolio_promise_their_joint_claim",
        "cli/test_cli_budget::test_plans_and_runs_are_listed",
    ),
    "3 mistakes": (f"{TRAPS}every_row_is_met_by_tests_of_the_default_suite", f"{LIST}all_mistakes_are_in_the_index"),
    "4 one page for the data owner, recomputed from its JSON": (
        "FILE cli/test_cli_report",
        f"{LEDGER}every_flipped_byte_of_an_export_is_noticed",
    ),
    "5a schedules in any form": (f"{ASK}a_number_is_read_exactly", f"{MEAN}epochs_and_batches_are_a_schedule_too"),
    "5a any one of noise, length, batch and epsilon is solved for": (
        f"{MEAN}exactly_one_thing_is_unknown",
        f"{MEAN}noise_and_epochs_leave_the_batch_to_solve_for",
        f"{ASK}with_a_noise_multiplier_it_solves_for_the_steps",
    ),
    "5a a narrow bracket, whose upper end is the headline": (
        f"{HERE}the_bracket_at_epsilon_three_is_narrow_and_its_upper_end_stands_first",
    ),
    "5a bad values": (BAD, LINES),
    "5b guided": (
        f"{INIT}with_everything_given_nothing_is_asked",
        "cli/test_cli_init::test_a_wrong_answer_is_explained_and_asked_for_again",
        "COMMAND plan explore",
    ),
    "5c attack advantage as a target, beside epsilon": (
        f"{MEAN}an_advantage_is_a_target",
        f"{MEAN}the_numbers_are_those_of_the_curve",
        "dpbudget/test_targets::test_the_noise_for_an_advantage_agrees_with_riskcal",
    ),
    "5d no accountant that may understate": (f"{HERE}an_accountant_that_may_understate_cannot_be_chosen",),
    "5d a second accountant is one option": (f"{HERE}a_second_accountant_is_one_option_away_and_agrees",),
}

#: Habit -> its checks.
HABITS: dict[str, tuple[str, ...]] = {
    "1 useful in one line": (BLOCKS, f"{ASK}a_target_alone_is_answered_and_every_assumption_named"),
    "2 fast to start": (
        "house/test_layers::test_a_light_import_loads_no_heavy_library",
        f"{HERE}the_help_of_every_command_loads_no_accounting",
        f"{HERE}questions_and_ledgers_load_no_torch",
        f"{VOICE}completion_loads_nothing_that_takes_long",
    ),
    "3 stable codes and a fix": (
        BAD,
        LINES,
        f"{HERE}a_refusal_shows_the_value_that_it_refuses",
        f"{NEXT}the_fix_says_what_to_type",
        f"{NAMED}hints_name_commands_and_options_that_exist",
    ),
    "4 a code is explained offline": (
        f"{ASK}every_code_is_explained",
        "house/test_manners::test_every_code_in_the_sources_is_explained",
    ),
    "5 did you mean": (
        f"{WORDS}almost_every_typo_is_met_with_the_right_word",
        f"{VOICE}the_users_shell_is_taken_where_none_is_named",
        f"{NEXT}the_fix_says_what_to_type",
    ),
    "6 machine output": (
        f"{WORDS}every_help_page_has_examples_exit_codes_and_fits_a_screen",
        f"{WORDS}with_json_an_error_is_one_object_on_standard_output",
        "cli/test_cli_json_fields::test_every_field_of_every_answer_is_still_there",
        LINES,
    ),
    "7 the answer on one stream, talk on the other": (
        f"{HERE}one_answer_and_nothing_else_goes_down_a_pipe",
        f"{ASK}a_pipe_gets_json_on_one_stream_and_talk_on_the_other",
        f"{VOICE}talk_never_stands_on_standard_output",
        f"{VOICE}quiet_leaves_the_answer_and_the_warnings",
    ),
    "8 documented exit codes": (f"{HERE}the_exit_codes_of_help_page_and_errors_are_the_same", LINES),
    "9 knows its terminal": (
        f"{VOICE}a_terminal_gets_colour_unless_no_color_is_set",
        f"{VOICE}a_pipe_gets_no_escape_bytes",
        f"{ASK}a_prompt_never_waits_in_a_pipe",
        "cli/test_cli_init::test_a_real_terminal_is_asked_and_a_pipe_is_not",
    ),
    "10 shows progress, then gets out of the way": (
        f"{TRAIN}it_takes_every_planned_step_and_writes_the_weights",
        f"{TRAIN}without_public_data_nothing_is_told_about_the_data",
    ),
    "11 help with examples first": (
        f"{WORDS}every_example_of_every_help_page_runs",
        f"{VOICE}the_help_of_a_group_fits_a_screen_and_shows_examples_first",
        f"{VOICE}every_command_stands_under_one_heading",
    ),
    "12 safe defaults, danger is named": (
        f"{HERE}an_accountant_that_may_understate_cannot_be_chosen",
        f"{ASK}a_delta_that_publishes_records_is_warned_of",
        f"{STATION}no_plan_is_signed_for_an_assumed_dataset",
    ),
    "13 look, then apply": (
        "dptrainer/test_validate::test_every_problem_has_a_code_a_name_and_a_fix",
        f"{INIT}a_bad_answer_is_refused_before_anything_is_written",
        "cli/test_cli_budget::test_an_owner_elsewhere_signs_a_plan_and_new_totals",
    ),
    "14 verifiable artefacts": (
        "dpbudget/test_verify::test_verification_writes_nothing_and_needs_no_torch",
        f"{LEDGER}every_flipped_byte_of_an_export_is_noticed",
    ),
    "15 one file, a demo, completions, settings with their source": (
        "docs/test_examples::test_the_demo_shows_every_station_and_nothing_but_what_is_meant",
        f"{VOICE}bash_takes_the_script_and_completes_by_it",
        f"{ASK}settings_come_before_defaults_and_options_before_settings",
        "FILE cli/test_cli_report",
        "COMMAND config show",
    ),
}

#: The acceptance list.
ACCEPTED: dict[str, tuple[str, ...]] = {
    "ten silent failures": (f"{TRAPS}the_tables_are_whole", f"{LIST}all_mistakes_are_in_the_index"),
    "one test a mistake": (
        f"{TRAPS}every_row_is_met_by_tests_of_the_default_suite",
        BAD,
        BLOCKS,
        f"{NEXT}a_used_up_plan_leads_to_what_is_left_of_the_budget",
    ),
    "the plan of task 1": (
        f"{HERE}the_noise_for_epsilon_three_is_that_of_the_survey",
        f"{HERE}planner_trainer_and_verifier_name_one_epsilon",
    ),
    "the quickstart on digits": (
        f"{QUICK}it_runs_in_silence_and_learns",
        f"SLOW {QUICK}five_seeds_reach_093_in_the_mean",
    ),
    "the budget stops": (
        "dptrainer/loop/test_make_private::test_past_the_plan_is_an_error_and_nothing_moves",
        "dptrainer/loop/test_checkpoint::test_resuming_continues_where_the_ledger_stands_not_where_the_file_does",
        "FILE dptrainer/loop/test_kill",
        "attacks/test_attacks_on_processes::test_attack_15_an_old_ledger_restored_from_a_backup_is_refused",
    ),
    "the report": ("FILE cli/test_cli_report",),
    "shuffled data": (
        "attacks/test_attacks_on_training::test_attack_23_a_shuffled_loader_is_not_taken_for_poisson_sampling",
    ),
    "ten thousand command lines": (LINES, f"{FUZZ}the_lines_reach_every_command_and_all_ways_to_end"),
}
TABLES = {"tasks": TASKS, "habits": HABITS, "accepted": ACCEPTED}
ROWS = [(table, row) for table, rows in TABLES.items() for row in rows]


@cache
def functions_in(file: str) -> dict[str, ast.FunctionDef]:
    """The tests of a file, in classes too."""
    tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in found if node.name.startswith("test")}


def has_command(words: str) -> bool:
    import click

    group: click.Command | None = app
    for word in words.split():
        group = group.get_command(click.Context(group), word) if isinstance(group, click.Group) else None
    return group is not None


def _has(path: Path, pattern: re.Pattern[str]) -> bool:
    return pattern.search(path.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_every_row_is_held_by_tests(table: str, row: str) -> None:
    assert TABLES[table][row]
    for held in TABLES[table][row]:
        kind, _, name = held.rpartition(" ")
        if held.startswith("COMMAND "):  # as soon as it exists, some file of tests types it
            words = held.removeprefix("COMMAND ")
            typed = re.compile(r'["\s,]+'.join(words.split()))
            named = [path for path in TESTS.glob("cli/test_*.py") if path != Path(__file__) and _has(path, typed)]
            assert named or not has_command(words), f"dpbudget {words} is typed in no file of tests"
            continue
        file, _, test = name.partition("::")
        if kind == "FILE":
            assert functions_in(file), file
            continue
        node = functions_in(file)[test]
        marks = " ".join(
            ast.unparse(decorator) for decorator in node.decorator_list if "parametrize" not in ast.unparse(decorator)
        )
        assert not re.search("skip|xfail|mark.gpu", marks), held
        assert ("mark.slow" in marks) == (kind == "SLOW"), held


def test_the_lists_are_whole() -> None:
    assert sorted({int(row.split()[0]) for row in HABITS}) == list(range(1, 16))
    assert {row.split()[0] for row in TASKS} == {"1", "2", "3", "4", "5a", "5b", "5c", "5d"}
    assert len(ACCEPTED) == 8


def test_all_mistakes_are_in_the_index() -> None:
    tree = ast.parse((TESTS / "dptrainer" / "traps" / "test_trap_index.py").read_text(encoding="utf-8"))
    tables = {
        node.target.id: len(node.value.keys)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict)
    }
    assert tables["SILENT"] == 10
    assert tables["MISTAKES"] == 47
