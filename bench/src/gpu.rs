//! What only a GPU has: events, its memory, its driver.

/// A pair of events that time work on a stream of the context that was current when they were made.
#[cfg(feature = "cuda")]
pub(crate) struct Events {
    start: cudarc::driver::sys::CUevent,
    end: cudarc::driver::sys::CUevent,
}

#[cfg(feature = "cuda")]
mod with_cuda {
    use super::Events;
    use cudarc::driver::result::{DriverError, device, event, mem_get_info};
    use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags, cuDriverGetVersion};
    use kvlar::{Result, Stream};
    use std::time::Duration;

    impl Events {
        /// `None` where the driver has none to give.
        pub fn new() -> Option<Self> {
            let make = || event::create(CUevent_flags::CU_EVENT_DEFAULT).ok();
            Some(Self { start: make()?, end: make()? })
        }

        /// How long the stream took for what `work` enqueued; waits for it.
        pub fn time(&self, stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
            let ok = |result: std::result::Result<(), DriverError>| result.expect("a CUDA event on the bench's stream");
            // SAFETY: the event and the stream are alive and of one context.
            ok(unsafe { event::record(self.start, stream.raw().cast()) });
            work()?;
            // SAFETY: as above.
            ok(unsafe { event::record(self.end, stream.raw().cast()) });
            stream.synchronize()?;
            // SAFETY: both were recorded on one stream, which has run past them.
            let milliseconds = unsafe { event::elapsed(self.start, self.end) }.expect("the time between two events");
            Ok(Duration::from_secs_f64(f64::from(milliseconds) * 1e-3))
        }
    }

    impl Drop for Events {
        fn drop(&mut self) {
            for e in [self.start, self.end] {
                // SAFETY: made in `new`, destroyed once.
                let _ = unsafe { event::destroy(e) };
            }
        }
    }

    /// Bytes that can still be allocated.
    pub fn free_memory() -> Option<usize> {
        mem_get_info().ok().map(|(free, _)| free)
    }

    /// Of device 0.
    pub fn l2_bytes() -> Option<usize> {
        let first = device::get(0).ok()?;
        // SAFETY: the device exists.
        let size = unsafe { device::get_attribute(first, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) };
        size.ok().and_then(|n| usize::try_from(n).ok())
    }

    /// The CUDA version that the driver supports, as `CUDA 13.0`.
    pub fn cuda_version() -> Option<String> {
        let mut version = 0;
        // SAFETY: the pointer is to a local.
        unsafe { cuDriverGetVersion(&mut version) }.result().ok()?;
        Some(format!("CUDA {}.{}", version / 1000, version % 1000 / 10))
    }
}

#[cfg(feature = "cuda")]
pub(crate) use with_cuda::{free_memory, l2_bytes};

#[cfg(not(feature = "cuda"))]
pub(crate) fn free_memory() -> Option<usize> {
    None
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn l2_bytes() -> Option<usize> {
    None
}

/// The kernel driver's version, else the CUDA version that the driver supports. Call it only where a CUDA device opened.
pub fn driver_version() -> Option<String> {
    let number = |word: &&str| word.contains('.') && word.split('.').all(|n| n.parse::<u32>().is_ok());
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let kernel = text.split_whitespace().find(number).map(String::from);
    #[cfg(feature = "cuda")]
    return kernel.or_else(with_cuda::cuda_version);
    #[cfg(not(feature = "cuda"))]
    kernel
}
