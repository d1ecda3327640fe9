//! encode and decode, bit for bit.

use kvlar::{Codec, Dtype, EncodeShape, Format};
use kvlar_reference::testing::Rng;
use kvlar_reference::{decode_channels, decode_row, encode_channels, encode_row};
use kvlar_tests::encode::EncodeCase;
use kvlar_tests::pages::{DevicePages, Layout, Pages, RowFormat};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    round_trips,
    product_codes,
    product_codes_of_odd_rows,
    fp8_numbers,
    non_finite_values,
    constant_groups,
    channels,
    extremes,
    rows_beyond_a_length_decode_to_zero
);

/// Codecs without codebooks.
fn without_codebooks() -> impl Iterator<Item = Codec> {
    Codec::ALL.into_iter().filter(|&c| c != Codec::Pq)
}

/// Codecs with scales and zeros of rows.
const INTEGERS: [Codec; 3] = [Codec::Int8, Codec::Int4, Codec::Int2];
const CHANNELS: [Codec; 2] = [Codec::Int4Channel, Codec::Int2Channel];

fn grouped(codec: Codec, group: usize) -> RowFormat {
    Format { group: Some(group), ..codec.into() }.into()
}

fn round_trips(lab: &Lab) {
    let mut rng = Rng::new(11);
    for codec in without_codebooks() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for (dim, groups) in
                [(8, &[8, 4, 1][..]), (64, &[64, 16]), (80, &[80, 5, 40]), (96, &[32]), (128, &[128, 64]), (256, &[256, 8])]
            {
                for &group in groups {
                    let layouts = [Layout::Contiguous, Layout::Hnd(16), Layout::PerHead(32)];
                    let (mut layout, mut rows, heads) = (layouts[rng.below(3)], 1 + rng.below(37), 1 + rng.below(3));
                    let group = match codec.is_channel_wise() {
                        true => [1, 2, 16, 32, 33][rng.below(5)],
                        false => group,
                    };
                    if codec.is_channel_wise() {
                        // Pages hold whole groups, and groups are whole.
                        rows = group * (1 + rng.below(3));
                        layout = match group {
                            33 => Layout::Contiguous,
                            32 => Layout::PerHead(64),
                            _ => layout,
                        };
                    }
                    // Offsets and scales of all sizes.
                    let scale = 10f32.powi(rng.below(5) as i32 - 2);
                    let values: Vec<f32> = rng.normals(2 * heads * rows * dim, scale).iter().map(|x| x + scale * 3.0).collect();
                    let mut stored = grouped(codec, group);
                    stored.format.hadamard = dim.is_power_of_two() && rng.below(2) == 0;
                    if codec == Codec::Fp8 && rng.below(3) > 0 {
                        stored.scales = (0..heads).map(|h| scale * 0.01 * (h + 1) as f32).collect();
                    }
                    EncodeCase { stored, dtype, layout, dim, rows }.check(lab, &values);
                }
            }
        }
    }
}

/// Widths and numbers of centroids of all kinds; several tiles of rows and of staged centroids.
fn product_codes(lab: &Lab) {
    let mut rng = Rng::new(12);
    for (dim, width, centroids) in [
        (8usize, 1, 5),
        (64, 2, 256),
        (64, 4, 17),
        (64, 64, 40),
        (80, 5, 3),
        (96, 8, 1),
        (128, 16, 200),
        (256, 32, 70),
        (256, 256, 12),
    ] {
        let (rows, heads) = (1 + rng.below(70), 1 + rng.below(2));
        let mut format = Format::pq(width, centroids);
        format.hadamard = dim.is_power_of_two() && rng.below(2) == 0;
        let stored = RowFormat::from(format).with_codebooks(heads, dim);
        let dtype = [Dtype::F32, Dtype::Bf16, Dtype::F16][rng.below(3)];
        let layout = [Layout::Contiguous, Layout::Hnd(16), Layout::Nhd(16), Layout::PerHead(32)][rng.below(4)];
        EncodeCase { stored, dtype, layout, dim, rows }.check(lab, &rng.normals(2 * heads * rows * dim, 1.0));
    }
}

