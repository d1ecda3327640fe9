//! A CUDA driver library for machines without a GPU: the calls that our programs make, on kernels that are emulated
//! (`kernels/simt`). What it shows is the host's side of the `cuda` backend, `tools/rehearse` says how.
//!
//! It is as unhelpful as the driver API allows:
//! - Work is done as late as it can be: when a stream, an event or the context is waited for, or memory freed. Who forgets to
//!   wait finds what was there before.
//! - Memory of the device begins, and ends, as NaN, and the host cannot read it: it faults.
//! - What a call does not permit is an error: during capture, beyond an allocation, of another stream, without a context, more
//!   registers or shared memory than a CTA can have (by `kernels/ledger/static.json`). An error of a launch is sticky.
//!
//! It knows nothing of what only a GPU does: machine code, memory ordering, time.

mod api;
mod device;
mod functions;
mod memory;
mod streams;
#[cfg(test)]
mod tests;
