"""Every trap that a trainer can fall into, every silent failure and every beginner's mistake has a test, by name.

Three tables: ten situations in which another library went on without a word while the guarantee did not hold; the
mistakes that a newcomer made in a first hour, with the code that answers each; and the traps found in released
libraries, in which one example moved the update by more than the clipping norm or a release was not counted.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from dpbudget.errors import CODES

TESTS = Path(__file__).resolve().parents[2]

LOOP, CLIP, TRAPS_HERE = "dptrainer/loop/test_", "dptrainer/clipping/test_", "dptrainer/traps/test_"
MAKE, REFUSE, TRAIN = f"{LOOP}make_private", f"{LOOP}make_private_refusals", f"{LOOP}private_trainer"
HOUR, TABLE, NEAR = f"{TRAPS_HERE}first_hour", f"{TRAPS_HERE}table_of_traps", f"{TRAPS_HERE}neighbours"
VALID, FIX = "dptrainer/test_validate", "dptrainer/test_fix"
PLANNER, WORDS = "dpbudget/test_calibrate", "cli/test_cli_manners"
BAD_INPUT = f"{WORDS}::test_a_bad_input_gets_one_line_a_fix_and_its_exit_code"
REFUSED = f"{REFUSE}::test_what_cannot_be_made_private_is_refused_untouched"
EVERY_PROBLEM = f"{VALID}::test_every_problem_has_a_code_a_name_and_a_fix"
BROKEN_RECORD = f"{MAKE}::test_a_broken_record_contributes_nothing"
EXACTLY_C = f"{CLIP}clipping_traps::test_one_example_moves_the_update_by_at_most_c_exactly"

#: What was silent, and where it is met here.
SILENT: dict[str, tuple[str, ...]] = {
    "1 a loss of one's own in ghost mode": (f"{HOUR}::test_a_loss_of_ones_own_is_clipped_like_any_other",),
    "2 the original optimizer is stepped": (
        f"{REFUSE}::test_another_optimizer_over_the_same_parameters_is_refused",
        f"{REFUSE}::test_another_optimizer_finds_no_gradient_even_without_hooks",
    ),
    "3 resume with torch.save and load": (
        f"{HOUR}::test_weights_that_torch_saved_and_loaded_do_not_reset_what_was_spent",
    ),
    "4 roll back to an older checkpoint": (
        f"{LOOP}checkpoint::test_resuming_continues_where_the_ledger_stands_not_where_the_file_does",
        f"{LOOP}checkpoint::test_weights_with_more_steps_than_the_ledger_are_refused",
    ),
    "5 frozen batch norm, running buffers": (
        REFUSED,
        f"{CLIP}clip_factors::test_batch_norm_is_refused_at_every_forward_in_train_mode_and_allowed_frozen",
    ),
    "6 model or loss mixes examples": (
        f"{LOOP}hostile_mixing::test_a_model_that_lets_examples_meet_is_refused_at_set_up",
        f"{LOOP}hostile_mixing::test_a_vector_of_losses_that_mixes_examples_is_refused",
        f"{LOOP}hostile_losses::test_a_criterion_that_is_shown_and_mixes_examples_is_refused",
    ),
    "7 the old loader, or no Poisson sampling": (f"{REFUSE}::test_the_old_loader_is_refused", REFUSED),
    "8 training past the plan": (
        f"{MAKE}::test_past_the_plan_is_an_error_and_nothing_moves",
        f"{TRAIN}::test_past_the_plan_nothing_moves",
    ),
    "9 misspelt option": (f"{REFUSE}::test_misspelt_options_are_errors",),
    "10 NaN in one record": (
        BROKEN_RECORD,
        f"{NEAR}::test_a_record_that_is_not_finite_counts_as_one_that_is_not_there",
    ),
}

#: Mistake -> (code that answers it, or "" where it simply works; its tests).
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "batch norm": (
        "DP010",
        (EVERY_PROBLEM, f"{FIX}::test_a_repaired_model_has_no_problem_and_keeps_examples_apart"),
    ),
    "optimizer from before the repair, or of another model": (
        "DP011",
        (
            f"{VALID}::test_the_optimizer_must_hold_exactly_the_trainable_parameters",
            f"{HOUR}::test_a_repaired_model_trains_with_the_optimizer_that_was_built_before",
        ),
    ),
    "optimizer with a part of the parameters": (
        "DP012",
        (f"{VALID}::test_the_optimizer_must_hold_exactly_the_trainable_parameters",),
    ),
    "frozen batch norm, running buffers": (
        "DP013",
        (REFUSED, f"{LOOP}hostile_mixing::test_a_model_that_lets_examples_meet_is_refused_at_set_up"),
    ),
    "no delta": (
        "",
        (
            f"{PLANNER}::test_the_default_delta_is_below_one_over_n",
            "cli/test_cli_accounting::test_a_target_alone_is_answered_and_every_assumption_named",
        ),
    ),
    "delta out of range, or above one over n": (
        "DP002",
        (
            BAD_INPUT,
            f"{PLANNER}::test_every_parameter_is_checked_with_its_own_code",
            f"{PLANNER}::test_a_delta_that_publishes_whole_records_is_warned_of",
        ),
    ),
    "epsilon 0, negative, NaN or text": (
        "DP001",
        (BAD_INPUT, f"{PLANNER}::test_every_parameter_is_checked_with_its_own_code"),
    ),
    "epsilon far too small": (
        "DP004",
        (
            f"{PLANNER}::test_an_unreachable_epsilon_names_the_smallest_reachable_one",
            "cli/test_cli_accounting::test_an_unreachable_target_is_not_computable",
        ),
    ),
    "negative noise": ("DP005", (BAD_INPUT, f"{PLANNER}::test_a_bad_phase_is_refused_by_name")),
    "no noise": ("DP006", (BAD_INPUT, f"{PLANNER}::test_a_bad_phase_is_refused_by_name")),
    "noise or clipping norm of the wrong type": (
        "DP007",
        (
            f"{PLANNER}::test_every_parameter_is_checked_with_its_own_code",
            f"{CLIP}clip_factors::test_a_clip_norm_out_of_range_is_refused_at_construction",
        ),
    ),
    "clipping norm 0 or negative": (
        "DP007",
        (BAD_INPUT, f"{CLIP}clip_factors::test_a_clip_norm_out_of_range_is_refused_at_construction"),
    ),
    "a batch given as the rate": (
        "DP008",
        ("dpbudget/test_plan::test_a_batch_size_given_as_a_rate_is_recognised", BAD_INPUT),
    ),
    "no Poisson sampling": ("DP020", (REFUSED, f"{TRAIN}::test_what_cannot_be_trained_is_refused_at_set_up")),
    "the old loader": ("DP021", (f"{REFUSE}::test_the_old_loader_is_refused",)),
    "a weighted sampler": ("DP022", (REFUSED,)),
    "a loss that is summed": ("DP030", (f"{HOUR}::test_a_loss_that_is_summed_is_declared_or_refused",)),
    "gradients past the private loss": (
        "DP031",
        (
            f"{HOUR}::test_a_loss_of_ones_own_is_clipped_like_any_other",
            f"{REFUSE}::test_a_penalty_on_parameters_in_the_loss_is_refused",
            f"{LOOP}hostile_loops::test_a_head_with_an_optimizer_of_its_own_is_refused_and_neither_moves",
        ),
    ),
    "NaN in the data": ("", (BROKEN_RECORD, f"{NEAR}::test_neighbours_of_equal_size_cause_the_same_events")),
    "more epochs than planned": ("DP050", (f"{MAKE}::test_past_the_plan_is_an_error_and_nothing_moves",)),
    "resume from a plain file": (
        "DP050",
        (f"{HOUR}::test_weights_that_torch_saved_and_loaded_do_not_reset_what_was_spent",),
    ),
    "resume from its own checkpoint": (
        "DP051",
        (
            f"{LOOP}checkpoint::test_weights_of_another_run_are_refused",
            f"{LOOP}checkpoint::test_resuming_continues_where_the_ledger_stands_not_where_the_file_does",
        ),
    ),
    "roll back": ("DP051", (f"{LOOP}checkpoint::test_weights_with_more_steps_than_the_ledger_are_refused",)),
    "resume with another accountant": (
        "",
        ("dpbudget/test_verify::test_a_sampled_plan_is_confirmed_by_both_accountants",),
    ),
    "eval mode": (
        "DP014",
        (
            EVERY_PROBLEM,
            f"{REFUSE}::test_backward_in_eval_mode_is_refused",
            f"{TRAIN}::test_eval_mode_is_refused_before_and_during_training",
        ),
    ),
    "validation in train mode": ("", (f"{MAKE}::test_a_validation_pass_in_train_mode_has_no_effect",)),
    "an unused parameter": (
        "DP015",
        (
            f"{HOUR}::test_a_parameter_without_a_gradient_is_noted_once_at_set_up_and_trains_on_noise",
            f"{MAKE}::test_a_parameter_without_gradient_receives_noise",
        ),
    ),
    "accumulation, no zero_grad, two backward passes": (
        "DP031",
        (
            f"{HOUR}::test_splitting_a_batch_by_hand_accumulating_and_stepping_twice_are_told_apart",
            f"{MAKE}::test_a_loop_without_zero_grad_does_not_add_up_gradients",
            f"{REFUSE}::test_two_backward_passes_before_a_step_are_refused",
        ),
    ),
    "accumulation of fixed pieces": (
        "",
        (f"{HOUR}::test_physical_batches_do_what_accumulation_by_hand_was_meant_to_do",),
    ),
    "pieces made by hand with a step each": (
        "DP030",
        (
            f"{HOUR}::test_splitting_a_batch_by_hand_accumulating_and_stepping_twice_are_told_apart",
            f"{REFUSE}::test_a_foreign_batch_in_place_of_the_drawn_one_is_refused",
        ),
    ),
    "frozen layers": (
        "",
        (
            f"{HOUR}::test_what_people_bring_trains_as_it_is",
            f"{VALID}::test_the_optimizer_must_hold_exactly_the_trainable_parameters",
        ),
    ),
    "mappings in and out, empty batches": (
        "",
        (
            f"{CLIP}clipping_steps::test_dictionaries_in_and_out",
            f"{TRAIN}::test_mappings_with_labels_give_the_same_sum_as_pairs",
            f"{MAKE}::test_collated_batches_and_empty_ones_pass_through_user_code",
        ),
    ),
    "drop_last, and the expected batch": (
        "",
        (
            f"{PLANNER}::test_rate_and_steps_come_from_sizes_exactly",
            f"{MAKE}::test_the_divisor_is_the_public_one_whatever_the_dataset_holds",
        ),
    ),
    "a stream of records": ("DP024", (REFUSED,)),
    "several workers": (
        "DP076",
        ("attacks/test_attacks_through_a_trainer::test_attack_13_a_worker_of_a_data_loader_gets_no_receipt",),
    ),
    "one person in many rows": ("", ("PENDING dptrainer/loop/test_units_of_many_rows",)),
    "in-place activation": (
        "",
        (f"{HOUR}::test_in_place_activations_lose_no_gradient", f"{FIX}::test_in_place_activations_need_no_repair"),
    ),
    "LSTM": (
        "",
        (f"{HOUR}::test_what_people_bring_trains_as_it_is", f"{CLIP}replayed_modules::test_modules_without_a_rule"),
    ),
    "LBFGS": ("DP017", (f"{VALID}::test_lbfgs_is_refused", REFUSED)),
    "the original optimizer stepped": (
        "DP032",
        (f"{REFUSE}::test_another_optimizer_over_the_same_parameters_is_refused",),
    ),
    "the old objects kept": (
        "",
        (
            f"{MAKE}::test_the_same_objects_come_back_and_names_do_not_change",
            f"{REFUSE}::test_a_second_make_private_replaces_the_first",
        ),
    ),
    "examples meet in a layer or loss": (
        "DP033",
        (
            f"{VALID}::test_a_layer_that_mixes_examples_is_found_and_named",
            f"{LOOP}hostile_losses::test_a_criterion_that_is_shown_and_mixes_examples_is_refused",
        ),
    ),
    "a misspelt option": (
        "DP060",
        (
            f"{REFUSE}::test_misspelt_options_are_errors",
            f"{WORDS}::test_almost_every_typo_is_met_with_the_right_word",
        ),
    ),
    "a misspelt accountant": ("DP061", (BAD_INPUT, f"{PLANNER}::test_every_parameter_is_checked_with_its_own_code")),
    "epsilon before training": (
        "",
        (
            f"{REFUSE}::test_live_epsilon_comes_from_the_meter_of_the_run",
            "dpbudget/test_values::test_a_meter_shows_nothing_spent_before_the_first_step",
        ),
    ),
    "a state dict for the plain model": ("", (f"{MAKE}::test_the_same_objects_come_back_and_names_do_not_change",)),
    "schedules, leftover clipping, copies, dropout, ties, bare parameters, compiled": (
        "DP019",
        (
            f"{MAKE}::test_learning_rate_schedules_work",
            f"{HOUR}::test_clipping_that_was_left_in_the_loop_is_harmless",
            f"{HOUR}::test_a_deep_copy_of_a_private_model_is_a_plain_model",
            f"{REFUSE}::test_copies_and_pickles_of_the_model_are_plain",
            f"{HOUR}::test_what_people_bring_trains_as_it_is",
            f"{LOOP}hostile_loops::test_a_part_that_was_compiled_is_refused",
            f"{LOOP}compiled_models::test_the_releases_are_those_of_the_model_itself_and_nothing_is_compiled_after_set_up",
        ),
    ),
}

#: Traps of released libraries.
TRAPS: dict[str, tuple[str, ...]] = {
    "one index fifty times in a bag": (EXACTLY_C, f"{CLIP}rules_match_oracle::test_embedding_bag"),
    "a weight used outside its module": (
        f"{CLIP}clipping_traps::test_a_weight_used_outside_its_layer_is_named",
        f"{CLIP}clipping_traps::test_every_way_to_use_a_weight_directly_is_seen",
    ),
    "tied modules, a module called twice": (
        f"{CLIP}clipping_traps::test_tied_weights_add_up_with_their_cross_terms",
        f"{CLIP}clipping_traps::test_a_module_called_twice_adds_up_with_its_cross_terms",
    ),
    "padding modes of a convolution": (EXACTLY_C, f"{CLIP}rules_match_oracle::test_convolution"),
    "padding_idx": (f"{CLIP}rules_match_oracle::test_embedding_with_repeated_indices",),
    "NaN or infinity in one example": (
        f"{CLIP}clipping_traps::test_an_example_without_a_finite_norm_contributes_exactly_nothing",
        f"{NEAR}::test_a_record_that_is_not_finite_counts_as_one_that_is_not_there",
    ),
    "an empty batch": (
        f"{TRAIN}::test_an_empty_batch_is_a_noise_only_charged_step",
        f"{MAKE}::test_an_empty_draw_takes_a_real_noisy_charged_step",
    ),
    "int(1/q) steps": (
        f"{PLANNER}::test_rate_and_steps_come_from_sizes_exactly",
        "dpbudget/test_plan::test_a_rate_is_one_float_for_planner_accountant_and_sampler",
    ),
    "a batch left midway": (
        f"{MAKE}::test_leaving_a_batch_midway_drops_the_partial_sum",
        f"{REFUSE}::test_two_iterations_at_once_never_add_their_partial_sums",
    ),
    "two backward passes before a step": (
        f"{REFUSE}::test_two_backward_passes_before_a_step_are_refused",
        f"{CLIP}clipping_steps::test_two_backward_passes_in_one_step_are_refused",
    ),
    "noise per physical batch or per rank": (
        f"{TABLE}::test_noise_is_added_once_a_release_however_many_physical_batches",
        f"{VALID}::test_distributed_wrappers_are_refused_with_a_word_on_noise",
    ),
    "a parameter without a gradient in the first step": (
        f"{TABLE}::test_a_parameter_that_is_used_late_is_trained_from_then_on",
        f"{CLIP}clipping_traps::test_a_parameter_without_a_gradient_gets_a_zero_and_stays",
    ),
    "a guessed loss reduction": (
        f"{HOUR}::test_a_loss_that_is_summed_is_declared_or_refused",
        f"{TRAIN}::test_every_spelling_of_a_criterion_gives_the_same_per_example_loss",
    ),
    "tokens as rows": (f"{CLIP}clipping_traps::test_tokens_as_rows_are_refused",),
    "broadcast position ids": (f"{CLIP}clipping_traps::test_broadcast_position_ids_are_summed_per_example",),
    "freezing after set-up": (
        f"{CLIP}clipping_traps::test_freezing_and_unfreezing_after_set_up_is_seen_at_the_next_step",
    ),
    "dropout of two passes": (f"{CLIP}clipping_steps::test_dropout_is_drawn_once",),
    "batch norm, buffers updated across examples": (
        EVERY_PROBLEM,
        f"{CLIP}clip_factors::test_a_buffer_updated_in_forward_is_refused",
    ),
    "a gradient scaler": (
        f"{CLIP}clipping_steps::test_mean_and_sum_and_vector_and_scaled_losses_agree",
        f"{CLIP}clipping_steps::test_autocast_sums_in_float32_and_keeps_the_bound",
        f"{HOUR}::test_a_gradient_scaler_is_refused_before_anything_moves",
    ),
    "rounding of factors and of the noise scale": (
        f"{CLIP}clip_factors::test_a_factor_never_lets_a_norm_exceed_the_clip_even_in_float32",
        EXACTLY_C,
        "dptrainer/noise/test_source::test_the_noise_scale_is_never_below_the_exact_product",
    ),
    "adaptive clipping by the private batch size": ("PENDING dptrainer/loop/test_quantile_clipping",),
    "a checkpoint without its place, or a pickle": (
        f"{LOOP}checkpoint::test_a_pickle_in_place_of_the_optimizer_runs_no_code",
        f"{LOOP}checkpoint::test_weights_of_another_run_are_refused",
    ),
    "norms that cancel": (f"{CLIP}clipping_traps::test_cancelling_positions_do_not_lift_an_example_above_c",),
    "a strategy that was chosen for another length": (f"{TABLE}::test_every_length_and_size_is_decided_for_itself",),
    "control flow by a private quantity": (
        f"{TRAIN}::test_callbacks_see_steps_and_epsilon_alone_and_may_stop",
        "cli/test_cli_train::test_without_public_data_nothing_is_told_about_the_data",
        f"{NEAR}::test_neighbours_of_equal_size_cause_the_same_events",
    ),
    "losses, norms and counts in logs": (
        f"{REFUSE}::test_nothing_is_printed_or_logged",
        f"{TRAIN}::test_nothing_private_is_printed_logged_or_returned",
        f"{LOOP}hostile_loops::test_no_message_names_the_size_of_a_drawn_batch",
    ),
    "an optimizer with a closure": (f"{REFUSE}::test_a_closure_is_refused", f"{VALID}::test_lbfgs_is_refused"),
    "another try with a smaller batch": (f"{HOUR}::test_out_of_memory_is_never_tried_again_with_a_smaller_batch",),
    "a search for settings": (
        f"{LOOP}adaptive_budget::test_the_second_run_stops_where_the_budget_ends_with_its_weights_whole",
    ),
    "gradient checkpointing": (f"{CLIP}clipping_steps::test_gradient_checkpointing",),
    "losses across examples": (
        f"{LOOP}hostile_losses::test_a_criterion_that_is_shown_and_mixes_examples_is_refused",
        f"{LOOP}hostile_mixing::test_a_vector_of_losses_that_mixes_examples_is_refused",
        f"{HOUR}::test_experts_with_a_capacity_let_examples_meet_and_are_refused",
    ),
    "frozen batch norm in train mode": (
        f"{CLIP}clip_factors::test_batch_norm_is_refused_at_every_forward_in_train_mode_and_allowed_frozen",
        f"{VALID}::test_a_batch_norm_that_is_frozen_and_in_eval_mode_is_allowed",
    ),
    "sparse embeddings": (EVERY_PROBLEM, f"{TABLE}::test_rows_of_a_table_that_no_record_uses_get_noise_too"),
    "several views of a record": ("PENDING dptrainer/clipping/test_grouped_rows",),
    "several records of a person": ("PENDING dptrainer/loop/test_units_of_many_rows",),
    "old optimizer, old loader, own loss, misspelt option": (
        f"{REFUSE}::test_another_optimizer_over_the_same_parameters_is_refused",
        f"{REFUSE}::test_the_old_loader_is_refused",
        f"{REFUSE}::test_misspelt_options_are_errors",
    ),
    "a regulariser in the loss, and post-processing": (
        f"{REFUSE}::test_a_penalty_on_parameters_in_the_loss_is_refused",
        f"{HOUR}::test_after_the_noise_anything_is_free",
    ),
    "a weighted sampler": (REFUSED,),
    "one record more or less": (
        f"{NEAR}::test_one_record_moves_the_clipped_sum_by_at_most_c",
        f"{NEAR}::test_under_the_same_noise_one_record_moves_the_update_by_at_most_c_over_the_public_divisor",
    ),
}

ALL = {
    **{f"silent: {row}": tests for row, tests in SILENT.items()},
    **{f"mistake: {row}": tests for row, (_, tests) in MISTAKES.items()},
    **{f"trap: {row}": tests for row, tests in TRAPS.items()},
}


@cache
def functions_in(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in found if node.name.startswith("test")}


def test_the_tables_are_whole() -> None:
    assert (len(SILENT), len(MISTAKES), len(TRAPS)) == (10, 47, 39)
    assert [row.split()[0] for row in SILENT] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("row", ALL)
def test_every_row_is_met_by_tests_of_the_default_suite(row: str) -> None:
    assert ALL[row]
    for name in ALL[row]:
        if name.startswith("PENDING "):
            continue
        file, _, test = name.partition("::")
        assert test in functions_in(file), name
        node = functions_in(file)[test]
        marks = [ast.unparse(decorator) for decorator in node.decorator_list]
        assert not any(word in mark for mark in marks for word in ("skip", "xfail", "mark.slow", "mark.gpu")), name
        calls = {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
        asserts = any(isinstance(inner, ast.Assert | ast.With) for inner in ast.walk(node))
        assert asserts or any(call.rpartition(".")[2].startswith(("assert_", "refused")) for call in calls), (
            f"{name} asserts nothing"
        )


@pytest.mark.parametrize(
    "file", sorted({name[8:] for tests in ALL.values() for name in tests if name[:8] == "PENDING "})
)
def test_what_the_trainer_does_not_offer_yet_is_tested_as_soon_as_it_does(file: str) -> None:
    """Adaptive clipping, several views of a record and several records of a person: no option, or a file of tests."""
    import inspect

    from dptrainer import PrivateTrainer, make_private

    options = {*inspect.signature(make_private).parameters, *inspect.signature(PrivateTrainer.__init__).parameters}
    offered = options & {"clipping", "policy", "quantile", "views", "users", "unit", "grouping", "max_per_user"}
    assert not offered or functions_in(file)


def test_every_refusal_of_the_trainer_has_a_code_and_a_way_out() -> None:
    lacking = []
    for path in sorted((TESTS.parent / "dptrainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "PrivacyViolation":
                named = {keyword.arg for keyword in node.keywords}
                if not {"code", "hint"} <= named:
                    lacking.append(f"{path.name}:{node.lineno}")
    assert lacking == []


def test_every_code_that_answers_a_mistake_is_explained_and_stands_in_a_test() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    for code in {code for code, _ in MISTAKES.values() if code}:
        assert code in CODES
        assert code in text, code
