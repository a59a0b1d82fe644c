"""Which tests `make quick` runs, and which `make newest` does.

Quick tests are few and short ones that together find most faults (benchmarks/quick_tests.md).
"""

import re

QUICK = {
    "test_heads.py": "",
    "test_layout.py": "roles|a_row|specs|parse_mesh|check_fits|axes_of_size_1|shards",
    "test_layout_text.py": "",
    "test_stored.py": "",
    "test_nn.py": "nnx_jit|heads_get.*mix2_4|heads_change|rows.*replicas|hidden_state.*zigzag|to_stored|shapes_of",
    "test_rooms.py": "test_the_root|test_every_room|imports_point_down.*(nn|stream|trainer)",
    "cost/test_traffic.py": "",
    "cost/test_contracts.py": "of_a_step_equals.*(tsp4|mix2_4|tp2_sp4)|buckets_are_messages|full_weight_matrix.*gather",
    "hardware/test_hardware.py": "second|group|torus|mesh",
    "hf/test_weights.py": "bitwise.*tsp4-tp8-padded|names_and_shapes|broken_folders|of_their_place|one_tensor",
    "hf/test_rope.py": "",
    "hf/test_families.py": "",
    "hf/test_config.py": "test_both_spellings|test_unsupported|keys_are_read",
    "hf/test_peft.py": "another_model|its_key",
    "inference/test_cache.py": "assign_tokens|whole_chunk|ranks_keep.*(tsp4|tsp8)",
    "inference/test_forward.py": "every_step.*(tsp4|mix2_4)",
    "inference/test_sampling.py": "",
    "inference/test_token_loop.py": "generate_refuses|likeliest",
    "inspect/": "",
    "models/test_lora.py": "tsp4-llama|at_first|merged_already",
    "models/test_parity.py": "tsp4-grouped-(gather-full|paper-save_attention|activations-none)|mix2_4-odd_heads",
    "models/test_remat.py": "full-tsp8-float32-bfloat16-96|none-tsp8-float32-bfloat16|micro_batches",
    "ops/attention/test_train.py": "(gather|activations)-mix2_4-(multi_head|shared)|gather-tsp3-shared",
    "ops/kernels/test_kernels.py": "packed|choice|refusals",
    "ops/kernels/test_mask.py": "",
    "ops/test_arithmetic.py": "",
    "ops/test_cross_entropy.py": "mix2_4|tsp3-ring|ignored|large_logits",
    "ops/test_embedding.py": "mix2_4|tsp3-ring",
    "ops/test_experts.py": "mix2_4|ring|work|half|refuses",
    "ops/test_grouped.py": "refuses|auto",
    "ops/test_mlp.py": "mix2_4|tsp3-ring|activations",
    "ops/test_pipeline.py": "",
    "ops/test_rope.py": "",
    "ops/test_sequence.py": "",
    "ops/test_stream.py": "2x4|find",
    "plan/test_search.py": "near_the_best|does_not_compile|more_than_fits|too_late",
    "plan/test_space.py": "contradictions|divides|equal_on_a_mesh",
    "text/test_readers.py": "utf8|refused|each_row|offsets",
    "text/test_shards.py": "",
    "text/test_sources.py": "",
    "text/test_tokenize.py": "around|by_hand|cut_without.*(byte_fallback|merges)|wrote|alternate",
    "text/test_token_file.py": "indexing|truncated",
    "tools/test_calibrate.py": "fit|band|call|wrong_flags|operations",
    "tools/test_cli.py": "bad_flags|removed|every_field|bad_configurations|configurations_load",
    "tools/test_compare.py": "layouts|files",
    "training/safety/test_finite.py": "an_update|spike|in_a_row|resumed",
    "training/test_checkpoint.py": "newest_and_every",
    "training/test_checkpoint_manifest.py": "damage_is_found",
    "training/test_data.py": "",
    "training/test_evaluation.py": "buckets|sums_by|cannot_be_read",
    "training/test_named_optimizers.py": "those_of_optax|orthogonalizes|refused|defaults",
    "training/test_throughput.py": "",
    "training/test_corpus.py": "order|digest|heldout|held_out|refuses_a_vocabulary|round_trip",
    "training/test_lora.py": "digest",
    "training/test_mixture.py": "wrong_mixtures|counts|shares|share_and|resumed",
    "training/test_optimizer.py": "",
    "training/test_own_optimizer.py": "every_kind|wrong_type",
    "training/test_packing.py": "one_item_at_a_time|every_token|segment|labels|counted|resumed",
    "training/test_schedule.py": "schedules|phases|own_steps|rest_of",
    "training/test_training.py": "twenty_steps.*tsp|zero1_shards|zigzag_place",
    "training/test_workdir.py": "gone|ended|elsewhere|succeeds",
}
"""file or folder of tests -> regular expression for the names of its quick tests; empty: all of them"""


NEWEST = (
    # compilers of hardware that is absent
    "cost/test_flops.py", "cost/test_memory.py", "hardware/", "inspect/", "models/test_offload.py",
    "models/test_remat.py", "ops/kernels/test_chunk_pairs.py", "ops/kernels/test_tpu.py", "ops/kernels/test_triton.py",
    "ops/test_grouped.py", "plan/test_compile.py", "tools/test_validate.py",
    # whole runs
    "test_examples.py", "test_nn.py", "test_readme.py", "tools/test_cli.py", "tools/test_generate.py",
    "training/test_checkpoint.py", "training/test_experts.py", "training/test_processes.py",
    "training/test_profile.py", "training/test_resume.py", "training/test_training.py",
)  # fmt: skip
"""files and folders all of whose tests `make newest` runs: what depends on the version of JAX most"""


def is_for_newest(nodeid: str) -> bool:
    """Whether `make newest` runs a test."""
    return nodeid.removeprefix("tests/").startswith(NEWEST) or is_quick(nodeid)


def is_quick(nodeid: str) -> bool:
    """Whether `make quick` runs a test."""
    path, _, name = nodeid.removeprefix("tests/").partition("::")
    return any(path.startswith(place) and re.search(names, name) for place, names in QUICK.items())
