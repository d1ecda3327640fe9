//! Bugs of what machines are measured by: work that is left out.

use super::{Bug, Suite, bug};
use crate::ceiling;
use kvlar_tests::Lab;

pub const SUITE: Suite = Suite { name: "ceiling", source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug(
        "the last loads left out",
        "ceiling/memory.cu",
        "for (; i < count; i += step) sum",
        "for (; i + step < count; i += step) sum",
    ),
    bug("one load less at a time", "ceiling/memory.cu", "j < kInFlight; ++j) sum", "j < kInFlight - 1; ++j) sum"),
    bug("rounds left out", "ceiling/memory.cu", "round < p.arg; ++round", "round < 1; ++round"),
    bug(
        "the stages of the first CTA",
        "ceiling/memory.cu",
        "(blockIdx.x + turn % mine * gridDim.x)",
        "(turn % mine * gridDim.x)",
    ),
    bug("the first stage again", "ceiling/memory.cu", "issue(turn + kStages);", "issue(turn);"),
    bug(
        "a stage that is not waited for",
        "ceiling/memory.cu",
        "uint32_t(turn / kStages) & 1u);",
        "~uint32_t(turn / kStages) & 1u);",
    ),
    bug("a warp's sum left out", "ceiling/memory.cu", "i < warps; ++i) sum", "i < warps - 1; ++i) sum"),
    bug(
        "a sum left out",
        "ceiling/matrix.cu",
        "for (int j = 1; j < kAccumulators; ++j) sum",
        "for (int j = 2; j < kAccumulators; ++j) sum",
    ),
    bug("a warp left out", "ceiling/matrix.cu", "for (int w = 1; w < 8", "for (int w = 1; w < 7"),
    bug("a product too many", "ceiling/matrix.cu", "i < count; ++i)", "i <= count; ++i)"),
];

const SOURCE: &str = r#"
#include "ceiling/memory.cu"
#include "ceiling/matrix.cu"
#include "conformance/matrix.cu"
"#;

fn short_suites(lab: &Lab) {
    ceiling::loads_read_every_word(lab);
    ceiling::bulk_copies_read_every_word(lab);
    ceiling::products_are_added_up(lab);
}
