//! The crate's suites, in one program: linking each would take longer than running it.

mod capture;
mod checkpoint;
mod devices;
mod errors;
mod fisher;
mod forward;
mod noise;
mod plain;
mod planned;
mod repeat;