/// Ties go to the lower code, and what is not finite to code 0, alone.
fn product_codes_of_odd_rows(lab: &Lab) {
    let mut stored = RowFormat::from(Format::pq(4, 9)).with_codebooks(1, 32);
    for s in 0..8 {
        let book = &mut stored.codebooks[s * 36..][..36];
        book.copy_within(12..16, 28); // centroid 7 is centroid 3
        book[32..].fill(if s % 2 == 0 { 1e20 } else { 0.0 }); // whose square is infinite
    }
    let mut values = Rng::new(4).normals(2 * 9 * 32, 1.0);
    for (i, odd) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -0.0, 1e20].into_iter().enumerate() {
        values[40 * i + 3] = odd;
    }
    values[320..324].copy_from_slice(&stored.codebooks[12..16]); // as near to 3 as to 7
    EncodeCase { stored, dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows: 9 }.check(lab, &values);
}

/// Every number that fp8 can hold, the middle between it and the next, and that middle's neighbours.
fn fp8_numbers(lab: &Lab) {
    let numbers = (0..127u8).map(|code| kvlar_reference::decode_fp8(code, 1.0));
    let mut values: Vec<f32> = numbers
        .clone()
        .zip(numbers.skip(1).chain([480.0]))
        .flat_map(|(x, next)| {
            let middle = (x + next) / 2.0;
            [x, -x, middle, -middle, f32::from_bits(middle.to_bits() + 1), f32::from_bits(middle.to_bits().max(1) - 1)]
        })
        .chain([448.0, 463.9, 464.0, 500.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-20, -1e-20])
        .collect();
    values.resize(values.len().next_multiple_of(2 * 32), 0.25);
    let rows = values.len() / 64;
    for scales in [vec![], vec![0.37], vec![1e-3], vec![64.0]] {
        let stored = RowFormat { scales, ..Codec::Fp8.into() };
        EncodeCase { stored, dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows }.check(lab, &values);
    }
}

fn non_finite_values(lab: &Lab) {
    for codec in without_codebooks() {
        let mut values = Rng::new(5).normals(2 * 9 * 64, 1.0);
        values[3] = f32::NAN;
        values[64 + 40] = f32::INFINITY;
        values[128] = f32::NEG_INFINITY;
        values[200] = 1e30; // beyond f16: a scale that cannot be stored
        let group = if codec.is_channel_wise() { 3 } else { 16 };
        EncodeCase { stored: grouped(codec, group), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 64, rows: 9 }
            .check(lab, &values);
    }
    // The rest of a row is unaffected.
    let mut row = Rng::new(6).normals(64, 1.0);
    row[17] = f32::NAN;
    for codec in INTEGERS.map(Codec::reference) {
        let coded = encode_row(&row, codec, 16).unwrap();
        let back = decode_row(&coded.codes, &coded.params, 64, codec, 16).unwrap();
        assert!(back.iter().enumerate().all(|(i, x)| x.is_nan() == (16..32).contains(&i)));
    }
}

fn constant_groups(lab: &Lab) {
    let values: Vec<f32> = (0..2 * 4 * 32).map(|i| [0.0, -0.0, 1.5, -2.7, 1e-6, 3e4, 0.1, 7.0][i / 16 % 8]).collect();
    for codec in INTEGERS {
        EncodeCase { stored: grouped(codec, 16), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows: 4 }
            .check(lab, &values);
    }
}

/// Channels of one value, of ties between codes, of tiny ranges and of the largest that f16 can hold.
fn channels(lab: &Lab) {
    let (low, high) =
        ([0.0, -1.0, 0.0, -60000.0, 1.0, -65504.0, 3.0, -2.7], [255.0, 1.0, 1e-7, 60000.0, 1.0001, -65000.0, 3.0, -2.7]);
    let at = [0.0, 1.0, 0.5, 0.25, 0.1, 0.9, 0.501, 0.499];
    for (codec, group) in CHANNELS.into_iter().flat_map(|c| [4, 8, 16].map(|g| (c, g))) {
        let row = |row: usize| (0..16).map(move |c| low[c % 8] + (high[c % 8] - low[c % 8]) * at[(row + c) % 8]);
        let values: Vec<f32> = (0..2 * 16).flat_map(row).collect();
        EncodeCase { stored: grouped(codec, group), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 16, rows: 16 }
            .check(lab, &values);
    }
    // A channel that is not finite spoils that channel of its group, and nothing else.
    let mut rows = Rng::new(9).normals(8 * 16, 1.0);
    rows[16 + 5] = f32::INFINITY;
    let coded = encode_channels(&rows, 16, 2).unwrap();
    let back = decode_channels(&coded.codes, &coded.params, 16, 2).unwrap();
    assert!(back.iter().enumerate().all(|(i, x)| x.is_nan() == (i % 16 == 5)));
}

