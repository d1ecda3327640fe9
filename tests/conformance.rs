//! Every primitive of `kernels/device/ptx.cuh` (and the intrinsics that kernels use) against its definition, written
//! down once more in Rust: in emulation, and on a GPU where there is one. Both held to one definition bit for bit, or
//! within the documented error, are held to each other.

use half::{bf16, f16};
use kvlar::Backend;
use kvlar::abi::KvlarConformance;
use kvlar_reference::testing::Rng;
use kvlar_tests::conformance::launch;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    asynchronous_copies,
    groups_of_copies_land_in_order,
    bulk_copies_and_their_barriers,
    matrix_loads,
    transposition,
    tensor_core_products,
    approximate_functions,
    conversions,
    half_arithmetic,
    integer_instructions,
    exact_float_instructions,
    warp_collectives,
    named_barriers,
    the_last_cta_sees_what_all_wrote,
);

fn words(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.bits() as u32).collect()
}

pub fn asynchronous_copies(lab: &Lab) {
    let mut rng = Rng::new(1);
    for (arg, size) in [(16u32, 16u32), (17, 16), (8, 8), (4, 4)] {
        let mut input = words(&mut rng, 128);
        input.extend((0..32).map(|l| if arg == 17 { 16 } else { [size, 0, (size / 2).max(4), 4][l % 4] }));
        let Some(out) = launch(lab, "kvlar_conformance_cp_async", [1, 32], &input, 128, [0, arg]) else { return };
        for (i, &word) in out.iter().enumerate() {
            let (lane, byte) = (i / 4, 4 * (i as u32 % 4));
            let expected = match byte {
                b if b >= size => 0xdead_beef,
                b if b >= input[128 + lane] => 0, // zero-filled
                _ => input[i],
            };
            assert_eq!(word, expected, "size {arg} word {i}");
        }
    }
}

pub fn groups_of_copies_land_in_order(lab: &Lab) {
    let input = words(&mut Rng::new(2), 512);
    let Some(out) = launch(lab, "kvlar_conformance_cp_async_groups", [1, 32], &input, 512, [0, 0]) else { return };
    assert_eq!(out, input);
}

pub fn bulk_copies_and_their_barriers(lab: &Lab) {
    if lab.device.info().compute_capability.is_some_and(|c| c.0 < 9) {
        return eprintln!("skipped: bulk copies need sm_90");
    }
    for (bytes, rounds) in [(16, 1), (256, 2), (1024, 7)] {
        let input = words(&mut Rng::new(bytes), (bytes / 4 * rounds) as usize);
        let Some(out) = launch(lab, "kvlar_conformance_bulk_copy", [1, 64], &input, input.len(), [bytes as u32, rounds as u32])
        else {
            return;
        };
        assert_eq!(out, input, "{bytes} bytes, {rounds} rounds");
    }
}

/// The 16-bit element `c` of a row of four words.
fn element(row: &[u32], c: usize) -> u32 {
    row[c / 2] >> (16 * (c % 2)) & 0xffff
}

pub fn matrix_loads(lab: &Lab) {
    let mut rng = Rng::new(3);
    for (arg, matrices, transposed) in [(0, 1, false), (1, 2, false), (2, 2, true), (3, 4, false), (4, 4, true)] {
        let mut input = words(&mut rng, 128);
        input.extend(rng.permutation(32).iter().map(|&r| r as u32));
        let Some(out) = launch(lab, "kvlar_conformance_ldmatrix", [1, 32], &input, 128, [0, arg]) else { return };
        for (lane, m) in (0..32).flat_map(|l| (0..4).map(move |m| (l, m))) {
            // Lanes 8m..8m+8 name the rows of matrix m; a lane gets elements 2c, 2c + 1 of row g, or of column g.
            let (g, c) = (lane / 4, lane % 4);
            let row = |r: usize| &input[4 * input[128 + 8 * m + r] as usize..][..4];
            let expected = match (m < matrices, transposed) {
                (false, _) => 0,
                (true, false) => row(g)[c],
                (true, true) => element(row(2 * c), g) | element(row(2 * c + 1), g) << 16,
            };
            assert_eq!(out[4 * lane + m], expected, "arg {arg} lane {lane} matrix {m}");
        }
    }
}

pub fn transposition(lab: &Lab) {
    let input = words(&mut Rng::new(4), 32);
    let Some(out) = launch(lab, "kvlar_conformance_movmatrix", [1, 32], &input, 32, [0, 0]) else { return };
    for (lane, &word) in out.iter().enumerate() {
        let (g, c) = (lane / 4, lane % 4);
        let row = |r: usize| &input[4 * r..4 * r + 4];
        assert_eq!(word, element(row(2 * c), g) | element(row(2 * c + 1), g) << 16, "lane {lane}");
    }
}

