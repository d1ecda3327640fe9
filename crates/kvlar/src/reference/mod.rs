//! The reference backend: interprets the parameter structs of the kernels with plain Rust (`kvlar_reference`).
//!
//! Every unsafe block of this module rests on the one promise of [`run`]: the addresses in the struct are valid for what
//! the kernel touches.
#![allow(clippy::undocumented_unsafe_blocks)]

mod attend;
mod attend_lowrank;
mod budget;
mod compact;
mod memory;
mod project;
mod rows;
mod scan;
mod score;
mod score_gate;
mod select;
mod write;

use crate::{Error, Result, abi};
use bytemuck::pod_read_unaligned;
use kvlar_reference::{CompactOrder, ReferenceError};
use memory::{read, write};

/// Runs one launch.
///
/// # Safety
/// `params` is the entry's parameter struct, and every address in it is valid for what the kernel touches.
pub(crate) unsafe fn run(entry: &str, params: &[u8]) -> Result<()> {
    match entry {
        "kvlar_attend_schedule" | "kvlar_attend_lowrank_schedule" => Ok(()), // rows are not shared among CTAs here
        "kvlar_append" | "kvlar_append_scored" => unsafe { write::append(&pod_read_unaligned::<abi::KvlarAppend>(params)) },
        "kvlar_append_groups" => unsafe { write::append_groups(&pod_read_unaligned::<abi::KvlarAppendGroups>(params)) },
        "kvlar_encode" | "kvlar_encode_pq" => unsafe { write::encode(&pod_read_unaligned::<abi::KvlarTranscode>(params)) },
        "kvlar_encode_channels" => unsafe { write::encode_groups(&pod_read_unaligned::<abi::KvlarTranscode>(params)) },
        "kvlar_decode" => unsafe { write::decode(&pod_read_unaligned::<abi::KvlarTranscode>(params)) },
        e if e.starts_with("kvlar_project_") => unsafe { project::project(&pod_read_unaligned::<abi::KvlarProject>(params)) },
        e if e.starts_with("kvlar_append_lowrank_") => unsafe {
            project::append_lowrank(&pod_read_unaligned::<abi::KvlarAppendLowrank>(params))
        },
        e if e.starts_with("kvlar_score_gate_") => unsafe {
            score_gate::gate(&pod_read_unaligned::<abi::KvlarScoreGate>(params), dtype_in(e))
        },
        e if e.starts_with("kvlar_score_keys_") => unsafe {
            score_gate::keys(&pod_read_unaligned::<abi::KvlarScoreKeys>(params), dtype_in(e), e.ends_with("_sums"))
        },
        e if e.starts_with("kvlar_scan_") => unsafe { scan::scan(&pod_read_unaligned::<abi::KvlarScan>(params)) },
        "kvlar_compact" => unsafe { compact::compact(&pod_read_unaligned(params), CompactOrder::Keep) },
        "kvlar_compact_any" => unsafe { compact::compact(&pod_read_unaligned(params), CompactOrder::Any) },
        "kvlar_protect" => unsafe { compact::protect(&pod_read_unaligned(params)) },
        e if e.starts_with("kvlar_score_lse_") || e.starts_with("kvlar_score_rows_") => unsafe {
            score::score(e, &pod_read_unaligned::<abi::KvlarScore>(params))
        },
        "kvlar_topk_bins" | "kvlar_topk_apply" => Ok(()), // `kvlar_topk_cut` does it all here
        "kvlar_topk" => unsafe { select::rows(&pod_read_unaligned::<abi::KvlarTopk>(params)) },
        "kvlar_topk_cut" => unsafe { select::sets(&pod_read_unaligned::<abi::KvlarTopk>(params)) },
        "kvlar_budget_layers" => unsafe { budget::layers(&pod_read_unaligned::<abi::KvlarBudget>(params)) },
        "kvlar_budget_heads" => unsafe { budget::heads(&pod_read_unaligned::<abi::KvlarBudget>(params)) },
        "kvlar_topp" => unsafe { select::topp(&pod_read_unaligned::<abi::KvlarTopp>(params)) },
        "kvlar_reduce" => unsafe { scan::reduce(&pod_read_unaligned::<abi::KvlarReduce>(params)) },
        "kvlar_merge" => unsafe { merge(&pod_read_unaligned::<abi::KvlarMerge>(params)) },
        _ => {
            if let Some(dtype) = crate::attend::dtype_of(entry) {
                let params = pod_read_unaligned::<abi::KvlarAttend>(params);
                let dtype = dtype.map_or_else(|| rows::dtype(params.q_dtype), Ok)?;
                unsafe { attend::attend(&params, dtype) }
            } else if let Some(dtype) = crate::attend::cut_dtype_of(entry) {
                unsafe { attend::attend_cut(&pod_read_unaligned::<abi::KvlarAttendCut>(params), dtype) }
            } else if let Some(dtype) = crate::attend_lowrank::dtype_of(entry) {
                unsafe { attend_lowrank::attend_lowrank(&pod_read_unaligned::<abi::KvlarAttendLowrank>(params), dtype) }
            } else {
                Err(Error::Reference(format!("no op {entry}")))
            }
        }
    }
}

/// The type that an entry's name says.
fn dtype_in(entry: &str) -> crate::Dtype {
    if entry.contains("_f16") { crate::Dtype::F16 } else { crate::Dtype::Bf16 }
}

/// # Safety
/// As for [`run`].
unsafe fn merge(p: &abi::KvlarMerge) -> Result<()> {
    let (n, rows, dim) = (p.part_count as usize, p.row_count as usize, p.dim as usize);
    let (parts, part_lse) = unsafe { (read::<f32>(p.parts, n * rows * dim), read::<f32>(p.part_lse, n * rows)) };
    let (out, lse) = kvlar_reference::merge(&parts, &part_lse, n, rows, dim)?;
    unsafe {
        write(p.out, &out);
        write(p.lse, &lse);
    }
    Ok(())
}

impl From<ReferenceError> for Error {
    fn from(e: ReferenceError) -> Self {
        Self::Reference(e.to_string())
    }
}
