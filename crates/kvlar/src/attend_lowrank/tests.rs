use super::tiling::Tiling;
use super::{Latents, LowrankPlan, LowrankShape, LowrankValues, SetsShape};
use crate::{AttendShape, Codec, Device, Dtype, SegmentShape};

#[test]
fn every_kernel_of_the_build_is_reachable_and_exists() {
    let built = kvlar_kernels::ENTRIES.iter().filter(|e| e.family == "attend_lowrank").map(|e| e.name);
    let mut built: Vec<_> = built.filter(|n| *n != "kvlar_attend_lowrank_schedule").collect();
    let mut known = Tiling::names();
    built.sort_unstable();
    known.sort_unstable();
    assert_eq!(built, known);
}

/// Llama-3.1-8B's heads in groups of `size`, on a device with Hopper's shared memory.
fn llama(size: usize, rank: usize) -> LowrankPlan {
    let count = 8 / size;
    let sets = SetsShape { count, largest: size, kv_heads: 8, key_groups: count, value_groups: count, sizes_hash: 0 };
    let rows = SegmentShape::new(Codec::Bf16, 4096);
    let attend = AttendShape::new(Dtype::Bf16, 1, (32, 8), 1, 128, rows);
    let values = LowrankValues::Latent { rank, codec: Codec::Bf16 };
    let shape = LowrankShape::new(attend, 4096, rank, Latents::Dtype, values, sets);
    shape.plan(&Device::reference()).expect("a plan")
}

/// Sixteen columns take more of the shared memory than eight: where that leaves them fewer heads, eight are better.
#[test]
fn tiles_are_no_wider_than_the_heads_that_fit() {
    assert_eq!((llama(2, 64).entry(), llama(2, 64).residency().1), ("kvlar_attend_lowrank_bf16_v128_n8", 2));
    assert_eq!((llama(4, 64).entry(), llama(4, 64).residency().1), ("kvlar_attend_lowrank_bf16_v128_n16", 4));
    let wide = llama(4, 128);
    assert_eq!((wide.entry(), wide.residency()), ("kvlar_attend_lowrank_bf16_v128_n8", (true, 2, 4)));
    assert_eq!(wide.arithmetic(1000).reads, 2);
}