/// (rows of a, k) where register `i` of a lane holds element `e`; PTX ISA, "Matrix fragments for mma".
fn a_place(lane: usize, i: usize, e: usize, per_word: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i % 2), per_word * (lane % 4) + e + 4 * per_word * (i / 2))
}

pub fn tensor_core_products(lab: &Lab) {
    let mut rng = Rng::new(5);
    // Codes of keys meet tensor cores as subnormal halves, which are to count like others.
    let subnormal = 2f64.powi(-23);
    // (arg, bits an element, k, a is unsigned, what a is multiplied by)
    for (arg, bits, k, unsigned, unit) in [
        (0, 16, 16, false, 1.0),
        (1, 16, 16, false, 1.0),
        (1, 16, 16, false, subnormal),
        (2, 16, 8, false, 1.0),
        (3, 16, 8, false, 1.0),
        (3, 16, 8, false, subnormal),
        (4, 8, 32, false, 1.0),
        (5, 8, 32, true, 1.0),
        (6, 8, 16, false, 1.0),
    ] {
        let per_word = 32 / bits;
        let (mut a, mut b, mut c) = (vec![0f64; 16 * k], vec![0f64; k * 8], vec![0f64; 16 * 8]);
        let small = |rng: &mut Rng| rng.below(33) as f64 - 16.0;
        if bits == 16 {
            // Small integers and halves: every product and sum is exact in any order.
            a.iter_mut().chain(&mut b).for_each(|x| *x = small(&mut rng) / 2.0);
            a.iter_mut().for_each(|x| *x *= unit);
            c.iter_mut().for_each(|x| *x = small(&mut rng) * unit);
        } else {
            a.iter_mut().for_each(|x| *x = rng.below(256) as f64 - if unsigned { 0.0 } else { 128.0 });
            b.iter_mut().for_each(|x| *x = rng.below(256) as f64 - 128.0);
            c.iter_mut().for_each(|x| *x = rng.below(1 << 20) as f64 - 5e5);
        }
        let encode = |x: f64| match arg {
            0 | 2 => u32::from(bf16::from_f64(x).to_bits()),
            1 | 3 => u32::from(f16::from_f64(x).to_bits()),
            _ => (x as i32 as u32) & 0xff,
        };
        let number = |x: f64| if bits == 16 { (x as f32).to_bits() } else { x as i32 as u32 };
        let mut input = vec![0u32; 320];
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            for e in 0..per_word {
                for i in 0..4 {
                    let (row, column) = a_place(lane, i, e, per_word);
                    if column < k {
                        input[32 * i + lane] |= encode(a[row * k + column]) << (bits * e);
                    }
                }
                for i in 0..2 {
                    let row = per_word * t + e + 4 * per_word * i;
                    if row < k {
                        input[128 + 32 * i + lane] |= encode(b[row * 8 + g]) << (bits * e);
                    }
                }
            }
            for i in 0..4 {
                input[192 + 32 * i + lane] = number(c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2]);
            }
        }
        let Some(out) = launch(lab, "kvlar_conformance_mma", [1, 32], &input, 128, [0, arg]) else { return };
        for (lane, i) in (0..32).flat_map(|l| (0..4).map(move |i| (l, i))) {
            let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
            let sum: f64 = (0..k).map(|j| a[row * k + j] * b[j * 8 + column]).sum();
            assert_eq!(out[32 * i + lane], number(sum + c[row * 8 + column]), "shape {arg} row {row} column {column}");
        }
    }
}

/// Runs an elementwise operation on triples of words; two words each.
fn arithmetic(lab: &Lab, arg: u32, input: &[u32]) -> Option<Vec<[u32; 2]>> {
    let count = input.len() / 3;
    let out =
        launch(lab, "kvlar_conformance_arithmetic", [count.div_ceil(64) as u32, 64], input, 2 * count, [count as u32, arg])?;
    Some(out.chunks(2).map(|x| [x[0], x[1]]).collect())
}

fn floats(x: impl Iterator<Item = f32>) -> Vec<u32> {
    x.flat_map(|x| [x.to_bits(), 0, 0]).collect()
}

