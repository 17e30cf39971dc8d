"""Writes docs/robustness.md: what was tried of every kind of odd input and fault, and what became of it.

    pytest -m "not stress" -o junit_family=xunit1 --junitxml=fast.xml
    pytest -m stress tests/stress -o junit_family=xunit1 --junitxml=stress.xml
    python docs/robustness.py fast.xml stress.xml

Results of tests are kept in docs/robustness.json: those of the given files replace earlier ones of the same tests.
"""

import json
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE, STORED = ROOT / "docs" / "robustness.md", ROOT / "docs" / "robustness.json"

HEAD = """# Odd inputs and faults

<!-- Written by `python docs/robustness.py`, from the results in docs/robustness.json. -->

People's folders hold broken pictures, weights come in many forms, disks fill up, and machines are stopped. This page
counts what was tried of each kind. A case is one test with one set of arguments, or one case of the two fuzz drivers.

* **right**: it works; or, of data, what cannot be used is left out, counted and named.
* **refused**: it ends in one line that says what was wrong, what was expected and what to do, before anything is
  written.
* **at fault**: anything else, such as a traceback, or a setting that is accepted and fails later.

The fuzz drivers give [every key of every config](../tests/stress/test_config_fuzz.py) and [every flag of every
command](../tests/stress/test_flag_fuzz.py) odd values: 0, −1, huge, NaN, None, of other types, empty. All their cases
are counted here. [The soak](../tests/stress/test_soak.py) trains 20,000 steps on a disk and a bucket that fail now and
then, and is killed now and then; the weights must be those of a run that nothing disturbs, bit for bit.

`pytest -m stress tests/stress` ran through in one go: 81 tests passed and none failed, in 107 minutes, 44 of them the
soak, on two cores that did other work at the same time. The five tests that need Apache Beam passed by themselves. The
run draws some of each fuzz driver's cases; all of them took some hours more.

"""


class Kind(NamedTuple):
    """A kind of odd input or fault. right, refused: its tests, by what is expected of them; counted: those that count
    outcomes themselves."""

    tried: str
    right: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


