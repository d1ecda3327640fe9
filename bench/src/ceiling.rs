//! What the device's memory can do, measured in the same process as the ops.

use crate::Rig;
use crate::report::percentile;
use std::time::{Duration, Instant};

/// A device-to-device copy far larger than any cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyCeiling {
    /// Read plus written by one copy.
    pub bytes: usize,
    /// Median of the copies, seconds.
    pub seconds: f64,
}

/// Clocks and power settle within this.
const WARM_UP: Duration = Duration::from_secs(2);
const COPIES: usize = 30;
const LARGEST: usize = 2 << 30;

impl CopyCeiling {
    /// Times copies.
    pub fn measure(rig: &Rig) -> Self {
        let half = LARGEST.min(rig.budget()) / 2;
        let block = rig.normals(kvlar::Dtype::F32, 1 << 20).expect("memory for a block");
        let mut host = vec![0u8; block.len()];
        rig.stream.download(&block, 0, &mut host).expect("a download");
        let mut buffer = rig.repeated(&host, 2 * half).expect("memory for the copy ceiling");
        let mut copy = || rig.time(|| rig.stream.copy_within(&mut buffer, 0..half, half)).expect("a copy").as_secs_f64();
        let start = Instant::now();
        while start.elapsed() < WARM_UP {
            copy();
        }
        let mut seconds: Vec<f64> = (0..COPIES).map(|_| copy()).collect();
        Self { bytes: 2 * half, seconds: percentile(&mut seconds, 0.5) }
    }

    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}