pub fn approximate_functions(lab: &Lab) {
    let mut rng = Rng::new(6);
    // (operation, definition, inputs, bound of the error: absolute or relative; PTX ISA's, a little more)
    type Function = (u32, fn(f64) -> f64, fn(&mut Rng) -> f32, f64);
    let functions: [Function; 4] = [
        (0, f64::exp2, |r| r.normal() * 20.0, 2.0 * 2f64.powi(-22)),
        (1, f64::log2, |r| (r.normal() * 8.0).exp(), 2.0 * 2f64.powi(-22)),
        (2, f64::recip, |r| r.normal() * 100.0, 2.0 * 2f64.powi(-23)),
        (3, f64::tanh, |r| r.normal() * 3.0, 2f64.powi(-10)),
    ];
    for (arg, f, draw, bound) in functions {
        let x: Vec<f32> = (0..500).map(|_| draw(&mut rng)).filter(|x| x.abs() > 1e-3).collect();
        let Some(out) = arithmetic(lab, arg, &floats(x.iter().copied())) else { return };
        for (x, y) in x.iter().zip(&out) {
            let (actual, expected) = (f64::from(f32::from_bits(y[0])), f(f64::from(*x)));
            let scale = if arg == 1 { expected.abs().max(1.0) } else { expected.abs() };
            assert!((actual - expected).abs() <= bound * scale, "operation {arg} of {x}: {actual} instead of {expected}");
        }
    }
    // Limits that the kernels rely on.
    for (arg, x, expected) in [
        (0, f32::NEG_INFINITY, 0.0),
        (0, -1e30, 0.0),
        (0, 0.0, 1.0),
        (0, 200.0, f32::INFINITY),
        (1, 0.0, f32::NEG_INFINITY),
        (1, 1.0, 0.0),
        (2, f32::INFINITY, 0.0),
        (2, 0.0, f32::INFINITY),
    ] {
        let Some(out) = arithmetic(lab, arg, &floats([x].into_iter())) else { return };
        assert_eq!(f32::from_bits(out[0][0]), expected, "operation {arg} of {x}");
    }
    for arg in 0..2 {
        let Some(out) = arithmetic(lab, arg, &floats([f32::NAN].into_iter())) else { return };
        assert!(f32::from_bits(out[0][0]).is_nan(), "operation {arg} of NaN");
    }
}

pub fn conversions(lab: &Lab) {
    let mut rng = Rng::new(7);
    let mut x: Vec<f32> = (0..300).map(|_| rng.normal() * 10f32.powi(rng.below(12) as i32 - 7)).collect();
    // Ties, the largest, subnormals, zeros, beyond the range, infinities.
    x.extend([
        1.0 + 2f32.powi(-9),
        1.0 + 2f32.powi(-11),
        65504.0,
        65520.0,
        65519.9,
        6e-8,
        3e-8,
        2.98e-8,
        -0.0,
        0.0,
        1e-40,
        3.4e38,
    ]);
    x.extend([f32::INFINITY, f32::NEG_INFINITY]);
    let input: Vec<u32> = x.iter().zip(x.iter().rev()).flat_map(|(a, b)| [a.to_bits(), b.to_bits(), 0]).collect();
    let (Some(as_bf16), Some(as_f16)) = (arithmetic(lab, 4, &input), arithmetic(lab, 5, &input)) else { return };
    for (i, (&low, &high)) in x.iter().zip(x.iter().rev()).enumerate() {
        let pair = |f: fn(f32) -> u16| u32::from(f(low)) | u32::from(f(high)) << 16;
        assert_eq!(as_bf16[i][0], pair(|x| bf16::from_f32(x).to_bits()), "bf16 of {low} and {high}");
        assert_eq!(as_f16[i][0], pair(|x| f16::from_f32(x).to_bits()), "f16 of {low} and {high}");
    }
    let Some(unpacked) = arithmetic(lab, 6, &as_f16.iter().flat_map(|w| [w[0], 0, 0]).collect::<Vec<_>>()) else { return };
    for (packed, two) in as_f16.iter().zip(&unpacked) {
        let halves = [packed[0] as u16, (packed[0] >> 16) as u16];
        assert_eq!(*two, halves.map(|h| f16::from_bits(h).to_f32().to_bits()));
    }
    // fp8 e4m3: nearest even, saturating at 448, 0x7f for NaN.
    let decode = |b: u8| -> f64 {
        let (e, m) = (i32::from(b >> 3 & 15), f64::from(b & 7));
        let value = if e == 0 { m * 2f64.powi(-9) } else { (8.0 + m) * 2f64.powi(e - 10) };
        if b & 0x7f == 0x7f {
            f64::NAN
        } else if b & 0x80 == 0 {
            value
        } else {
            -value
        }
    };
    let Some(fp8) = arithmetic(lab, 15, &floats(x.iter().copied())) else { return };
    for (&x, out) in x.iter().zip(&fp8) {
        let byte = out[0] as u8;
        assert_eq!(f64::from(f32::from_bits(out[1])), decode(byte), "decoding {byte:#x}");
        let clamped = f64::from(x).clamp(-448.0, 448.0);
        let best = (0..=255u8).filter(|b| b & 0x7f != 0x7f).map(|b| (decode(b) - clamped).abs()).fold(f64::INFINITY, f64::min);
        assert_eq!((decode(byte) - clamped).abs(), best, "fp8 of {x} is {}", decode(byte));
    }
}

