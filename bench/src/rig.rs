//! Where cases run.

use crate::gpu;
use kvlar::{Backend, Buffer, Device, Dtype, Result, SimtOptions, Stream};
use kvlar_kernels::simt::DRIVER_DEVICE;
use kvlar_reference::testing::Rng;
use kvlar_tests::emulation;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// The L2 of an H200: assumed where the device does not say more.
const L2_BYTES: usize = 60 << 20;
/// Memory that a case may take in emulation.
const EMULATED_BYTES: usize = 1 << 30;

/// SMs of an H200: what the emulation pretends where a GPU's shapes are asked for.
const SMS: u32 = 132;

const SEED: u64 = 1;

fn asks_for_full_shapes() -> bool {
    std::env::var("KVLAR_BENCH_SHAPES").as_deref() == Ok("full")
}

/// The linked one, or the one that `KVLAR_SIMT_LIBRARY` names.
fn emulated_device() -> Result<Device> {
    let mut options = SimtOptions::default();
    if asks_for_full_shapes() {
        options.sm_count = SMS;
    }
    match emulation::named() {
        // SAFETY: a build of the same sources touches what the linked one does.
        Some(named) => Ok(unsafe { Device::simt_through(options, named) }),
        None => Device::simt(options),
    }
}

fn is_emulated(device: &Device) -> bool {
    device.backend() != Backend::Cuda || device.info().name == DRIVER_DEVICE
}

/// A device, a stream on it, and a clock.
pub struct Rig {
    // Before the device: events end before their context does.
    #[cfg(feature = "cuda")]
    events: Option<gpu::Events>,
    /// Where everything runs.
    pub stream: Stream,
    /// The GPU, or the emulation.
    pub device: Device,
    rng: RefCell<Rng>,
}

impl Rig {
    /// GPU 0, else the emulation (said so), else `None` (said so).
    ///
    /// # Panics
    /// Without a GPU where `KVLAR_REQUIRE_GPU` is set.
    pub fn open() -> Option<Self> {
        let device = match Device::cuda(0) {
            Ok(device) => device,
            Err(e) => {
                assert!(std::env::var_os("KVLAR_REQUIRE_GPU").is_none(), "KVLAR_REQUIRE_GPU is set: {e}");
                eprintln!("no GPU: {e}");
                match emulated_device() {
                    Ok(device) => device,
                    Err(e) => {
                        eprintln!("skipped, for there is no emulation either: {e}");
                        return None;
                    }
                }
            }
        };
        let stream = device.stream().expect("a stream");
        if is_emulated(&device) {
            eprintln!("shapes run in emulation: the times below are emulated, not a speed");
        }
        Some(Self {
            #[cfg(feature = "cuda")]
            events: if device.backend() == Backend::Cuda { gpu::Events::new() } else { None },
            stream,
            device,
            rng: RefCell::new(Rng::new(SEED)),
        })
    }

    /// Random numbers as in a new rig: what an op is given does not depend on the ops before it.
    pub(crate) fn restart(&self) {
        *self.rng.borrow_mut() = Rng::new(SEED);
    }

    /// Whether times say nothing.
    pub fn is_emulated(&self) -> bool {
        is_emulated(&self.device)
    }

    /// Whether cases should be tiny: emulated ones are, unless `KVLAR_BENCH_SHAPES=full` asks for those of a GPU.
    pub fn wants_tiny_shapes(&self) -> bool {
        self.is_emulated() && !asks_for_full_shapes()
    }

    /// Bytes of the last cache before memory.
    pub(crate) fn l2_bytes(&self) -> usize {
        if self.is_emulated() { 0 } else { gpu::l2_bytes().unwrap_or(0).max(L2_BYTES) }
    }

    /// Memory that a case may take.
    pub(crate) fn budget(&self) -> usize {
        let given = std::env::var("KVLAR_BENCH_BYTES").ok().and_then(|s| s.parse().ok());
        given.or_else(|| if self.is_emulated() { None } else { gpu::free_memory().map(|n| n / 2) }).unwrap_or(EMULATED_BYTES)
    }

