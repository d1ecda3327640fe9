//! Streams and captured graphs.

use crate::device::{CAPTURED_ALREADY, Launch, RawStream, Transfer, UNCAPTURABLE};
use crate::{Buffer, Device, Error, Result};
use std::cell::RefCell;
use std::ops::Range;

/// What a capture holds, where the backend has no graphs of its own.
#[derive(Debug)]
enum Recorded {
    Launch(Launch, Vec<u8>),
    Copy(Transfer),
}

/// An ordered queue of work on a [`Device`].
///
/// Launches on different streams are not ordered with each other: synchronize before memory used by one is used by
/// another. On CPU devices work is done when the call returns.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: RawStream,
    owned: bool,
    recording: RefCell<Option<Vec<Recorded>>>,
}

// SAFETY: a CUstream may be used from any thread; the recording is guarded by exclusive use of the stream.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn create(device: &Device) -> Result<Self> {
        let raw = device.driver().create_stream()?;
        Ok(Self { device: device.clone(), raw, owned: true, recording: RefCell::new(None) })
    }

    pub(crate) fn borrow(device: &Device, raw: RawStream) -> Self {
        Self { device: device.clone(), raw, owned: false, recording: RefCell::new(None) }
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The `CUstream`; null on CPU devices.
    pub fn raw(&self) -> *mut std::ffi::c_void {
        self.raw
    }

    fn own(&self, buffer: &Buffer, range: Range<usize>) -> Result<()> {
        if !buffer.device().is(&self.device) {
            return Err(Error::Mismatch { arg: "buffer", what: "device" });
        }
        buffer.check(&range)
    }

    fn uncaptured(&self) -> Result<()> {
        if self.recording.borrow().is_some() {
            return Err(Error::Capture(UNCAPTURABLE));
        }
        Ok(())
    }

    /// Waits until everything enqueued is done.
    ///
    /// # Errors
    /// What a launch did wrong: [`Error::Cuda`], [`Error::ContextLost`]; [`Error::Capture`] while the stream is captured, which
    /// goes on.
    pub fn synchronize(&self) -> Result<()> {
        self.uncaptured()?;
        self.device.driver().synchronize(self.raw)
    }

    /// Copies `from` to `offset` of `to`. `from` may be reused at once. Memory of the host is written when all that is enqueued
    /// is done, which this waits for.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Mismatch`], [`Error::Capture`], [`Error::Cuda`].
    pub fn upload(&self, to: &mut Buffer, offset: usize, from: &[u8]) -> Result<()> {
        self.own(to, offset..offset.saturating_add(from.len()))?;
        self.uncaptured()?;
        self.device.driver().upload(self.raw, to.place(offset), from)
    }

    /// Copies `to.len()` bytes from `offset` of `from`, and waits for them.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Mismatch`], [`Error::Capture`], [`Error::Cuda`].
    pub fn download(&self, from: &Buffer, offset: usize, to: &mut [u8]) -> Result<()> {
        self.own(from, offset..offset.saturating_add(to.len()))?;
        self.uncaptured()?;
        self.device.driver().download(self.raw, from.place(offset), to)
    }

    /// Copies within a buffer; the ranges must not overlap on a GPU.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Mismatch`], [`Error::Cuda`].
    pub fn copy_within(&self, buffer: &mut Buffer, from: Range<usize>, to: usize) -> Result<()> {
        self.own(buffer, from.clone())?;
        self.own(buffer, to..to.saturating_add(from.len()))?;
        let base = buffer.address();
        self.enqueue_copy(Transfer { from: base + from.start as u64, to: base + to as u64, bytes: from.len() })
    }

    /// Copies a range of `from` to `offset` of `to`. Memory of the host is moved by the copy engine, beside the launches of
    /// other streams.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Mismatch`], [`Error::Cuda`].
    pub fn copy(&self, from: &Buffer, range: Range<usize>, to: &mut Buffer, offset: usize) -> Result<()> {
        self.own(from, range.clone())?;
        self.own(to, offset..offset.saturating_add(range.len()))?;
        let (first, to) = (from.address() + range.start as u64, to.address() + offset as u64);
        self.enqueue_copy(Transfer { from: first, to, bytes: range.len() })
    }

    fn enqueue_copy(&self, transfer: Transfer) -> Result<()> {
        if let Some(list) = self.recording.borrow_mut().as_mut() {
            list.push(Recorded::Copy(transfer));
            return Ok(());
        }
        self.device.driver().copy(self.raw, transfer)
    }

    /// Sets every byte of a range; of memory of the host, as [`Stream::upload`] does.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Mismatch`], [`Error::Capture`], [`Error::Cuda`].
    pub fn fill(&self, buffer: &mut Buffer, range: Range<usize>, byte: u8) -> Result<()> {
        self.own(buffer, range.clone())?;
        self.uncaptured()?;
        self.device.driver().fill(self.raw, buffer.place(range.start), byte, range.len())
    }

    /// Enqueues any entry point: for tests of single instructions.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` is the entry's struct, and its addresses are valid for what the kernel touches until it has run.
    #[doc(hidden)]
    pub unsafe fn enqueue_entry<P: bytemuck::Pod>(&self, entry: &'static str, grid: u32, block: u32, params: &P) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(Launch { entry, grid, block, shared_bytes: 0 }, params) }
    }

    /// # Safety
    /// `params` is the entry's struct, and its addresses are valid for what the kernel touches until it has run.
    pub(crate) unsafe fn enqueue<P: bytemuck::Pod>(&self, launch: Launch, params: &P) -> Result<()> {
        let bytes = bytemuck::bytes_of(params);
        if let Some(list) = self.recording.borrow_mut().as_mut() {
            list.push(Recorded::Launch(launch, bytes.to_vec()));
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.driver().launch(self.raw, launch, bytes) }
    }

    /// Captures the launches and the copies between buffers that `enqueue` makes on this stream, without running them. An
    /// engine that captures by itself need not call this: launches are capturable. Memory that this thread allocates or frees
    /// meanwhile ends a capture of the driver's.
    ///
    /// # Errors
    /// Those of `enqueue`; [`Error::Capture`] if the stream is being captured already; [`Error::Cuda`].
    pub fn capture(&self, enqueue: impl FnOnce(&Self) -> Result<()>) -> Result<Graph> {
        if let Some(graphs) = self.device.driver().graphs() {
            graphs.begin(self.raw)?;
            let result = enqueue(self);
            let graph = graphs.end(self.raw); // also after an error: the stream must not stay in capture
            result?;
            return Ok(Graph { device: self.device.clone(), kind: GraphKind::Device(graph?) });
        }
        if self.recording.borrow().is_some() {
            return Err(Error::Capture(CAPTURED_ALREADY));
        }
        *self.recording.borrow_mut() = Some(Vec::new());
        let result = enqueue(self);
        let list = self.recording.borrow_mut().take().unwrap_or_default();
        result?;
        Ok(Graph { device: self.device.clone(), kind: GraphKind::Recorded(list) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned {
            self.device.driver().destroy_stream(self.raw);
        }
    }
}

#[derive(Debug)]
enum GraphKind {
    Device(u64),
    Recorded(Vec<Recorded>),
}

/// Captured launches and copies, to be run again with the same addresses and whatever the memory then holds.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    kind: GraphKind,
}

impl Graph {
    /// Enqueues all that was captured.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a stream of another device; [`Error::Cuda`].
    ///
    /// # Safety
    /// All memory that what was captured uses is still allocated, and used by nothing else until they have run.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        if !stream.device().is(&self.device) {
            return Err(Error::Mismatch { arg: "stream", what: "device" });
        }
        match &self.kind {
            GraphKind::Device(graph) => match self.device.driver().graphs() {
                // SAFETY: the caller's promise.
                Some(graphs) => unsafe { graphs.launch(*graph, stream.raw()) },
                None => Err(Error::Capture("this device has no graphs")),
            },
            GraphKind::Recorded(list) => {
                for recorded in list {
                    match recorded {
                        // SAFETY: the caller's promise.
                        Recorded::Launch(launch, params) => unsafe {
                            self.device.driver().launch(stream.raw(), *launch, params)?;
                        },
                        Recorded::Copy(transfer) => self.device.driver().copy(stream.raw(), *transfer)?,
                    }
                }
                Ok(())
            }
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let (GraphKind::Device(graph), Some(graphs)) = (&self.kind, self.device.driver().graphs()) {
            graphs.destroy(*graph);
        }
    }
}
