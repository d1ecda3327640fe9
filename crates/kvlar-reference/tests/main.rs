//! The crate's suites, in one program: linking each would take longer than running it.

mod codecs;
mod ops;
mod quantized;
mod scan;
mod score;
