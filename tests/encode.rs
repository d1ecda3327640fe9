//! encode and decode, bit for bit.

use kvlar::{Buffer, Codec, Dtype, EncodeShape, Format};
use kvlar_reference::testing::Rng;
use kvlar_reference::{decode_row, encode_row};
use kvlar_tests::pages::{DevicePages, Layout, Pages, RowFormat};
use kvlar_tests::{Lab, on_every_device, reference_dtype};

on_every_device!(
    round_trips,
    product_codes,
    product_codes_of_odd_rows,
    fp8_numbers,
    non_finite_values,
    constant_groups,
    extremes,
    rows_beyond_a_length_decode_to_zero
);

struct Case {
    stored: RowFormat,
    dtype: Dtype,
    layout: Layout,
    dim: usize,
    rows: usize,
}

impl Case {
    fn shape(&self, heads: usize) -> EncodeShape {
        EncodeShape { format: self.stored.format, dtype: self.dtype, seqs: 2, heads, rows: self.rows, dim: self.dim }
    }

    /// Encodes, compares the bytes, decodes, compares the values.
    fn check(&self, lab: &Lab, values: &[f32]) {
        let heads = values.len() / (2 * self.rows * self.dim);
        let (stored, dim) = (&self.stored, self.dim);
        let plan = self.shape(heads).plan(&lab.device).expect("a plan");
        let pages = Pages::new(&mut Rng::new(3), self.layout, 2, heads, self.rows, &[self.rows; 2]);
        let on_device = DevicePages::upload(lab, &pages);
        let x = lab.upload_as(values, self.dtype);
        let mut pool = lab.poisoned(pages.pool_bytes(stored, dim));
        let rows = on_device.rows();
        let scales = stored.upload(lab);
        let scales = scales.as_ref().map(Buffer::view);
        plan.encode(&lab.stream, x.view(), &rows, &pages.pool(pool.view_mut(), stored, dim), scales).expect("encode");
        let bytes: Vec<u8> = lab.download(&pool);

        let rounded = reference_dtype(self.dtype).round_all(values);
        let mut expected = vec![0xffu8; bytes.len()];
        let mut decoded = Vec::new();
        for (i, row) in rounded.chunks(dim).enumerate() {
            let at = (i / self.rows / heads, i / self.rows % heads, i % self.rows);
            decoded.extend(pages.store(&mut expected, at, row, stored));
        }
        if let Some(i) = (0..bytes.len()).find(|&i| bytes[i] != expected[i]) {
            // A NaN has many patterns; only its being one is defined.
            let nan = |x: &[u8]| {
                half::f16::from_le_bytes([x[i & !1], x[i | 1]]).is_nan()
                    || half::bf16::from_le_bytes([x[i & !1], x[i | 1]]).is_nan()
            };
            assert!(nan(&bytes) && nan(&expected), "{stored:?} d={dim}: byte {i} is {} instead of {}", bytes[i], expected[i]);
        }
        let mut out = lab.poisoned(values.len() * 4);
        plan.decode(&lab.stream, &rows, &pages.pool(pool.view(), stored, dim), scales, &mut out.view_mut()).expect("decode");
        let actual: Vec<f32> = lab.download(&out);
        for (i, (a, e)) in actual.iter().zip(&decoded).enumerate() {
            assert!(
                a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()),
                "{stored:?} d={dim}: value {i} is {a} instead of {e}"
            );
        }
    }
}

/// Codecs without codebooks.
const WITHOUT_CODEBOOKS: [Codec; 6] = [Codec::Bf16, Codec::F16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2];
/// Codecs with scales and zeros of their own.
const INTEGERS: [Codec; 3] = [Codec::Int8, Codec::Int4, Codec::Int2];

fn grouped(codec: Codec, group: usize) -> RowFormat {
    Format { group: Some(group), ..codec.into() }.into()
}

fn round_trips(lab: &Lab) {
    let mut rng = Rng::new(11);
    for codec in WITHOUT_CODEBOOKS {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for (dim, groups) in
                [(8, &[8, 4, 1][..]), (64, &[64, 16]), (80, &[80, 5, 40]), (96, &[32]), (128, &[128, 64]), (256, &[256, 8])]
            {
                for &group in groups {
                    let layouts = [Layout::Contiguous, Layout::Hnd(16), Layout::PerHead(32)];
                    let (layout, rows, heads) = (layouts[rng.below(3)], 1 + rng.below(37), 1 + rng.below(3));
                    // Offsets and scales of all sizes.
                    let scale = 10f32.powi(rng.below(5) as i32 - 2);
                    let values: Vec<f32> = rng.normals(2 * heads * rows * dim, scale).iter().map(|x| x + scale * 3.0).collect();
                    let mut stored = grouped(codec, group);
                    stored.format.hadamard = dim.is_power_of_two() && rng.below(2) == 0;
                    if codec == Codec::Fp8 && rng.below(3) > 0 {
                        stored.scales = (0..heads).map(|h| scale * 0.01 * (h + 1) as f32).collect();
                    }
                    Case { stored, dtype, layout, dim, rows }.check(lab, &values);
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
        Case { stored, dtype, layout, dim, rows }.check(lab, &rng.normals(2 * heads * rows * dim, 1.0));
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
    Case { stored, dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows: 9 }.check(lab, &values);
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
        Case { stored, dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows }.check(lab, &values);
    }
}

fn non_finite_values(lab: &Lab) {
    for codec in WITHOUT_CODEBOOKS {
        let mut values = Rng::new(5).normals(2 * 9 * 64, 1.0);
        values[3] = f32::NAN;
        values[64 + 40] = f32::INFINITY;
        values[128] = f32::NEG_INFINITY;
        values[200] = 1e30; // beyond f16: a scale that cannot be stored
        Case { stored: grouped(codec, 16), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 64, rows: 9 }.check(lab, &values);
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
        Case { stored: grouped(codec, 16), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 32, rows: 4 }.check(lab, &values);
    }
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
        Case { stored: grouped(codec, 16), dtype: Dtype::F32, layout: Layout::Contiguous, dim: 16, rows: 8 }.check(lab, &values);
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
    for (i, x) in values.iter().enumerate() {
        let (seq, row) = (i / 64 / 20 / 2, i / 64 % 20);
        assert_eq!(*x != 0.0, seq == 0 && row < 13, "sequence {seq} row {row}: {x}");
    }
}
