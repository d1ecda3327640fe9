//! Devices that caches are tried on, and how exact their results are.

use kvlar::{Backend, Codec, Device, SimtOptions};
use kvlar_reference::Dtype;
use kvlar_reference::tolerance::Tolerance;
use std::sync::OnceLock;

/// The emulated kernels, or `None` (said so) in a build without them.
pub fn emulation() -> Option<Device> {
    let device = Device::simt(SimtOptions { seed: 1, workers: 1, sm_count: 3, ..SimtOptions::default() });
    device.inspect_err(|e| eprintln!("skipped: {e}")).ok()
}

/// The GPU, or `None` (said so); a failure where `KVLAR_REQUIRE_GPU` is set.
pub fn gpu() -> Option<Device> {
    static GPU: OnceLock<kvlar::Result<Device>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| Device::cuda(0));
    assert!(gpu.is_ok() || std::env::var_os("KVLAR_REQUIRE_GPU").is_none(), "KVLAR_REQUIRE_GPU is set: {gpu:?}");
    gpu.as_ref().inspect_err(|e| eprintln!("skipped: {e}")).ok().cloned()
}

/// Of attention over dense rows or codes.
pub fn tolerance(device: &Device, codec: Codec) -> Tolerance {
    match device.backend() {
        Backend::Reference => Tolerance::merge(),
        _ => Tolerance::attend(Dtype::F16, codec.reference(), 160, 4.0),
    }
}

/// Of attention over latents.
pub fn tolerance_of_latents(device: &Device) -> Tolerance {
    match device.backend() {
        Backend::Reference => Tolerance::merge(),
        _ => Tolerance::attend_lowrank(Dtype::F16, 100, 4.0, 1.0),
    }
}

/// Tests of functions of a device: on the emulated kernels, and on a GPU where there is one.
macro_rules! on_kernels {
    ($($test:ident),+ $(,)?) => {
        mod simt {
            $(#[test] fn $test() { $crate::devices::emulation().iter().for_each(super::$test) })+
        }
        mod cuda {
            $(#[test] fn $test() { $crate::devices::gpu().iter().for_each(super::$test) })+
        }
    };
}

/// Likewise, and on the reference.
macro_rules! on_every_device {
    ($($test:ident),+ $(,)?) => {
        mod reference {
            $(#[test] fn $test() { super::$test(&kvlar::Device::reference()) })+
        }
        $crate::devices::on_kernels!($($test),+);
    };
}

pub(crate) use {on_every_device, on_kernels};
