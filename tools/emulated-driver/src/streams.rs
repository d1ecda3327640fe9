//! Work that waits, and what is captured of it.

use crate::functions::Launch;
use crate::memory::{Memory, Owner};
use cudarc::driver::sys::CUresult;
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::thread::ThreadId;
use std::time::Instant;

/// When the device was there.
pub type Passed = Rc<Cell<Option<Instant>>>;

#[derive(Clone)]
pub enum Work {
    Launch(Rc<Launch>),
    /// Between memory of the device and page-locked memory.
    Copy {
        from: usize,
        to: usize,
        bytes: usize,
    },
    /// Of what was pageable memory when it was enqueued.
    Upload {
        from: Rc<[u8]>,
        to: usize,
    },
    Set {
        at: usize,
        byte: u8,
        bytes: usize,
    },
    Record(Passed),
}

impl Work {
    /// Does it, as the device.
    pub fn run(&self, memory: &Memory, seed: u64) -> Result<(), CUresult> {
        let still_there = |address, bytes| match memory.owner(address, bytes) {
            Ok(Owner::Device | Owner::PageLocked) => Ok(()),
            _ => Err(failed("a copy", "memory that was freed before its turn", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS)),
        };
        match self {
            Self::Launch(launch) => {
                if let Some(why) = memory.unreachable(&launch.parameters) {
                    return Err(failed(launch.entry, &why, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
                }
                let Launch { entry, grid, block, shared_bytes, parameters } = &**launch;
                // SAFETY: parameters are of the entry's size; their addresses are looked at above, as far as can be.
                let ran = memory
                    .open(|| unsafe { kvlar_kernels::simt::launch(entry, *grid, *block, *shared_bytes, parameters, seed, 0) });
                ran.map_err(|why| failed(entry, &why, CUresult::CUDA_ERROR_LAUNCH_FAILED))?;
            }
            &Self::Copy { from, to, bytes } => {
                still_there(from, bytes)?;
                still_there(to, bytes)?;
                // SAFETY: both ranges are allocated.
                memory.open(|| unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) });
            }
            Self::Upload { from, to } => {
                still_there(*to, from.len())?;
                // SAFETY: the range is allocated.
                memory.open(|| unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), *to as *mut u8, from.len()) });
            }
            &Self::Set { at, byte, bytes } => {
                still_there(at, bytes)?;
                // SAFETY: the range is allocated.
                memory.open(|| unsafe { std::ptr::write_bytes(at as *mut u8, byte, bytes) });
            }
            Self::Record(passed) => passed.set(Some(Instant::now())),
        }
        Ok(())
    }
}

fn failed(entry: &str, why: &str, code: CUresult) -> CUresult {
    eprintln!("emulated driver: {entry}: {why}");
    code
}

/// What a stream has been given while it was captured.
pub struct Capture {
    pub thread: ThreadId,
    pub work: Vec<Work>,
    /// Something was called that a capture does not permit.
    pub invalid: bool,
}

#[derive(Default)]
pub struct Stream {
    pub queue: VecDeque<Work>,
    pub capture: Option<Capture>,
    /// Whether it and the legacy default stream wait for each other: such streams share a queue.
    pub blocking: bool,
}
