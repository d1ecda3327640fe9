//! The one device: its state, and what calls do to it.

use crate::functions::Function;
use crate::memory::{Memory, Owner};
use crate::streams::{Capture, Passed, Stream, Work};
use cudarc::driver::sys::{CUresult, CUstreamCaptureStatus as CaptureStatus};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

pub const NAME: &str = kvlar_kernels::simt::DRIVER_DEVICE;
/// The driver API's version: that of our bindings.
pub const VERSION: i32 = 13_000;
/// As of an H200, so that what is chosen by it is what such a GPU would run.
pub const CAPABILITY: (i32, i32) = (9, 0);
/// Few, so that small shapes fill them.
pub const SM_COUNT: i32 = 4;
pub const SHARED_PER_BLOCK: u32 = 227 << 10;
pub const SHARED_PER_SM: u32 = 228 << 10;
pub const REGISTERS_PER_SM: u32 = 64 << 10;
pub const L2_BYTES: i32 = 1 << 20;

pub type Outcome<T = ()> = Result<T, CUresult>;

/// The legacy default stream.
const DEFAULT_STREAM: usize = 0;

pub struct Device {
    pub memory: Memory,
    pub retained: usize,
    pub functions: BTreeMap<usize, Function>,
    pub streams: BTreeMap<usize, Stream>,
    /// Work of streams that are gone.
    abandoned: VecDeque<Work>,
    pub graphs: BTreeMap<usize, Vec<Work>>,
    /// Graphs that can be launched.
    pub executables: BTreeMap<usize, Vec<Work>>,
    /// `None` where nothing was recorded.
    pub events: BTreeMap<usize, Option<Passed>>,
    handles: usize,
    /// After this a context answers nothing else.
    failed: Option<CUresult>,
    seed: u64,
}

// SAFETY: the counted references stay within the device, which a lock guards.
unsafe impl Send for Device {}

thread_local! {
    /// Whether the context is this thread's.
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

pub fn make_current(current: bool) {
    CURRENT.set(current);
}

/// The device, whatever state it is in; `None` before it was initialized.
pub fn raw(initialize: bool) -> Option<MutexGuard<'static, Device>> {
    static DEVICE: OnceLock<Mutex<Device>> = OnceLock::new();
    let device = if initialize { Some(DEVICE.get_or_init(|| Mutex::new(Device::new()))) } else { DEVICE.get() };
    device.map(|d| d.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The device, for a call that needs a working context.
pub fn current() -> Outcome<MutexGuard<'static, Device>> {
    let device = raw(false).ok_or(CUresult::CUDA_ERROR_NOT_INITIALIZED)?;
    if !CURRENT.get() || device.retained == 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_CONTEXT);
    }
    device.failed.map_or(Ok(device), Err)
}

fn get<T>(of: &mut BTreeMap<usize, T>, handle: usize) -> Outcome<&mut T> {
    of.get_mut(&handle).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
}

