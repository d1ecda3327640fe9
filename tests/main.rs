//! The suites, one program: it links the emulated kernels once. A module is a suite; `cargo test --test suites attend::` runs
//! one, `simt::` all of them in emulation.

mod abi;
mod append;
mod append_groups;
mod append_lowrank;
mod attend;
mod attend_channels;
mod attend_cut;
mod attend_lowrank;
mod attend_quantized;
mod budget;
mod ceiling;
mod compact;
mod conformance;
mod contracts;
mod encode;
mod graphs;
mod host_memory;
mod lowrank_contracts;
mod merge;
mod planted;
mod project;
mod properties;
mod reduce;
mod scan;
mod scan_contracts;
mod scan_select;
mod score;
mod score_contracts;
mod score_gate;
mod score_keys;
mod select;
mod topp;
