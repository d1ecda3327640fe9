//! Which kernel serves what, and that all of them are reached.

use super::ScanShape;
use super::kernel::{Kernel, Way};
use crate::{Codec, Device, DeviceInfo, Dtype, Format};

fn kernel(heads: (usize, usize), dim: usize, keys: impl Into<Format>) -> Kernel {
    let s = ScanShape::new(Dtype::Bf16, 1, heads, dim, keys, 64);
    Kernel::of(&s, Device::reference().info()).unwrap()
}

#[test]
fn every_kernel_of_the_build_is_reachable_and_exists() {
    let rotated = Format { hadamard: true, ..Codec::Bf16.into() };
    let mut known = [
        kernel((8, 1), 64, Codec::Int4),
        kernel((9, 1), 64, Codec::Int4),
        kernel((8, 1), 128, Codec::Bf16),
        kernel((9, 1), 128, Codec::Fp8),
        kernel((9, 1), 256, Codec::Int2),
        kernel((1, 1), 128, Format::pq(8, 256)),
        kernel((1, 1), 128, rotated),
    ]
    .map(|k| k.entry)
    .to_vec();
    let mut built: Vec<_> = kvlar_kernels::ENTRIES.iter().filter(|e| e.family == "scan").map(|e| e.name).collect();
    known.sort_unstable();
    built.sort_unstable();
    assert_eq!(built, known);
}

/// What a lookup reads decides: 4 B a head, or 2 B a dimension.
#[test]
fn codebooks_are_read_the_cheaper_way() {
    let way = |group, width| kernel((group, 1), 128, Format::pq(width, 256)).way;
    assert_eq!([way(1, 2), way(1, 4), way(2, 4), way(2, 8)], [Way::Tiles(128), Way::Tables(1), Way::Tiles(128), Way::Tables(2)]);
    assert_eq!(
        [way(3, 8), way(3, 16), way(4, 16), way(8, 16)],
        [Way::Tiles(128), Way::Tables(4), Way::Tables(4), Way::Tiles(128)]
    );
    // Sub-vectors that are no fragments, and tables beyond shared memory.
    assert_eq!(kernel((8, 1), 96, Format::pq(6, 256)).way, Way::Tables(8));
    assert_eq!(kernel((8, 1), 96, Format::pq(3, 256)).way, Way::Decoded);
}

#[test]
fn kernels_fit_devices_with_little_shared_memory() {
    let info = DeviceInfo { shared_per_sm: 100 << 10, shared_per_block: 99 << 10, ..Device::reference().info().clone() };
    for dim in [64, 128, 256] {
        for keys in Codec::ALL.map(Format::from).into_iter().chain([2, 4, 8, 16].map(|w| Format::pq(w, 256))) {
            for histogram in [false, true] {
                let s = ScanShape { histogram, ..ScanShape::new(Dtype::Bf16, 1, (8, 2), dim, keys, 64) };
                let kernel = Kernel::of(&s, &info).unwrap();
                assert!(kernel.shared.bytes < 98 << 10, "{dim} {keys:?}: {kernel:?}");
                assert!(kernel.stage_bytes.is_multiple_of(16) && kernel.shared.tables.is_multiple_of(16), "{kernel:?}");
            }
        }
    }
}
