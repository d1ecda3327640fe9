//! Bugs of what machines are measured by: work that is left out.

use super::{Bug, Compiler, Suite, bug};
use crate::ceiling;
use kvlar_tests::Lab;

pub const SUITE: Suite = Suite { name: "ceiling", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug(
        "the last loads left out",
        "ceiling/loads.cu",
        "for (; i < count; i += step) sum += words_of(__ldcg",
        "for (; i + step < count; i += step) sum += words_of(__ldcg",
    ),
    bug(
        "the last rows left out",
        "ceiling/loads.cu",
        "for (; i < count; i += step) sum += words_of(load",
        "for (; i + step < count; i += step) sum += words_of(load",
    ),
    bug(
        "one load less at a time",
        "ceiling/loads.cu",
        "\n      for (int j = 0; j < kInFlight; ++j) sum",
        "\n      for (int j = 1; j < kInFlight; ++j) sum",
    ),
    bug(
        "one load of rows less at a time",
        "ceiling/loads.cu",
        "\n    for (int j = 0; j < kInFlight; ++j) sum",
        "\n    for (int j = 1; j < kInFlight; ++j) sum",
    ),
    bug("rounds left out", "ceiling/loads.cu", "round < p.arg; ++round", "round < 1; ++round"),
    bug("the first chunk of a row", "ceiling/loads.cu", "+ (i & (p.arg - 1))", "+ (i & (p.arg - 1) & 1)"),
    bug("an order that comes back", "ceiling/sums.cuh", "i * 2654435761u", "i * 2654435762u"),
    bug(
        "the stages of the first CTA",
        "ceiling/bulk.cu",
        "fill(blockIdx.x + uint32_t(turn % mine)",
        "fill(uint32_t(turn % mine)",
    ),
    bug("the first stage again", "ceiling/bulk.cu", "begin(turn + kStages);", "begin(turn);"),
    bug("the rows of the first stage", "ceiling/bulk.cu", "scattered(stage * stage_rows + i,", "scattered(i,"),
    bug(
        "a stage that is not waited for",
        "ceiling/bulk.cu",
        "uint32_t(turn / kStages) & 1u);",
        "~uint32_t(turn / kStages) & 1u);",
    ),
    bug("a warp's sum left out", "ceiling/sums.cuh", "i < warps; ++i) sum", "i < warps - 1; ++i) sum"),
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
#include "ceiling/loads.cu"
#include "ceiling/bulk.cu"
#include "ceiling/matrix.cu"
#include "conformance/matrix.cu"
"#;

fn short_suites(lab: &Lab) {
    ceiling::loads_read_every_word(lab);
    ceiling::rows_are_loaded_once(lab);
    ceiling::bulk_copies_read_every_word(lab);
    ceiling::rows_are_copied_once(lab);
    ceiling::products_are_added_up(lab);
}