KINDS = {
    "folders": Kind(
        "hidden and foreign files, links, loops, odd names, tables, captions in all forms",
        _of("data/test_folders", "every_picture_is_read_right_or_named", "training_on_it", "hugging_face_s_metadata",
            "output_of_img2dataset_as_files", "linked_folders_are_followed_once", "names_that_are_no_utf_8")
        + _of("data/test_sources", "captions_have_the_picture_s_name_with_or_without_its_ending",
              "what_systems_leave_in_folders_is_no_picture", "pictures_without_a_caption_are_left_out"),
        _of("data/test_folders", "files_of_other_sources_are_named_with_the_source")
        + _of("data/test_sources", "folder_errors", "tfds_errors"),
    ),
    "captions": Kind(
        "encodings, several lines, a thousand words, many letters, control characters",
        _of("data/test_sources", "captions_of_odd_encodings", "each_line_is_a_caption")
        + _of("data/test_tokenizer", "any_text_comes_back", "long_captions_are_learned_from"),
        _of("data/test_sources", "what_is_no_use_is_not_tried_again") + _of("data/test_tokenizer", "errors")
        + _of("test_own_tokenizer", "mistakes_are_one_line"),
    ),
    "pictures": Kind(
        "16 bits, floats, colour spaces, EXIF, large metadata, formats without an ending",
        _of("data/test_decoding", "a_program_s_state_within_a_png", "a_large_colour_profile_within_a_png",
            "damaged_exif_leaves_the_pixels_alone", "exif_that_pillow_cannot_read", "all_ways_of_holding_a_camera",
            "sixteen_bits_of_all_modes", "thirty_two_bits", "floats", "lab", "formats_are_known_by_content",
            "formats_without_a_mark_are_known_by_name"),
        _of("data/test_decoding", "a_damaged_png_stays_one", "floats_that_are_no_picture"),
    ),
    "unreadable records": Kind(
        "damaged files, shards and tars, alone and a thousand in a row, held-out ones too",
        _of("data/test_pipeline", "unreadable_records_are_replaced_by_others_and_named", "evaluation_batch",
            "a_thousand_bad_records_in_a_row_do_not_end_a_run", "captions_of_readable_records_in_order",
            "more_than_a_tenth_that_cannot_be_read_is_said_once", "damaged_files_in_a_folder")
        + _of("data/test_sources", "a_damaged_shard_loses_its_damaged_records_alone")
        + _of("data/test_tars", "damaged_tars_are_named_and_the_rest_is_used"),
        _of("data/test_pipeline", "nothing_readable"),
    ),
    "numbers": Kind(
        "seeds, scales, steps, counts, numbers that are not finite",
        _of("test_keys", "seeds_of_any_size_differ"),
        _of("test_keys", "what_is_no_seed_is_refused") + _of("test_config_values", "ranges_end_where_they_say",
                                                             "wrong_types_and_numbers_are_refused_by_name")
        + _of("test_sample_flags", "what_cannot_be_drawn_is_one_line")
        + _of("test_pictures", "numbers_that_are_not_finite_are_no_picture")
        + _of("test_cascade", "numbers_that_are_not_finite_become_no_picture",
              "no_more_pictures_than_memory_holds"),
    ),
    "texts": Kind(
        "prompts, labels and captions that are empty, too long, alike or not in UTF-8; files of them",
        _of("test_drawing", "captions_of_every_kind_of_file")
        + _of("test_run_identity", "names_that_are_no_utf_8_have_a_fingerprint"),
        _of("test_cascade", "prompts_that_cannot_be_drawn")
        + _of("test_drawing", "files_that_cannot_be_read_are_named_in_one_line"),
    ),
    "masks": Kind(
        "transparent ones, and holes that are empty, whole or beside the square that a model sees",
        _of("test_edit", "masks_may_be_transparent", "inpainting_keeps_known_pixels_bit_for_bit"),
        _of("test_edit", "masks_that_cannot_be_meant_are_refused",
            "what_a_mask_marks_beside_the_square_does_not_count", "a_hole_that_reaches_beyond_the_square_is_refused"),
    ),
    "what is written": Kind(
        "names too long, files in the way, letters without a font, terminals of ASCII, places that are read only",
        _of("test_pictures", "other_files_are_not_overwritten", "names_of_files_are_cut_by_bytes",
            "letters_that_no_font_has_are_named")
        + _of("test_commands", "a_terminal_of_ascii_alone_shows_other_letters_by_their_numbers"),
        _of("test_paths", "folder_on_a_disk_that_may_not_be_written_is_refused", "what_is_no_path_is_refused"),
    ),
    "public weights": Kind(
        "in several files, variants, others' names; pointers, pages, damaged files, other models",
        _of("pretrained/test_state_dict", "several_files_are_one_model", "variants_are_found",
            "names_of_parallel_training_are_unwrapped")
        + _of("pretrained/test_openai_clip", "open_clip_says_heads_activation_mean_and_std",
              "open_clip_without_activation_and_with_it")
        + _of("pretrained/test_glide", "checkpoints_of_glide_finetune_are_known_by_their_own_name")
        + _of("test_fine_tuning", "a_converted_model_is_taken_over_with_what_the_command_line_changes"),
        _of("pretrained/test_state_dict", "index_that_is_none_is_refused", "index_may_not_name_files_elsewhere",
            "numbers_that_are_not_finite_are_refused_by_name", "what_is_downloaded_in_place_of_weights_is_named")
        + _of("pretrained/test_openai_clip", "other_models_are_refused", "configs_beyond_ours_are_refused",
              "what_open_clip_does_otherwise_is_named", "command_needs_one_file_of_weights")
        + _of("pretrained/test_glide", "a_model_without_a_last_norm_is_refused", "a_model_without_blocks_is_refused",
              "a_file_in_place_of_the_folder_is_refused", "bad_files_are_one_clear_line",
              "pickles_that_are_no_state_dicts_are_refused")
        + _of("pretrained/test_tokenizers", "missing_files", "damaged_files", "wrong_json"),
    ),
    "the machine": Kind(
        "full and failing disks at every operation, failing buckets, folders in use, kills while writing",
        _of("test_paths", "a_folder_has_one_owner_until_that_ends_or_dies",
            "what_was_cut_off_while_writing_is_not_there")
        + _of("training/test_checkpoint", "interrupted_save_is_ignored_and_cleaned_up",
              "run_killed_while_saving_leaves_the_step_before")
        + _of("test_bundle", "failed_save_leaves_what_was_there", "failed_rename_leaves_what_was_there",
              "what_a_killed_process_left_is_deleted")
        + _of("stress/test_write_errors", "error_at_every_operation", "files_cut_short")
        + _of("stress/test_soak", "faults_of_disk_and_network_and_kills_change_nothing"),
        _of("test_paths", "errors_of_storage_are_one_line_that_names_the_place",
            "bucket_that_cannot_be_used_is_one_line")
        + _of("training/test_checkpoint", "save_that_fails_behind_the_back_is_raised")
        + _of("stress/test_write_errors", "training_on_a_full_disk_ends_in_one_line"),
    ),
    "misleading numbers": Kind(
        "few held-out examples, losses of other data, intervals, what was compiled",
        _of("test_train", "a_run_that_is_judged_by_few_says_so")
        + _of("test_commands", "losses_are_expected_of_the_config_s_own_data_alone",
              "a_second_sample_compiles_nothing")
        + _of("evaluation/test_intervals", "bootstrap_of_a_mean_is_the_normal_interval")
        + _of("training/test_metrics", "loss_outside_of_what_was_seen_is_said_once"),
    ),
    "newcomers": Kind(
        "every command and all Python of the documentation, own pictures on two CPU cores among them",
        _of("test_docs", "every_command_is_read_by_its_parser", "commands_of_docstrings_are_read_by_their_parsers",
            "marked_commands_run"),
    ),
    "damaged stores": Kind(
        "flipped bits in checkpoints, embeddings, bundles and compiled programs",
        _of("training/test_checkpoint", "flipped_bits_are_noticed_wherever_they_are",
            "change_of_one_element_is_named")
        + _of("training/test_checksums", "any_change_of_one_element_changes_the_checksum")
        + _of("test_programs", "a_damaged_program_is_compiled_anew"),
        _of("test_embed", "any_flipped_bit_is_noticed", "damaged_and_foreign_files_are_refused",
            "numbers_that_are_not_finite_are_not_written")
        + _of("test_bundle", "truncated_missing_and_changed_files", "numbers_that_are_not_finite_are_refused_by_name"),
    ),
    "resumed runs": Kind(
        "other configs, data, CLIPs, tokenizers and randomness than the run was started with; moved ones",
        _of("test_run_identity", "what_may_change_is_said", "places_and_keys_of_other_versions_are_not_compared",
            "fingerprint_is_of_names_captions_and_pictures"),
        _of("test_run_identity", "what_may_not_change_is_refused_with_both_values",
            "what_lies_at_a_place_may_not_change", "settings_of_randomness_may_not_change",
            "run_goes_on_only_with_what_it_was_started_with")
        + _of("training/test_preflight", "differences_are_named_by_process_and_value"),
    ),
    "ends": Kind(
        "signals at any time, hanging storage, killed processes and workers, damaged logs",
        _of("training/test_preflight", "watchdog_ends_a_silent_run_and_shows_where_it_stood",
            "watchdog_of_zero_minutes_never_bites")
        + _of("test_commands", "a_thread_that_hangs_does_not_keep_a_process_alive")
        + _of("test_train", "a_second_signal_acts_at_once", "stopped_and_resumed_is_the_same_run")
        + _of("training/test_metrics", "line_cut_short_by_a_kill_is_dropped",
              "damaged_log_is_read_up_to_where_it_is_good")
        + _of("stress/test_resume", "killed_twenty_times_it_ends_the_same", "on_other_meshes_the_losses_are_the_same",
              "sigterm_at_any_time_saves_and_exits_143", "sigterm_while_reading_hangs_saves_and_ends")
        + _of("stress/test_processes", "losses_are_those_of_one_process",
              "when_one_is_killed_the_other_ends_with_a_clear_line", "when_one_hangs_the_other_ends",
              "sigterm_to_one_saves_and_ends_all")
        + _of("stress/test_data_workers", "a_killed_trainer_leaves_no_worker_and_goes_on_with_another_number",
              "killed_workers_are_replaced_and_the_run_ends_the_same",
              "a_signal_to_all_processes_ends_a_run_in_good_order"),
    ),
    "code in data": Kind(
        "archives with code, programs that others may write, planted links, bombs, names that steer a terminal",
        _of("pretrained/test_torchscript", "code_in_an_archive_is_not_run")
        + _of("test_paths", "nothing_is_written_through_a_planted_link", "folders_that_others_may_write_to_are_known")
        + _of("test_errors", "line") + _of("test_hub", "no_pickle_is_ever_asked_for"),
        _of("pretrained/test_torchscript", "archives_that_lie_are_refused")
        + _of("test_programs", "programs_that_others_may_write_are_refused")
        + _of("data/test_decoding", "a_small_file_cannot_ask_for_any_memory", "nothing_is_run")
        + _of("test_hub", "what_was_changed_on_the_way_is_refused"),
    ),
    "scripts for TPUs": Kind(
        "help, late and unknown flags, odd and foreign variables, a second launch",
        _of("test_tpu_scripts", "help_is_shown_and_nothing_is_run", "names_of_other_programs_are_not_taken",
            "launch_keeps_arguments_whole_and_one_training_runs_at_a_time", "resume_goes_by_the_state_of_the_slice"),
        _of("test_tpu_scripts", "late_flags_are_refused", "unknown_arguments_are_refused",
            "odd_values_of_variables_are_refused"),
    ),
    "commands and configs": Kind(
        "misuses of every command, files of another kind, and the two fuzz drivers",
        (),
        _of("test_commands", "bad_input_is_refused_in_one_line", "files_that_are_no_configs_are_one_line",
            "settings_of_a_picture_that_were_changed_are_one_line")
        + _of("test_edit", "what_cannot_be_is_refused_in_one_line")
        + _of("test_study", "votes_that_cannot_be_counted_are_one_line", "keys_that_were_changed_are_one_line")
        + _of("test_evaluate", "damaged_tars_and_captions_are_one_line")
        + _of("test_foreign", "what_is_no_json", "what_is_no_csv")
        + _of("test_hub", "numbers_of_another_kind_are_no_evaluation", "mistakes_in_pushing_are_one_line"),
        _of("stress/test_config_fuzz", "odd_values_are_refused_in_one_line_or_work")
        + _of("stress/test_flag_fuzz", "odd_values_are_refused_in_one_line_or_work"),
    ),
}  # fmt: skip
COUNTED = {name for kind in KINDS.values() for name in kind.counted}


