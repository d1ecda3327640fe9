//! Microbenchmarks of the kvlar kernels: what the bench of each op shares.
//!
//! A bench gives [`Case`]s to [`run`]. On a GPU each is timed as a captured graph of launches over rotating buffer sets,
//! together larger than the L2, and reported beside the copy rate that was measured in the same process. Without a GPU
//! tiny shapes run in emulation: that shows that a bench works, and says nothing of speed.
//!
//! Environment: `KVLAR_BENCH_OUT` (folder for `OP.json`; default `bench/results`), `KVLAR_BENCH_DATE` (written into it),
//! `KVLAR_REQUIRE_GPU` (no GPU is a failure), `KVLAR_BENCH_BYTES` (memory that a case may take; default half of what is
//! free on the GPU), `KVLAR_BENCH_SHAPES=full` (a GPU's shapes in emulation too: slow; give a filter).

mod attend;
mod case;
mod ceiling;
mod data;
mod date;
mod gpu;
mod report;
mod rig;
mod runner;

pub use attend::{Attend, Part};
pub use case::{Case, Launches, Prefixed};
pub use data::{HEAD_PAGE_ROWS, Pages, RowBlock, codec_name, format_name};
pub use date::today;
pub use gpu::driver_version;
pub use rig::Rig;
pub use runner::run;