impl Device {
    fn new() -> Self {
        let seed = std::env::var("KVLAR_DRIVER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
        let legacy = Stream { blocking: true, ..Stream::default() };
        Self {
            memory: Memory::new(),
            retained: 0,
            functions: BTreeMap::new(),
            streams: BTreeMap::from([(DEFAULT_STREAM, legacy)]),
            abandoned: VecDeque::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            events: BTreeMap::new(),
            handles: 0,
            failed: None,
            seed,
        }
    }

    /// A handle that nothing else has, and that looks like a pointer.
    pub fn handle(&mut self) -> usize {
        self.handles += 1;
        16 * self.handles
    }

    /// Fails where this thread captures a stream, which is then lost: what waits, allocates or frees is not permitted there.
    pub fn uncaptured(&mut self) -> Outcome {
        let thread = std::thread::current().id();
        let mut captures = self.streams.values_mut().filter_map(|s| s.capture.as_mut()).filter(|c| c.thread == thread).peekable();
        if captures.peek().is_none() {
            return Ok(());
        }
        captures.for_each(|c| c.invalid = true);
        Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
    }

    /// Adds work to a stream, or to what is captured of it.
    pub fn enqueue(&mut self, stream: usize, work: Work) -> Outcome {
        let of = get(&mut self.streams, stream)?;
        if let Some(capture) = &mut of.capture {
            if capture.invalid {
                return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            }
            capture.work.push(work);
            return Ok(());
        }
        let queue = if of.blocking { get(&mut self.streams, DEFAULT_STREAM)? } else { of };
        queue.queue.push_back(work);
        Ok(())
    }

    /// Does all that a stream has been given.
    pub fn synchronize(&mut self, stream: usize) -> Outcome {
        let of = get(&mut self.streams, stream)?;
        if let Some(capture) = &mut of.capture {
            capture.invalid = true;
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let queue = if of.blocking { get(&mut self.streams, DEFAULT_STREAM)? } else { of };
        let works = std::mem::take(&mut queue.queue);
        self.run(works)
    }

    /// Does all that there is to do.
    pub fn synchronize_all(&mut self) -> Outcome {
        self.uncaptured()?;
        let streams: Vec<_> = self.streams.iter().filter(|(_, s)| s.capture.is_none()).map(|(&handle, _)| handle).collect();
        streams.into_iter().try_for_each(|stream| self.synchronize(stream))?;
        let abandoned = std::mem::take(&mut self.abandoned);
        self.run(abandoned)
    }

    /// A stream is gone at once. What it was given is still done: some time.
    pub fn destroy_stream(&mut self, stream: usize) -> Outcome {
        if stream == DEFAULT_STREAM {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let gone = self.streams.remove(&stream).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        self.abandoned.extend(gone.queue);
        Ok(())
    }

    fn run(&mut self, works: VecDeque<Work>) -> Outcome {
        for work in works {
            if let Err(code) = work.run(&self.memory, self.seed) {
                self.failed = Some(code);
                return Err(code);
            }
        }
        Ok(())
    }

    pub fn copy(&mut self, from: usize, to: usize, bytes: usize, stream: usize) -> Outcome {
        let owners = (self.memory.owner(from, bytes)?, self.memory.owner(to, bytes)?);
        let captured = get(&mut self.streams, stream)?.capture.is_some();
        match owners {
            // A driver may take pageable memory along in a graph, or not: nobody should find out.
            (Owner::Pageable, _) | (_, Owner::Pageable) if captured => {
                self.uncaptured()?;
                Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            }
            (_, Owner::Pageable) => {
                self.synchronize(stream)?;
                // SAFETY: the source is allocated or the caller's own, the target is the caller's promise.
                self.memory.open(|| unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) });
                Ok(())
            }
            (Owner::Pageable, _) => {
                // SAFETY: the caller's promise.
                let now = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                self.enqueue(stream, Work::Upload { from: now.into(), to })
            }
            _ => self.enqueue(stream, Work::Copy { from, to, bytes }),
        }
    }

    pub fn set(&mut self, at: usize, byte: u8, bytes: usize, stream: usize) -> Outcome {
        if self.memory.owner(at, bytes)? == Owner::Pageable {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        self.enqueue(stream, Work::Set { at, byte, bytes })
    }

    pub fn is_capturing(&mut self, stream: usize) -> Outcome<CaptureStatus> {
        let any = self.streams.values().any(|s| s.capture.is_some() && s.blocking);
        match &get(&mut self.streams, stream)?.capture {
            None if stream == DEFAULT_STREAM && any => Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT),
            None => Ok(CaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
            Some(Capture { invalid: false, .. }) => Ok(CaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE),
            Some(_) => Ok(CaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED),
        }
    }

    pub fn begin_capture(&mut self, stream: usize) -> Outcome {
        if stream == DEFAULT_STREAM {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let of = get(&mut self.streams, stream)?;
        if of.capture.is_some() {
            return Err(CUresult::CUDA_ERROR_ILLEGAL_STATE);
        }
        of.capture = Some(Capture { thread: std::thread::current().id(), work: Vec::new(), invalid: false });
        Ok(())
    }

    pub fn end_capture(&mut self, stream: usize) -> Outcome<usize> {
        let of = get(&mut self.streams, stream)?;
        let thread = of.capture.as_ref().ok_or(CUresult::CUDA_ERROR_ILLEGAL_STATE)?.thread;
        if thread != std::thread::current().id() {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        match of.capture.take() {
            Some(Capture { work, invalid: false, .. }) => {
                let graph = self.handle();
                self.graphs.insert(graph, work);
                Ok(graph)
            }
            _ => Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
        }
    }

    pub fn record(&mut self, event: usize, stream: usize) -> Outcome {
        let passed = Passed::default();
        *get(&mut self.events, event)? = Some(Rc::clone(&passed));
        self.enqueue(stream, Work::Record(passed))
    }

    /// Milliseconds between two events that have passed.
    pub fn elapsed(&mut self, start: usize, end: usize) -> Outcome<f32> {
        let mut passed = |event| -> Outcome<_> {
            let recorded = get(&mut self.events, event)?.as_ref().ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
            recorded.get().ok_or(CUresult::CUDA_ERROR_NOT_READY)
        };
        let (start, end) = (passed(start)?, passed(end)?);
        Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
    }

    /// Ends the context, with all that is of it.
    pub fn release(&mut self) -> Outcome {
        self.retained = self.retained.checked_sub(1).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)?;
        if self.retained > 0 {
            return Ok(());
        }
        // A context that has failed could not free them.
        let left = [
            (self.memory.allocations(), "allocations"),
            (self.streams.len() - 1, "streams"),
            (self.graphs.len() + self.executables.len(), "graphs"),
            (self.events.len(), "events"),
        ];
        for (count, what) in left.into_iter().filter(|(count, _)| *count > 0 && self.failed.is_none()) {
            eprintln!("emulated driver: the context ends before {count} {what} of it");
        }
        let handles = self.handles;
        *self = Self { handles, ..Self::new() };
        Ok(())
    }
}
