//! Microbenchmarks of the kvlar kernels: what the bench of each op shares.
//!
//! A bench gives an [`Op`] with [`Case`]s; [`run`] is the program of all. On a GPU each case is timed as a captured graph of
//! launches over rotating buffer sets, together larger than the L2, and reported beside the copy rate that was measured in
//! the same process. Without a GPU tiny shapes run in emulation: that shows that a bench works, and says nothing of speed.
//! `bench/README.md` says how results are made and drawn, and which environment variables there are.

mod attend;
mod case;
mod ceiling;
mod data;
mod date;
mod earlier;
mod file;
mod gpu;
mod ledger;
mod ops;
mod page;
mod report;
mod rig;
mod runner;
mod support;

pub use attend::{Attend, Part};
pub use case::{Case, Launches, Prefixed};
pub use data::{HEAD_PAGE_ROWS, Pages, RowBlock, codec_name, format_name};
pub use date::today;
pub use file::{pretty, read_json, write_json, write_text};
pub use gpu::driver_version;
pub use ledger::{append, collect};
pub use ops::{Op, run};
pub use page::results_page;
pub use rig::Rig;
pub use support::support_table;
