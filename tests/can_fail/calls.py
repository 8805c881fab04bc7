"""Wrong kernels beside the ops: blockwise codes, and the inference call of a whole layer."""

from __future__ import annotations

from tests.can_fail.mutation import Mutation

BLOCKWISE = "tests/backends/test_cpu_blockwise.py"
INFERENCE = "tests/ops/test_inference.py"

_BLOCKWISE = (
    Mutation(
        "blockwise_lets_the_sign_into_absmax",
        "blockwise.cpp",
        "float_bits(values[i]) & 0x7fffffffu",
        "float_bits(values[i])",
        f"{BLOCKWISE}::test_blockwise_codes_are_the_references",
        "avx512",
    ),
    Mutation(
        "blockwise_encodes_the_last_chunk_alone",
        "blockwise.cpp",
        "if (!whole) wide = widened",
        "if (whole) wide = widened",
        f"{BLOCKWISE}::test_blockwise_codes_are_the_references",
        "portable",
    ),
    Mutation(
        "blockwise_keeps_an_infinite_absmax",
        "blockwise.cpp",
        "largest >= kInfinity",
        "largest > kInfinity",
        f"{BLOCKWISE}::test_blockwise_codes_are_the_references",
        "avx2",
    ),
    Mutation(
        "blockwise_takes_one_scale_for_a_chunk",
        "blockwise.cpp",
        "std::min(last, (block + 1) * p.block_size)",
        "last",
        f"{BLOCKWISE}::test_blockwise_codes_are_the_references",
        "avx512",
    ),
    Mutation(
        "blockwise_drops_what_fills_no_vector",
        "blockwise.cpp",
        "for (int64_t i = 0; i < count; ++i) out[i]",
        "for (int64_t i = 0; i + 1 < count; ++i) out[i]",
        f"{BLOCKWISE}::test_blockwise_codes_are_the_references",
        "avx2",
    ),
)

_INFERENCE = (
    Mutation(
        "inference_reads_rows_that_are_no_rows",
        "cpu_linear_inference.cpp",
        "tensor.is_cpu() && tensor.is_contiguous()",
        "tensor.is_cpu()",
        f"{INFERENCE}::test_what_the_kernel_does_not_take_goes_to_the_ops",
    ),
    Mutation(
        "inference_strides_y_as_x",
        "cpu_linear_inference.cpp",
        "stride *= sizes[d];",
        "stride *= x.size(d);",
        f"{INFERENCE}::test_inference_has_the_bits_of_the_ops",
    ),
    Mutation(
        "inference_forgets_the_bias",
        "cpu_linear_inference.cpp",
        "set_bias(kOp, bias, rows, &p);",
        "",
        f"{INFERENCE}::test_inference_has_the_bits_of_the_ops",
    ),
    Mutation(
        "inference_adds_the_adapter_unscaled",
        "cpu_linear_inference.cpp",
        "static_cast<float>(scaling)",
        "1.0f",
        f"{INFERENCE}::test_inference_has_the_bits_of_the_ops",
    ),
    Mutation(
        "inference_takes_more_tokens_than_pay",
        "cpu_linear_inference.cpp",
        "p.tokens > dot_tokens)",
        "p.tokens > dot_tokens + 1)",
        f"{INFERENCE}::test_many_tokens_go_the_way_of_their_path",
    ),
    *(
        Mutation(
            f"inference_goes_past_{key}",
            "cpu_linear_inference.cpp",
            f"{key}, m) {{\n  m.impl",
            f"{key}, m) {{\n  if (false) m.impl",
            f"{INFERENCE}::test_what_has_to_see_the_ops_sees_them",
        )
        for key in ("Python", "AutocastCPU")
    ),
)

MUTATIONS = (*_BLOCKWISE, *_INFERENCE)
