//! Devices that stores are tried on.

use kvlar::{Device, SimtOptions};
use std::sync::OnceLock;

/// Those that run kernels here: the emulation, and a GPU where there is one, which `KVLAR_REQUIRE_GPU` makes a must.
pub fn with_kernels() -> Vec<Device> {
    static GPU: OnceLock<kvlar::Result<Device>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| Device::cuda(0));
    assert!(gpu.is_ok() || std::env::var_os("KVLAR_REQUIRE_GPU").is_none(), "KVLAR_REQUIRE_GPU is set: {gpu:?}");
    let emulation = Device::simt(SimtOptions { seed: 1, ..SimtOptions::default() });
    emulation.ok().into_iter().chain(gpu.clone().ok()).collect()
}

/// And the reference, first.
pub fn all() -> Vec<Device> {
    std::iter::once(Device::reference()).chain(with_kernels()).collect()
}
