//! All benches, one program, which embeds the kernels once. A module is an op.
//!
//! `cargo bench -p kvlar-bench -- attend/` runs what a filter names, `-- --ops` lists the ops; `KVLAR_BENCH_OPS=attend,scan`
//! runs these alone.

mod append;
mod attend;
mod attend_cut;
mod attend_lowrank;
mod attend_quantized;
mod budget;
mod ceiling;
mod compact;
mod encode;
mod merge;
mod project;
mod scan;
mod score;
mod score_gate;
mod score_keys;
mod select;
mod topp;

use kvlar_bench::Op;
use std::process::ExitCode;

/// In the order in which they run: what a limit of time cuts off is the least.
const OPS: [Op; 17] = [
    ceiling::OP,
    attend::OP,
    attend_quantized::OP,
    attend_lowrank::OP,
    attend_cut::OP,
    scan::OP,
    select::OP,
    topp::OP,
    score::OP,
    score_gate::OP,
    score_keys::OP,
    budget::OP,
    compact::OP,
    project::OP,
    append::OP,
    encode::OP,
    merge::OP,
];

fn main() -> ExitCode {
    kvlar_bench::run(&OPS)
}
