//! The crate's suites, in one program: linking each would take longer than running it.

mod basis;
mod budget;
mod codebooks;
mod common;
mod fit;
mod fusion;
mod gate;
mod gate_file;
mod grouping;
mod moments;
mod ovc;
mod plan;
mod pq;
mod quantized;
mod rotary;
