//! What benches measure machines by does all of its work: every word is read as often as it should be, every product added.

use kvlar::abi::KvlarConformance;
use kvlar_reference::testing::Rng;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(loads_read_every_word, bulk_copies_read_every_word, products_are_added_up);

fn launch(
    lab: &Lab,
    name: &'static str,
    [grid, block]: [u32; 2],
    input: &[u32],
    out_words: usize,
    [count, arg]: [u32; 2],
) -> Option<Vec<u32>> {
    if !lab.runs_kernels() {
        return None;
    }
    let (from, out) = (lab.upload(input), lab.poisoned(4 * out_words));
    let params = KvlarConformance { in_: from.address(), out: out.address(), count, arg };
    // SAFETY: the kernels touch what their headers say, which is what the buffers hold.
    unsafe { lab.stream.enqueue_entry(name, grid, block, &params) }.expect(name);
    Some(lab.download(&out))
}

fn sum(words: &[u32]) -> u32 {
    words.iter().copied().fold(0, u32::wrapping_add)
}

/// Shares of `chunks` chunks for each CTA, read `rounds` times.
fn reads(lab: &Lab, name: &'static str, block: u32, cases: &[(u32, usize, u32)]) {
    for &(ctas, chunks, rounds) in cases {
        let mut rng = Rng::new(chunks as u64);
        let input: Vec<u32> = (0..4 * chunks).map(|_| rng.bits() as u32).collect();
        let Some(sums) = launch(lab, name, [ctas, block], &input, ctas as usize, [chunks as u32, rounds]) else { return };
        assert_eq!(sum(&sums), sum(&input).wrapping_mul(rounds), "{ctas} CTAs, {chunks} chunks, {rounds} rounds");
    }
}

pub fn loads_read_every_word(lab: &Lab) {
    // Less than a load a thread, some, and all that may be in flight with some left over.
    reads(lab, "kvlar_ceiling_loads", 512, &[(1, 1, 1), (2, 700, 3), (1, 8 * 512, 1), (2, 9 * 1024 + 77, 2)]);
}

pub fn bulk_copies_read_every_word(lab: &Lab) {
    if lab.device.info().compute_capability.is_some_and(|c| c.0 < 9) {
        return eprintln!("skipped: bulk copies need sm_90");
    }
    // A stage, more CTAs than stages, and more stages than a CTA holds.
    reads(lab, "kvlar_ceiling_bulk_copies", 256, &[(1, 512, 1), (3, 1024, 2), (2, 13 * 512, 3)]);
}

pub fn products_are_added_up(lab: &Lab) {
    let one = |name, grid, block, words: &[u32], out, count, arg| launch(lab, name, [grid, block], words, out, [count, arg]);
    for (arg, product) in [(0, 0), (1, 1), (2, 4)] {
        let mut rng = Rng::new(u64::from(arg) + 1);
        // Small whole numbers, whose sums are exact in any order.
        let small = |rng: &mut Rng| match arg {
            0 => half::bf16::from_f32((rng.below(5) as f32) - 2.0).to_bits(),
            1 => half::f16::from_f32((rng.below(5) as f32) - 2.0).to_bits(),
            _ => rng.bits() as u16 & 0x0707,
        };
        let mut words: Vec<u32> = (0..6 * 32).map(|_| u32::from(small(&mut rng)) | u32::from(small(&mut rng)) << 16).collect();
        let (grid, rounds) = (2, 3);
        let Some(sums) = one("kvlar_ceiling_products", grid, 256, &words, 32 * grid as usize, rounds, arg) else { return };
        // The product itself, onto nothing.
        words.extend([0; 4 * 32]);
        let Some(d) = one("kvlar_conformance_mma", 1, 32, &words, 4 * 32, 0, product) else { return };
        for (i, &bits) in sums.iter().enumerate() {
            let d = if arg < 2 { f32::from_bits(d[i % 32]) } else { d[i % 32] as i32 as f32 };
            assert_eq!(f32::from_bits(bits), d * (8 * 8 * rounds) as f32, "type {arg}, lane {}", i % 32);
        }
    }
}
