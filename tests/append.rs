//! append against the reference: rotation, encoding, and where rows land.

use kvlar::{Codec, Dtype, Format, RopeLayout};
use kvlar_reference::{Rope as Rotation, RopeScaling, Yarn};
use kvlar_tests::append::AppendCase as Case;
use kvlar_tests::pages::{Layout, RowFormat};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    codecs_and_dims,
    rotated_and_scaled_rows,
    product_codes,
    rotations,
    long_positions,
    layouts,
    skipped_and_scattered_slots,
    slots_per_head,
    bad_slots_are_reported,
    strided_inputs
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn codecs_and_dims(lab: &Lab) {
    for dtype in DTYPES {
        for codec in [Codec::Bf16, Codec::F16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2] {
            for dim in [8, 64, 80, 96, 128, 256] {
                Case::new(dtype, codec, dim).check(lab);
            }
        }
    }
    let grouped = |codec: Codec, group| Format { group: Some(group), ..codec.into() }.into();
    let mixed = Case {
        keys: grouped(Codec::Int8, 32),
        values: Codec::Bf16.into(),
        value_dim: 64,
        ..Case::new(Dtype::Bf16, Codec::Int8, 128)
    };
    mixed.check(lab);
    Case { values: grouped(Codec::Int8, 8), value_dim: 40, ..Case::new(Dtype::F16, Codec::F16, 96) }.check(lab);
    Case { values: grouped(Codec::Int2, 32), ..Case::new(Dtype::F16, Codec::Int4, 128) }.check(lab);
}

/// Rotated keys, scales of fp8 a head.
fn rotated_and_scaled_rows(lab: &Lab) {
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2, Codec::Fp8] {
        let rotated = Format { hadamard: true, ..codec.into() };
        Case { values: codec.into(), ..Case::new(Dtype::Bf16, rotated, 128) }.check(lab);
        Case::new(Dtype::F16, rotated, 64).check(lab);
    }
    let scaled = |scales: [f32; 3]| RowFormat { scales: scales.to_vec(), ..Codec::Fp8.into() };
    let case =
        Case { keys: scaled([0.5, 0.01, 2.0]), values: scaled([0.1, 1.0, 0.02]), ..Case::new(Dtype::Bf16, Codec::Fp8, 80) };
    case.check(lab);
}

/// Values, which are not rotated by position, have the reference's bits.
fn product_codes(lab: &Lab) {
    let rows = |format: Format, dim| RowFormat::from(format).with_codebooks(3, dim);
    for (format, dim) in
        [(Format::pq(2, 256), 64usize), (Format::pq(5, 33), 80), (Format::pq(128, 7), 128), (Format::pq(1, 2), 256)]
    {
        let rotated = Format { hadamard: dim.is_power_of_two(), ..format };
        let case = Case::new(Dtype::Bf16, Codec::Bf16, dim);
        Case { values: rows(format, dim), ..case.clone() }.check(lab);
        Case { keys: rows(rotated, dim), values: rows(rotated, dim), ..case }.check(lab);
    }
}

fn rotations(lab: &Lab) {
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 8192.0 };
    let yarn = RopeScaling::Yarn(Yarn::new(4.0, 4096.0));
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for scaling in [RopeScaling::None, RopeScaling::Linear(2.0), llama3, yarn] {
            for rotary in [128, 64, 2, 0] {
                let rope = Rotation::new(500000.0, rotary, layout, scaling);
                Case { rope, ..Case::new(Dtype::F16, Codec::F16, 128) }.check(lab);
            }
        }
    }
}

fn long_positions(lab: &Lab) {
    for first_position in [0, 131_072, 1_000_003, 16_000_000] {
        Case { first_position, ..Case::new(Dtype::F16, Codec::F16, 64) }.check(lab);
    }
}

fn layouts(lab: &Lab) {
    for layout in [Layout::Contiguous, Layout::Nhd(16), Layout::Nhd(64), Layout::Hnd(64), Layout::PerHead(16)] {
        let codec = if matches!(layout, Layout::Nhd(_)) { Codec::Bf16 } else { Codec::Int8 };
        Case { layout, ..Case::new(Dtype::Bf16, codec, 64) }.check(lab);
    }
}

fn skipped_and_scattered_slots(lab: &Lab) {
    let slots = Some(vec![39, -1, 0, 17, 16, -5, -1, 31, 32, 3]);
    Case { slots: slots.clone(), ..Case::new(Dtype::Bf16, Codec::Bf16, 80) }.check(lab);
    Case { slots: slots.clone(), ..Case::new(Dtype::Bf16, Codec::Int8, 80) }.check(lab);
    Case { slots: Some(vec![-1; 10]), ..Case::new(Dtype::Bf16, Codec::Int8, 80) }.check(lab);
}

fn slots_per_head(lab: &Lab) {
    let slots = (0..2 * 3 * 5).map(|i| if i % 7 == 3 { -1 } else { i * 11 % 40 }).collect();
    Case { slots: Some(slots), layout: Layout::PerHead(16), ..Case::new(Dtype::Bf16, Codec::Bf16, 64) }.check(lab);
}

fn bad_slots_are_reported(lab: &Lab) {
    Case { slots: Some(vec![40, 1, i32::MAX, 3, 4, 5, 6, 7, 8, 9]), ..Case::new(Dtype::Bf16, Codec::Bf16, 64) }.check(lab);
}

fn strided_inputs(lab: &Lab) {
    Case { rows_first: true, ..Case::new(Dtype::F16, Codec::F16, 96) }.check(lab);
}
