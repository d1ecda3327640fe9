//! The crate's suites, in one program: linking each would take longer than running it.

mod cache;
mod captured;
mod devices;
mod evicting;
mod lab;
mod planned;
mod quantized;
mod rollback;
