//! Scratch memory of launches.

use crate::{Buffer, Device, Error, Result, Stream, abi};

/// Scratch of the launches of one stream: zeroed at creation, left as it was by each launch. It must outlive every
/// graph that captured it.
#[derive(Debug)]
pub struct Workspace {
    buffer: Buffer,
    size: WorkspaceSize,
}

/// The status word has the first bytes of a workspace to itself; counters and scratch follow, as much aligned.
const STATUS_BYTES: usize = 256;

/// What kernels had to clamp or skip, since the workspace was made or its status cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u32);

impl Status {
    /// Nothing.
    pub fn is_clean(self) -> bool {
        self.0 == 0
    }
    /// A page id that is none of the pool's.
    pub fn bad_page(self) -> bool {
        self.0 & abi::KVLAR_STATUS_BAD_PAGE != 0
    }
    /// A length that is negative or above the capacity.
    pub fn bad_length(self) -> bool {
        self.0 & abi::KVLAR_STATUS_BAD_LENGTH != 0
    }
    /// A slot beyond the capacity.
    pub fn bad_slot(self) -> bool {
        self.0 & abi::KVLAR_STATUS_BAD_SLOT != 0
    }
}

/// Scratch that a plan needs, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WorkspaceSize {
    /// Memory that launches find zeroed and leave zeroed: counters.
    pub zeroed: usize,
    /// Memory whose content does not matter: partial results.
    pub scratch: usize,
}

impl WorkspaceSize {
    /// Enough for either.
    pub fn max(self, other: Self) -> Self {
        Self { zeroed: self.zeroed.max(other.zeroed), scratch: self.scratch.max(other.scratch) }
    }

    /// What a [`Workspace`] of this size allocates.
    pub fn bytes(self) -> usize {
        STATUS_BYTES + self.zeroed.next_multiple_of(STATUS_BYTES) + self.scratch
    }
}

/// Addresses within a workspace.
pub(crate) struct Scratch {
    pub status: u64,
    pub zeroed: u64,
    pub scratch: u64,
}

impl Workspace {
    /// Scratch for any plan whose `workspace()` is at most `size`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, size: WorkspaceSize) -> Result<Self> {
        Ok(Self { buffer: device.alloc(size.bytes())?, size })
    }

    /// What it was made for.
    pub fn size(&self) -> WorkspaceSize {
        self.size
    }

    /// Its memory: the status word, then (256 bytes from the start) what launches leave zeroed, then scratch.
    pub fn memory(&self) -> &Buffer {
        &self.buffer
    }

    pub(crate) fn scratch(&self, need: WorkspaceSize) -> Result<Scratch> {
        for (need, have) in [(need.zeroed, self.size.zeroed), (need.scratch, self.size.scratch)] {
            if need > have {
                return Err(Error::Bounds { arg: "workspace", need, have });
            }
        }
        let status = self.buffer.address();
        let zeroed = status + STATUS_BYTES as u64;
        Ok(Scratch { status, zeroed, scratch: zeroed + self.size.zeroed.next_multiple_of(STATUS_BYTES) as u64 })
    }

    /// Reads the status word; waits for the stream.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn status(&self, stream: &Stream) -> Result<Status> {
        let mut word = [0u8; 4];
        stream.download(&self.buffer, 0, &mut word)?;
        Ok(Status(u32::from_le_bytes(word)))
    }

    /// Clears the status word.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn clear_status(&mut self, stream: &Stream) -> Result<()> {
        stream.fill(&mut self.buffer, 0..4, 0)
    }
}