pub fn half_arithmetic(lab: &Lab) {
    // Of all sizes, subnormals among them, and whatever bits there are.
    let mut rng = Rng::new(12);
    let mut number = |size: i32| {
        let x = rng.normals(2, 1.0);
        u32::from(f16::from_f32(x[0] * 2f32.powi(size)).to_bits()) | u32::from(f16::from_f32(x[1]).to_bits()) << 16
    };
    let mut input: Vec<u32> = (0..600).flat_map(|i| [number(-24 + i % 36), number(i / 36 - 8), number(12 - i % 40)]).collect();
    input.extend(words(&mut Rng::new(13), 3 * 400));
    let Some(out) = arithmetic(lab, 19, &input) else { return };
    for (x, out) in input.chunks(3).zip(&out) {
        for shift in [0, 16] {
            let half = |w: u32| f16::from_bits((w >> shift) as u16);
            let [a, b, c] = [half(x[0]), half(x[1]), half(x[2])];
            let same = |actual: f16, expected: f64| {
                let expected = f16::from_f64(expected);
                assert!(
                    actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan()),
                    "{a} {b} {c}: {actual}"
                );
            };
            same(half(out[0]), a.to_f64() * b.to_f64() + c.to_f64());
            same(half(out[1]), a.to_f64() * b.to_f64());
        }
    }
}

pub fn integer_instructions(lab: &Lab) {
    let input = words(&mut Rng::new(8), 3 * 200);
    let bytes = |x: u32| x.to_le_bytes();
    type Instruction = (u32, fn(u32, u32, u32) -> [u32; 2]);
    let dp4a_s8: fn(u32, u32, u32) -> [u32; 2] = |x, y, z| {
        let sum: i32 = x.to_le_bytes().iter().zip(y.to_le_bytes()).map(|(&a, b)| i32::from(a as i8) * i32::from(b as i8)).sum();
        [z.wrapping_add(sum as u32), 0]
    };
    let dp4a_u8: fn(u32, u32, u32) -> [u32; 2] = |x, y, z| {
        let sum: u32 = x.to_le_bytes().iter().zip(y.to_le_bytes()).map(|(&a, b)| u32::from(a) * u32::from(b)).sum();
        [z.wrapping_add(sum), 0]
    };
    let funnel: fn(u32, u32, u32) -> [u32; 2] = |x, y, z| {
        let both = u64::from(y) << 32 | u64::from(x);
        [((both << (z & 31)) >> 32) as u32, (both >> (z & 31)) as u32]
    };
    let instructions: [Instruction; 6] = [
        (7, |x, y, z| [x ^ y ^ z, 0]),
        (8, |x, y, z| [x & y | z, 0]),
        (9, dp4a_s8),
        (10, dp4a_u8),
        (16, |x, y, _| [x.count_ones(), y.leading_zeros()]),
        (17, funnel),
    ];
    for (arg, f) in instructions {
        let Some(out) = arithmetic(lab, arg, &input) else { return };
        for (i, x) in input.chunks(3).enumerate() {
            assert_eq!(out[i], f(x[0], x[1], x[2]), "operation {arg} of {x:x?}");
        }
    }
    let Some(out) = arithmetic(lab, 11, &input) else { return };
    for (i, x) in input.chunks(3).enumerate() {
        let all = [bytes(x[0]), bytes(x[1])].concat();
        let expected = u32::from_le_bytes(std::array::from_fn(|b| all[(x[2] >> (4 * b) & 7) as usize]));
        assert_eq!(out[i][0], expected, "byte_perm of {x:x?}");
    }
}