def read(path: str) -> dict[str, dict[str, int]]:
    """Reads a file of pytest's --junitxml: test → how many of its cases passed and failed. A test that counts outcomes
    itself has its counts in place of that, of each set of arguments, which is then part of its name; where it ended
    before it had counted, that is one case at fault."""
    found: dict[str, dict[str, int]] = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        told = [json.loads(one.get("value")) for one in case.iter("property") if one.get("name") == "counts"]
        if told or name.partition("[")[0] in COUNTED:
            found[name] = told[0] if told else {"ended": 1}
            continue
        one = found.setdefault(name.partition("[")[0], {"passed": 0, "failed": 0})
        one["passed" if case.find("failure") is None and case.find("error") is None else "failed"] += 1
    return found


def counts(kind: Kind, results: dict[str, dict[str, int]]) -> tuple[int, int, int]:
    """Counts the cases of a kind: right, refused, at fault."""
    found = [0, 0, 0]
    places = dict.fromkeys(kind.right, 0) | dict.fromkeys(kind.refused, 1)
    for name, told in results.items():
        plain = name.partition("[")[0]
        if plain in kind.counted:
            outcomes = {"works": 0, "refused": 1}
        elif plain in places:
            outcomes = {"passed": places[plain]}
        else:
            continue
        for outcome, count in told.items():
            found[outcomes.get(outcome, 2)] += count
    return tuple(found)


def page(results: dict[str, dict]) -> str:
    """The whole page."""
    lines = ["| kind | tried | cases | right | refused | at fault |", "|---|---|--:|--:|--:|--:|"]
    total = [0, 0, 0]
    for name, kind in KINDS.items():
        found = counts(kind, results)
        total = [one + more for one, more in zip(total, found, strict=True)]
        lines.append(f"| {name} | {kind.tried} | {sum(found):,} | " + " | ".join(f"{one:,}" for one in found) + " |")
    lines.append(f"| all | | {sum(total):,} | " + " | ".join(f"{one:,}" for one in total) + " |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    known = {name for kind in KINDS.values() for part in kind[1:] for name in part}
    for path in sys.argv[1:]:
        stored |= {name: one for name, one in read(path).items() if name.partition("[")[0] in known}
    STORED.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    PAGE.write_text(page(stored), encoding="utf-8")