    /// How long the stream takes for what `work` enqueues; waits for it. By events on a GPU.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.stream.synchronize()?;
        #[cfg(feature = "cuda")]
        if let Some(events) = &self.events {
            return events.time(&self.stream, work);
        }
        let start = Instant::now();
        work()?;
        self.stream.synchronize()?;
        Ok(start.elapsed())
    }

    /// What [`Rig::time`] reads.
    pub(crate) fn clock(&self) -> &'static str {
        #[cfg(feature = "cuda")]
        if self.events.is_some() {
            return "CUDA events";
        }
        "wall clock"
    }

    /// Calls `f` with the rig's random numbers.
    pub fn with_rng<R>(&self, f: impl FnOnce(&mut Rng) -> R) -> R {
        f(&mut self.rng.borrow_mut())
    }

    /// A buffer of exactly these values.
    ///
    /// # Errors
    /// Those of allocation and copy.
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = self.device.alloc(bytes.len())?;
        self.stream.upload(&mut buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// A buffer in which every float is NaN.
    ///
    /// # Errors
    /// As for [`Rig::upload`].
    pub fn poisoned(&self, bytes: usize) -> Result<Buffer> {
        let mut buffer = self.device.alloc(bytes)?;
        self.stream.fill(&mut buffer, 0..bytes, 0xff)?;
        Ok(buffer)
    }

    /// A buffer of `block` again and again.
    ///
    /// # Errors
    /// As for [`Rig::upload`].
    pub fn repeated(&self, block: &[u8], bytes: usize) -> Result<Buffer> {
        let mut buffer = self.device.alloc(bytes)?;
        let mut filled = block.len().min(bytes);
        self.stream.upload(&mut buffer, 0, &block[..filled])?;
        while filled < bytes {
            // Doubling, by the device: what is there is whole blocks.
            let more = filled.min(bytes - filled);
            self.stream.copy_within(&mut buffer, 0..more, filled)?;
            filled += more;
        }
        Ok(buffer)
    }

    /// A copy of a buffer in memory of the host.
    ///
    /// # Errors
    /// As for [`Rig::upload`].
    pub fn on_host(&self, of: &Buffer) -> Result<Buffer> {
        let mut host = self.device.alloc_host(of.len())?;
        self.stream.copy(of, 0..of.len(), &mut host, 0)?;
        self.stream.synchronize()?; // `of` may end before the copy does
        Ok(host)
    }

    /// Random normals of a type.
    ///
    /// # Errors
    /// As for [`Rig::upload`].
    pub fn normals(&self, dtype: Dtype, count: usize) -> Result<Buffer> {
        self.scaled_normals(dtype, count, 1.0)
    }

    /// Random normals of standard deviation `scale`.
    ///
    /// # Errors
    /// As for [`Rig::upload`].
    pub fn scaled_normals(&self, dtype: Dtype, count: usize, scale: f32) -> Result<Buffer> {
        /// Enough to look random; a multiple of every row.
        const DISTINCT: usize = 1 << 20;
        let values = self.with_rng(|rng| rng.normals(count.min(DISTINCT), scale));
        let reference = match dtype {
            Dtype::Bf16 => kvlar_reference::Codec::Bf16,
            Dtype::F16 => kvlar_reference::Codec::F16,
            Dtype::F32 => return self.repeated(bytemuck::cast_slice(&values), count * 4),
        };
        let coded = kvlar_reference::encode_row(&values, reference, values.len().max(1)).expect("one group");
        self.repeated(&coded.codes[..2 * values.len()], count * 2)
    }

    /// That the floats of an f32 buffer are finite.
    ///
    /// # Panics
    /// If one is not.
    pub fn expect_finite(&self, what: &str, buffer: &Buffer) {
        self.expect_all(what, buffer, 4, |x| bytemuck::pod_read_unaligned::<f32>(x).is_finite());
    }

    /// That the floats of a bf16 buffer are finite.
    ///
    /// # Panics
    /// If one is not.
    pub fn expect_finite_bf16(&self, what: &str, buffer: &Buffer) {
        const EXPONENT: u16 = 0x7f80; // all ones in NaN and the infinities
        self.expect_all(what, buffer, 2, |x| bytemuck::pod_read_unaligned::<u16>(x) & EXPONENT != EXPONENT);
    }

    fn expect_all(&self, what: &str, buffer: &Buffer, size: usize, finite: impl Fn(&[u8]) -> bool) {
        let mut bytes = vec![0u8; buffer.len()];
        self.stream.download(buffer, 0, &mut bytes).expect("a download");
        assert!(bytes.chunks_exact(size).all(finite), "{what}: a result is not finite; run the test suites");
    }
}
