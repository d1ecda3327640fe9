//! The crate's suites, in one program: linking each would take longer than running it.

mod calibrate;
mod calibrate_gates;
mod case;
#[path = "../../kvlar-candle/tests/checkpoint/mod.rs"]
mod checkpoint;
mod eval;
mod op;
mod op_fit;
mod op_kernels;
mod op_lowrank;
mod op_project;
mod op_quantized;
mod op_score;
mod op_select;