pub fn exact_float_instructions(lab: &Lab) {
    let mut rng = Rng::new(9);
    let x: Vec<f32> = (0..3 * 300).map(|_| rng.normal() * 10f32.powi(rng.below(9) as i32 - 4)).collect();
    let input: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
    type Instruction = (u32, fn(f32, f32, f32) -> [f32; 2]);
    let instructions: [Instruction; 4] = [
        (12, |a, b, c| [a.mul_add(b, c), 0.0]),
        (13, |a, b, _| [a / b, 0.0]),
        (14, |a, _, _| [a.round_ties_even(), 0.0]),
        (18, |a, b, _| [a - b, a * b]),
    ];
    for (arg, f) in instructions {
        let Some(out) = arithmetic(lab, arg, &input) else { return };
        for (x, out) in x.chunks(3).zip(&out) {
            assert_eq!(*out, f(x[0], x[1], x[2]).map(f32::to_bits), "operation {arg} of {x:?}");
        }
    }
    let ties = [0.5f32, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5];
    let Some(out) = arithmetic(lab, 14, &floats(ties.into_iter())) else { return };
    for (x, out) in ties.iter().zip(&out) {
        assert_eq!(f32::from_bits(out[0]), x.round_ties_even(), "{x}");
    }
}

pub fn warp_collectives(lab: &Lab) {
    let mut rng = Rng::new(10);
    for special in [None, Some(77)] {
        let mut x = words(&mut rng, 32);
        if let Some(s) = special {
            x[19] = s;
        }
        let index: Vec<u32> = (0..32).map(|_| rng.below(32) as u32).collect();
        let input = [x.clone(), index.clone()].concat();
        let Some(out) = launch(lab, "kvlar_conformance_warp", [1, 32], &input, 17 * 32, [0, 5]) else { return };
        let ballot = |f: &dyn Fn(usize) -> bool| (0..32).filter(|&l| f(l)).fold(0u32, |m, l| m | 1 << l);
        for lane in 0..32 {
            let expected = [
                x[index[lane] as usize],
                x[if lane >= 3 { lane - 3 } else { lane }],
                x[if lane + 5 < 32 { lane + 5 } else { lane }],
                x[lane ^ 9],
                x[lane / 8 * 8 + index[lane] as usize % 8],
                ballot(&|l| x[l] & 1 == 1),
                u32::from(x.contains(&77)),
                u32::from(!x.contains(&77)),
                ballot(&|l| index[l] == index[lane]),
                u32::MAX,
                1,
                x.iter().fold(0, |s, &v| s.wrapping_add(v)),
                *x.iter().min().expect("32 values"),
                *x.iter().max().expect("32 values"),
                x.iter().fold(u32::MAX, |s, &v| s & v),
                x.iter().fold(0, |s, &v| s | v),
                x.iter().fold(0, |s, &v| s ^ v),
            ];
            assert_eq!(out[17 * lane..17 * lane + 17], expected, "lane {lane}");
        }
    }
}

pub fn named_barriers(lab: &Lab) {
    let rounds = 9;
    let input = words(&mut Rng::new(11), 32 * rounds);
    let Some(out) = launch(lab, "kvlar_conformance_named_barriers", [1, 64], &input, 32 * rounds, [rounds as u32, 0]) else {
        return;
    };
    for round in 0..rounds {
        let mut expected = input[32 * round..32 * round + 32].to_vec();
        expected.reverse();
        assert_eq!(out[32 * round..32 * round + 32], expected, "round {round}");
    }
}

pub fn the_last_cta_sees_what_all_wrote(lab: &Lab) {
    // A missing fence shows only on a GPU, and only now and then.
    let (launches, ctas) = if lab.device.backend() == Backend::Cuda { (2000, 264) } else { (20, 7) };
    if !lab.runs_kernels() {
        return;
    }
    let input = words(&mut Rng::new(12), 64);
    let from = lab.upload(&input);
    let out = lab.upload(&vec![0u32; 3 + 64 * ctas]);
    let mut wrong = 0;
    for arg in 0..launches {
        let params = KvlarConformance { in_: from.address(), out: out.address(), count: 64, arg };
        // SAFETY: the buffers hold what the kernel's header says.
        unsafe { lab.stream.enqueue_entry("kvlar_conformance_arrive_last", ctas as u32, 64, &params) }.expect("a launch");
        let mut words = [0u8; 12];
        lab.stream.download(&out, 0, &mut words).expect("a result");
        let word = |i: usize| u32::from_le_bytes([words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]]);
        let once = input.iter().fold(0u32, |s, &x| s.wrapping_add(x).wrapping_add(arg));
        assert_eq!((word(0), word(2)), (0, arg + 1), "the counter is left at 0, and one CTA was the last");
        wrong += usize::from(word(1) != once.wrapping_mul(ctas as u32));
    }
    assert_eq!(wrong, 0, "of {launches} launches");
}