/// Rows that are no whole groups, and pages that hold none, are refused.
#[test]
fn parts_of_groups_are_refused() {
    let lab = Lab::reference();
    let stored = grouped(Codec::Int4Channel, 32);
    let refused = |rows: usize, layout: Layout, what: &[&str]| {
        let pages = Pages::new(&mut Rng::new(3), layout, 2, 1, rows, &[rows; 2]);
        let (on_device, dim) = (DevicePages::upload(&lab, &pages), 64);
        let case = EncodeCase { stored: stored.clone(), dtype: Dtype::F32, layout, dim, rows };
        let (x, mut pool) = (lab.poisoned(2 * rows * dim * 4), lab.poisoned(2 * pages.pool_bytes(&stored, dim)));
        let plan = case.shape(1).plan(&lab.device).unwrap();
        let e = plan.encode(&lab.stream, x.view(), &on_device.rows(), &pages.pool(pool.view_mut(), &stored, dim), None);
        kvlar_tests::says(&e.expect_err("a refusal"), what);
    };
    refused(33, Layout::Contiguous, &["rows", "33", "groups of 32"]);
    refused(64, Layout::PerHead(16), &["pool", "groups of 32", "pages of 16"]);
    let e = grouped(Codec::Int4Channel, 0);
    let e = EncodeShape { format: e.format, dtype: Dtype::F32, seqs: 1, heads: 1, rows: 32, dim: 64 }.plan(&lab.device);
    kvlar_tests::says(&e.expect_err("no group"), &["group", "0 rows"]);
}

fn extremes(lab: &Lab) {
    // Ties between codes, tiny ranges, subnormal scales, the largest values that f16 can hold.
    let mut values = Vec::new();
    for group in 0..16 {
        let (low, high) =
            [(0.0, 255.0), (-1.0, 1.0), (0.0, 1e-7), (-60000.0, 60000.0), (1.0, 1.0001), (-65504.0, -65000.0)][group % 6];
        values.extend((0..16).map(|i| low + (high - low) * [0.0, 1.0, 0.5, 0.25, 0.1, 0.9, 0.501, 0.499][i % 8]));
    }
    for codec in INTEGERS {
        EncodeCase { stored: grouped(codec, 16), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 16, rows: 8 }
            .check(lab, &values);
    }
}

fn rows_beyond_a_length_decode_to_zero(lab: &Lab) {
    let pages = Pages::new(&mut Rng::new(1), Layout::Hnd(16), 2, 2, 20, &[13, 0]);
    let on_device = DevicePages::upload(lab, &pages);
    let pool = lab.upload(&vec![0x3cu8; pages.pool_bytes(&Codec::F16.into(), 64)]);
    let shape = EncodeShape { format: Codec::F16.into(), dtype: Dtype::F16, seqs: 2, heads: 2, rows: 20, dim: 64 };
    let mut out = lab.poisoned(2 * 2 * 20 * 64 * 4);
    let plan = shape.plan(&lab.device).unwrap();
    plan.decode(&lab.stream, &on_device.rows(), &pages.pool(pool.view(), &Codec::F16.into(), 64), None, &mut out.view_mut())
        .unwrap();
    let values: Vec<f32> = lab.download(&out);
    let held = |i: usize| i / 64 / 20 / 2 == 0 && i / 64 % 20 < 13;
    for (i, x) in values.iter().enumerate() {
        assert_eq!(*x != 0.0, held(i), "sequence {} row {}: {x}", i / 64 / 20 / 2, i / 64 % 20);
    }
    // Or they are left alone.
    let mut out = lab.poisoned(2 * 2 * 20 * 64 * 4);
    let pool = pages.pool(pool.view(), &Codec::F16.into(), 64);
    plan.decode_held(&lab.stream, &on_device.rows(), &pool, None, Dtype::F32, &mut out.view_mut()).unwrap();
    for (i, (x, y)) in lab.download::<f32>(&out).iter().zip(&values).enumerate() {
        assert!(if held(i) { x == y } else { x.is_nan() }, "sequence {} row {}: {x}", i / 64 / 20 / 2, i / 64 % 20);
    }
}
