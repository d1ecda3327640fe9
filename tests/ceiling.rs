//! What benches measure machines by does all of its work: every word is read as often as it should be, every product added.

use kvlar::abi::KvlarConformance;
use kvlar_reference::testing::Rng;
use kvlar_tests::conformance::launch;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    loads_read_every_word,
    rows_are_loaded_once,
    bulk_copies_read_every_word,
    rows_are_copied_once,
    memory_of_the_host_is_read,
    products_are_added_up
);

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

/// Rows of some chunks each, in an order of the kernel's own.
fn rows(lab: &Lab, name: &'static str, block: u32, cases: &[(u32, usize, u32)]) {
    for &(ctas, count, chunks) in cases {
        let mut rng = Rng::new(count as u64);
        let input: Vec<u32> = (0..4 * count * chunks as usize).map(|_| rng.bits() as u32).collect();
        let Some(sums) = launch(lab, name, [ctas, block], &input, ctas as usize, [count as u32, chunks]) else { return };
        assert_eq!(sum(&sums), sum(&input), "{ctas} CTAs, {count} rows of {chunks} chunks");
    }
}

pub fn rows_are_loaded_once(lab: &Lab) {
    // One, fewer than threads, and all that may be in flight with some left over.
    rows(lab, "kvlar_ceiling_row_loads", 512, &[(1, 1, 1), (3, 64, 4), (1, 512, 16), (3, 1024, 8), (3, 256, 128)]);
}

fn has_bulk_copies(lab: &Lab) -> bool {
    let has = lab.device.info().compute_capability.is_none_or(|c| c.0 >= 9);
    if !has {
        eprintln!("skipped: bulk copies need sm_90");
    }
    has
}

pub fn rows_are_copied_once(lab: &Lab) {
    if has_bulk_copies(lab) {
        // A row a stage, many rows a stage, and more stages than a CTA holds.
        rows(lab, "kvlar_ceiling_row_copies", 256, &[(1, 1, 512), (3, 256, 4), (2, 128, 64), (1, 512, 16)]);
    }
}

/// Over the link, where there is one.
fn memory_of_the_host_is_read(lab: &Lab) {
    if !lab.runs_kernels() {
        return;
    }
    let words: Vec<u32> = (0..4 * 512).map(|i| i * 0x9e37).collect();
    let mut host = lab.device.alloc_host(4 * words.len()).expect("memory of the host");
    assert!(host.is_on_host());
    lab.stream.upload(&mut host, 0, bytemuck::cast_slice(&words)).expect("an upload");
    let mut kernels = vec![("kvlar_ceiling_loads", 512, [512, 1]), ("kvlar_ceiling_row_loads", 512, [128, 4])];
    if has_bulk_copies(lab) {
        kernels.extend([("kvlar_ceiling_bulk_copies", 256, [512, 1]), ("kvlar_ceiling_row_copies", 256, [32, 16])]);
    }
    for (name, block, [count, arg]) in kernels {
        let mut out = lab.device.alloc_host(4).expect("memory of the host");
        lab.stream.fill(&mut out, 0..4, 0xff).expect("a fill");
        let params = KvlarConformance { in_: host.address(), out: out.address(), count, arg };
        // SAFETY: the buffers hold the chunks, and a sum.
        unsafe { lab.stream.enqueue_entry(name, 1, block, &params) }.expect(name);
        assert_eq!(lab.download::<u32>(&out), [sum(&words)], "{name}");
    }
}

pub fn bulk_copies_read_every_word(lab: &Lab) {
    if !has_bulk_copies(lab) {
        return;
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
