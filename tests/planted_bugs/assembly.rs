//! Bugs of what nvcc alone reads: instructions in assembly, and their operands.

use super::{Bug, Compiler, Suite, bug};
use crate::conformance;
use kvlar_tests::Lab;

pub const SUITE: Suite = Suite { name: "assembly", by: Compiler::Nvcc, source: SOURCE, bugs: BUGS, run: short_suites };

const PTX: &str = "device/ptx.cuh";
const MBARRIER: &str = "device/mbarrier.cuh";

const BUGS: &[Bug] = &[
    bug("bf16 pairs swapped", PTX, "cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1"),
    bug("f16 pairs swapped", PTX, "cvt.rn.f16x2.f32 %0, %1, %2", "cvt.rn.f16x2.f32 %0, %2, %1"),
    bug("matrices in another order", PTX, "x4.shared.b16 {%0,%1,%2,%3}", "x4.shared.b16 {%0,%2,%1,%3}"),
    bug("two matrices in another order", PTX, "x2.shared.b16 {%0,%1}", "x2.shared.b16 {%1,%0}"),
    bug("four matrices not transposed", PTX, "x4.trans.shared", "x4.shared"),
    bug("two matrices not transposed", PTX, "x2.trans.shared", "x2.shared"),
    bug("bf16 taken for f16", PTX, "\"m16n8k16\", \"f32.bf16.bf16.f32\"", "\"m16n8k16\", \"f32.f16.f16.f32\""),
    bug("f16 taken for bf16", PTX, "\"m16n8k8\", \"f32.f16.f16.f32\"", "\"m16n8k8\", \"f32.bf16.bf16.f32\""),
    bug("unsigned codes taken for signed", PTX, "\"s32.u8.s8.s32\"", "\"s32.s8.s8.s32\""),
    bug("parts of b swapped", PTX, "{%8,%9}, {%0,%1,%2,%3}", "{%9,%8}, {%0,%1,%2,%3}"),
    bug("parts of a swapped", PTX, "{%4,%5,%6,%7}, {%8,%9}", "{%4,%6,%5,%7}, {%8,%9}"),
    bug("sums in other places", PTX, "{%4,%5}, {%6}, {%0,%1,%2,%3}", "{%4,%5}, {%6}, {%1,%0,%2,%3}"),
    bug("16 bytes whatever was asked", PTX, "[%0], [%1], 16, %2;", "[%0], [%1], 16;"),
    bug("8 bytes whatever was asked", PTX, "[%0], [%1], 8, %2;", "[%0], [%1], 8;"),
    bug("4 bytes for 8", PTX, "[%0], [%1], 8, %2;", "[%0], [%1], 4, %2;"),
    bug("one group too few awaited", PTX, "::\"n\"(N) : \"memory\"", "::\"n\"(N + 1) : \"memory\""),
    bug("groups never ended", PTX, "\"cp.async.commit_group;\"", "\"\""),
    bug("another function", PTX, "PTX_UNARY(ex2_approx, \"ex2", "PTX_UNARY(ex2_approx, \"lg2"),
    bug("the reciprocal left out", PTX, "PTX_UNARY(rcp_approx, \"rcp.approx.ftz.f32\")", "PTX_UNARY(rcp_approx, \"mov.f32\")"),
    bug("operands of a table", PTX, "lop3.b32 %0, %1, %2, %3, %4", "lop3.b32 %0, %3, %2, %1, %4"),
    bug("product and sum swapped", PTX, "fma.rn.f16x2 %0, %1, %2, %3", "fma.rn.f16x2 %0, %1, %3, %2"),
    bug("a square for a product", PTX, "mul.rn.f16x2 %0, %1, %2", "mul.rn.f16x2 %0, %1, %1"),
    bug(
        "barrier and count swapped",
        PTX,
        "bar.sync %0, %1;\" ::\"r\"(id), \"r\"(threads)",
        "bar.sync %0, %1;\" ::\"r\"(threads), \"r\"(id)",
    ),
    bug("the next barrier", PTX, "bar.arrive %0, %1;\" ::\"r\"(id)", "bar.arrive %0, %1;\" ::\"r\"(id + 1)"),
    bug("arrivals not counted", PTX, "\"=r\"(old) : \"l\"(p), \"r\"(v)", "\"=r\"(old) : \"l\"(p), \"r\"(v - v)"),
    bug("counters left as they are", PTX, "if (last) __stcg(counter, 0u);", ""),
    // By nvcc's own choice it would be, if it took the words for constant.
    bug("a read-only load of what others wrote", "conformance/synchronization.cu", "own += __ldcg(", "own += __ldg("),
    bug("a load by L1 of what others wrote", "conformance/synchronization.cu", "__ldcg(words + 64 * c + t)", "words[64 * c + t]"),
    bug("waiting for the other parity", MBARRIER, "selp.u32 %0, 1, 0, p;", "selp.u32 %0, 0, 1, p;"),
    bug(
        "bytes that nobody expects",
        MBARRIER,
        "arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
        "arrive.shared::cta.b64 _, [%0];",
    ),
    bug("an arrival too many expected", MBARRIER, "::\"r\"(bar.a), \"r\"(arrivals)", "::\"r\"(bar.a), \"r\"(arrivals + 1)"),
    bug("half of the bytes", MBARRIER, "\"l\"(src), \"r\"(bytes), \"r\"(bar.a)", "\"l\"(src), \"r\"(bytes / 2), \"r\"(bar.a)"),
];

const SOURCE: &str = r#"
#include "conformance/arithmetic.cu"
#include "conformance/matrix.cu"
#include "conformance/memory.cu"
#include "conformance/synchronization.cu"
"#;

fn short_suites(lab: &Lab) {
    conformance::asynchronous_copies(lab);
    conformance::groups_of_copies_land_in_order(lab);
    conformance::bulk_copies_and_their_barriers(lab);
    conformance::matrix_loads(lab);
    conformance::transposition(lab);
    conformance::tensor_core_products(lab);
    conformance::approximate_functions(lab);
    conformance::conversions(lab);
    conformance::half_arithmetic(lab);
    conformance::integer_instructions(lab);
    conformance::exact_float_instructions(lab);
    conformance::warp_collectives(lab);
    conformance::named_barriers(lab);
    conformance::the_last_cta_sees_what_all_wrote(lab);
}
