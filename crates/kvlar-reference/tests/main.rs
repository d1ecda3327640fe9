//! The crate's suites, in one program: linking each would take longer than running it.

mod budget;
mod codecs;
mod compact;
mod ops;
mod quantized;
mod scan;
mod score;
mod select;
mod select_sorting;
mod selected;
