//! What the suites share: devices to run on, poisoned buffers of exact size, random cases.
//!
//! A suite is a function of a [`Lab`]; [`on_every_device!`] makes tests of it on the reference backend, on the emulation
//! under several thread schedules, and on a GPU where there is one. `KVLAR_REQUIRE_GPU=1` turns a missing GPU into a
//! failure; `KVLAR_SIMT_SEEDS` is the number of schedules (3); `KVLAR_SIMT_LIBRARY` names another build of the emulation.

#[allow(missing_docs)]
pub mod append;
#[allow(missing_docs)]
pub mod append_groups;
#[allow(missing_docs)]
pub mod attend;
#[allow(missing_docs)]
pub mod attend_cut;
#[allow(missing_docs)]
pub mod budget;
#[allow(missing_docs)]
pub mod compact;
pub mod conformance;
pub mod emulation;
#[allow(missing_docs)]
pub mod encode;
#[allow(missing_docs)]
pub mod heads;
#[allow(missing_docs)]
pub mod latents;
#[allow(missing_docs)]
pub mod lowrank;
#[allow(missing_docs)]
pub mod pages;
#[allow(missing_docs)]
pub mod scan;
#[allow(missing_docs)]
pub mod scan_select;
#[allow(missing_docs)]
pub mod score;
#[allow(missing_docs)]
pub mod score_gate;
#[allow(missing_docs)]
pub mod score_keys;
#[allow(missing_docs)]
pub mod select;
#[allow(missing_docs)]
pub mod topp;

use kvlar::{Backend, Buffer, Device, Dtype, Error, SimtOptions, Stream, Workspace, WorkspaceSize};
use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Debug;
use std::rc::Rc;
use std::sync::OnceLock;

/// A device and a stream on it.
#[derive(Debug)]
pub struct Lab {
    /// The device.
    pub device: Device,
    /// Its stream.
    pub stream: Stream,
}

impl Lab {
    /// A new stream on `device`.
    pub fn new(device: Device) -> Self {
        let stream = device.stream().expect("a stream");
        Self { device, stream }
    }

    /// The reference backend.
    pub fn reference() -> Self {
        Self::new(Device::reference())
    }

    /// One for each thread schedule of the emulation; none (said so) in a build without it.
    pub fn emulated() -> Vec<Self> {
        let seeds = std::env::var("KVLAR_SIMT_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3u64);
        // One of them pretends to have the shared memory of sm_86, sm_89 and sm_120.
        let device = |seed| {
            let shared_per_sm = if seed == 1 { 100 << 10 } else { SimtOptions::default().shared_per_sm };
            let options = SimtOptions { seed, workers: 1, sm_count: 3, shared_per_sm };
            match emulation::named() {
                // SAFETY: a build of the same sources touches what the linked one does.
                Some(named) => Ok(unsafe { Device::simt_through(options, named) }),
                None => Device::simt(options),
            }
        };
        if let Err(e) = device(0) {
            eprintln!("skipped: {e}");
            return Vec::new();
        }
        (0..seeds).map(|seed| Self::new(device(seed).expect("the emulation"))).collect()
    }

    /// The GPU, or `None` (said so); a failure where `KVLAR_REQUIRE_GPU` is set.
    pub fn gpu_or_skip() -> Option<Self> {
        static GPU: OnceLock<Result<Device, Error>> = OnceLock::new();
        match GPU.get_or_init(|| Device::cuda(0)) {
            Ok(device) => Some(Self::new(device.clone())),
            Err(e) => {
                assert!(std::env::var_os("KVLAR_REQUIRE_GPU").is_none(), "KVLAR_REQUIRE_GPU is set: {e}");
                eprintln!("skipped: {e}");
                None
            }
        }
    }

    /// Whether results are those of kernels, rather than of the reference.
    pub fn runs_kernels(&self) -> bool {
        self.device.backend() != Backend::Reference
    }

    /// A buffer of exactly these bytes.
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = self.device.alloc(bytes.len()).expect("memory");
        self.stream.upload(&mut buffer, 0, bytes).expect("upload");
        buffer
    }

    /// Values rounded to a type.
    pub fn upload_as(&self, values: &[f32], dtype: Dtype) -> Buffer {
        self.upload(&bytes_as(values, dtype))
    }

    /// A buffer in which every value of every float type is NaN.
    pub fn poisoned(&self, bytes: usize) -> Buffer {
        self.upload(&vec![0xffu8; bytes])
    }

    /// Everything in a buffer.
    pub fn download<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Vec<T> {
        let mut bytes = vec![0u8; buffer.len()];
        self.stream.download(buffer, 0, &mut bytes).expect("download");
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    /// The counters of a workspace of a plan: zero before and after every launch.
    pub fn counters(&self, workspace: &Workspace, size: WorkspaceSize) -> Vec<u32> {
        // Behind the status word, which has 256 bytes to itself.
        self.download::<u32>(workspace.memory())[64..][..size.zeroed / 4].to_vec()
    }

    /// Everything in a buffer of a float type.
    pub fn download_as(&self, buffer: &Buffer, dtype: Dtype) -> Vec<f32> {
        match dtype {
            Dtype::F32 => self.download(buffer),
            Dtype::Bf16 => self.download::<u16>(buffer).into_iter().map(|x| half::bf16::from_bits(x).to_f32()).collect(),
            Dtype::F16 => self.download::<u16>(buffer).into_iter().map(|x| half::f16::from_bits(x).to_f32()).collect(),
        }
    }
}

/// Values rounded to a type, as its bytes.
pub fn bytes_as(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// The reference's name of a type.
pub fn reference_dtype(dtype: Dtype) -> kvlar_reference::Dtype {
    match dtype {
        Dtype::Bf16 => kvlar_reference::Dtype::Bf16,
        Dtype::F16 => kvlar_reference::Dtype::F16,
        Dtype::F32 => kvlar_reference::Dtype::F32,
    }
}

/// What `make` gives for a case, kept for as long as the test runs: under another thread schedule the same case has the same
/// data and the same expectation. All that decides them is in the case, and so in its text.
pub fn once_a_case<T: 'static>(case: &impl Debug, make: impl FnOnce() -> T) -> Rc<T> {
    thread_local! {
        static MADE: RefCell<HashMap<(TypeId, String), Rc<dyn Any>>> = RefCell::default();
    }
    let key = (TypeId::of::<T>(), format!("{case:?}"));
    let kept = MADE.with_borrow(|made| made.get(&key).cloned());
    if let Some(kept) = kept.and_then(|x| x.downcast().ok()) {
        return kept;
    }
    let made = Rc::new(make());
    MADE.with_borrow_mut(|all| all.insert(key, made.clone()));
    made
}

/// Asserts that an error's text names all of these.
#[track_caller]
pub fn says(e: &Error, words: &[&str]) {
    let text = e.to_string();
    for w in words {
        assert!(text.contains(w), "{text:?} does not say {w:?}");
    }
}

/// Tests of suites (functions of `&Lab`) on every device.
#[macro_export]
macro_rules! on_every_device {
    ($($suite:ident),+ $(,)?) => {
        mod reference {
            $(#[test] fn $suite() { super::$suite(&$crate::Lab::reference()) })+
        }
        mod simt {
            $(#[test] fn $suite() { $crate::Lab::emulated().iter().for_each(super::$suite) })+
        }
        mod cuda {
            $(#[test] fn $suite() { $crate::Lab::gpu_or_skip().iter().for_each(super::$suite) })+
        }
    };
}
