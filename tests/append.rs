//! append against the reference: rotation, encoding, and where rows land.

use kvlar::{AppendArgs, AppendShape, Codec, Dtype, Rope, RopeLayout, Strides, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Rope as Rotation, RopeScaling, Yarn};
use kvlar_tests::pages::{DevicePages, Layout, Pages};
use kvlar_tests::{Lab, on_every_device, reference_dtype};

on_every_device!(
    codecs_and_dims,
    rotations,
    long_positions,
    layouts,
    skipped_and_scattered_slots,
    slots_per_head,
    bad_slots_are_reported,
    strided_inputs
);

#[derive(Clone)]
struct Case {
    dtype: Dtype,
    key_codec: (Codec, usize),
    value_codec: (Codec, usize),
    layout: Layout,
    seqs: usize,
    heads: usize,
    new_rows: usize,
    capacity: usize,
    head_dim: usize,
    value_dim: usize,
    rope: Rotation,
    first_position: i32,
    /// Row that each new row goes to, `[B][S]` or `[B][Hk][S]`; default: the first ones.
    slots: Option<Vec<i32>>,
    rows_first: bool,
    seed: u64,
}

fn half_split(dim: usize) -> Rotation {
    Rotation::new(10000.0, dim, RopeLayout::Half, RopeScaling::None)
}

impl Case {
    fn new(dtype: Dtype, codec: Codec, dim: usize) -> Self {
        Self {
            dtype,
            key_codec: (codec, dim),
            value_codec: (codec, dim),
            layout: Layout::Hnd(16),
            seqs: 2,
            heads: 3,
            new_rows: 5,
            capacity: 40,
            head_dim: dim,
            value_dim: dim,
            rope: half_split(dim),
            first_position: 1000,
            slots: None,
            rows_first: false,
            seed: 9,
        }
    }

    fn slot(&self, slots: &[i32], seq: usize, head: usize, row: usize) -> i32 {
        let per_head = slots.len() != self.seqs * self.new_rows;
        slots[if per_head { (seq * self.heads + head) * self.new_rows + row } else { seq * self.new_rows + row }]
    }

    fn check(&self, lab: &Lab) {
        let mut rng = Rng::new(self.seed);
        let (b, h, s, d, dv) = (self.seqs, self.heads, self.new_rows, self.head_dim, self.value_dim);
        let dtype = reference_dtype(self.dtype);
        let k = dtype.round_all(&rng.normals(b * h * s * d, 1.0));
        let v = dtype.round_all(&rng.normals(b * h * s * dv, 1.0));
        let positions: Vec<i32> = (0..b * s).map(|i| self.first_position + i as i32 * 3).collect();
        let slots = self.slots.clone().unwrap_or_else(|| (0..b).flat_map(|_| 0..s as i32).collect());
        let pages = Pages::new(&mut rng, self.layout, b, h, self.capacity, &vec![0; b]).with_full_table(&mut rng);
        let on_device = DevicePages::upload(lab, &pages);
        let (kc, vc) = (self.key_codec, self.value_codec);
        let mut keys = lab.poisoned(pages.pool_bytes(kc.0, d, kc.1));
        let mut values = lab.poisoned(pages.pool_bytes(vc.0, dv, vc.1));
        let mut row_positions = lab.poisoned(4 * pages.position_count());
        let order = |x: &[f32], dim: usize| -> Vec<f32> {
            let from = |seq: usize, row: usize, head: usize| &x[((seq * h + head) * s + row) * dim..][..dim];
            (0..b)
                .flat_map(|q| (0..s).flat_map(move |r| (0..h).map(move |g| (q, r, g))))
                .flat_map(|(q, r, g)| from(q, r, g).to_vec())
                .collect()
        };
        let dense = |x: &[f32], dim| if self.rows_first { order(x, dim) } else { x.to_vec() };
        let (k_in, v_in) = (lab.upload_as(&dense(&k, d), self.dtype), lab.upload_as(&dense(&v, dv), self.dtype));
        let (positions_in, slots_in) = (lab.upload(&positions), lab.upload(&slots));
        let inv_freq = lab.upload(&self.rope.inv_freq);
        let shape = AppendShape {
            dtype: self.dtype,
            key_codec: kc,
            value_codec: vc,
            seqs: b,
            kv_heads: h,
            new_rows: s,
            head_dim: d,
            value_dim: dv,
        };
        let plan = shape.plan(&lab.device).expect("a plan");
        let mut workspace = Workspace::new(&lab.device, Default::default()).expect("a workspace");
        let mut args = AppendArgs {
            k: k_in.view(),
            k_strides: self.rows_first.then(|| Strides::rows_first(h, s, d)),
            v: v_in.view(),
            v_strides: self.rows_first.then(|| Strides::rows_first(h, s, dv)),
            positions: positions_in.view(),
            slots: slots_in.view(),
            slots_per_head: slots.len() != b * s,
            rope: Some(Rope {
                inv_freq: inv_freq.view(),
                rotary_dim: self.rope.rotary_dim(),
                layout: self.rope.layout,
                attention_factor: self.rope.attention_factor,
            }),
            rows: on_device.rows(),
            row_positions: Some(row_positions.view_mut()),
            keys: pages.pool(keys.view_mut(), kc.0, d, kc.1),
            values: pages.pool(values.view_mut(), vc.0, dv, vc.1),
        };
        if matches!(self.layout, Layout::PerHead(_)) {
            args.rows.positions = None;
        }
        plan.launch(&lab.stream, &mut args, &mut workspace).expect("append");

        // What should be there: poison but for the rows written.
        let (mut keys, mut values): (Vec<u8>, Vec<u8>) = (lab.download(&keys), lab.download(&values));
        let stored: Vec<i32> = lab.download(&row_positions);
        let mut expected_positions = vec![-1; stored.len()];
        let mut bad_slot = false;
        let (key_tolerance, value_tolerance) =
            (Tolerance::append(kc.0.reference(), f64::from(self.rope.attention_factor) * 5.0), Tolerance::EXACT);
        for (seq, head, row) in (0..b).flat_map(|q| (0..h).flat_map(move |g| (0..s).map(move |r| (q, g, r)))) {
            let slot = self.slot(&slots, seq, head, row);
            bad_slot |= slot >= self.capacity as i32;
            if slot < 0 || slot >= self.capacity as i32 {
                continue;
            }
            let at = (seq, head, slot as usize);
            let from = (seq * h + head) * s + row;
            let position = positions[seq * s + row];
            expected_positions[pages.position_index(seq, head, slot as usize)] = position;
            let rotated = self.rope.rotate(&k[from * d..][..d], i64::from(position));
            let mut scratch = vec![0u8; keys.len().max(values.len())];
            let key = pages.store(&mut scratch, at, &rotated, kc.0, kc.1);
            let value = pages.store(&mut scratch, at, &v[from * dv..][..dv], vc.0, vc.1);
            let compare = |pool: &[u8], expected: &[f32], (codec, group): (Codec, usize), tolerance, what: &str| {
                let actual = pages.load(pool, at, expected.len(), codec, group);
                kvlar_reference::compare::compare(&actual, expected, tolerance)
                    .unwrap_or_else(|e| panic!("{what} row {row} of sequence {seq} head {head} at {slot}: {e}"));
            };
            compare(&keys, &key, kc, key_tolerance, "key");
            compare(&values, &value, vc, value_tolerance, "value");
            pages.poison(&mut keys, at, d, kc.0, kc.1);
            pages.poison(&mut values, at, dv, vc.0, vc.1);
        }
        assert!(keys.iter().chain(&values).all(|&x| x == 0xff), "bytes of other rows were written");
        assert_eq!(stored, expected_positions);
        let status = workspace.status(&lab.stream).expect("a status");
        assert_eq!(status.bad_slot(), bad_slot);
        assert!(!status.bad_page() && !status.bad_length());
    }
}

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn codecs_and_dims(lab: &Lab) {
    for dtype in DTYPES {
        for codec in [Codec::Bf16, Codec::F16, Codec::Int8] {
            for dim in [8, 64, 80, 96, 128, 256] {
                Case::new(dtype, codec, dim).check(lab);
            }
        }
    }
    let mixed = Case {
        key_codec: (Codec::Int8, 32),
        value_codec: (Codec::Bf16, 64),
        value_dim: 64,
        ..Case::new(Dtype::Bf16, Codec::Int8, 128)
    };
    mixed.check(lab);
    Case { key_codec: (Codec::F16, 96), value_codec: (Codec::Int8, 8), value_dim: 40, ..Case::new(Dtype::F16, Codec::Int8, 96) }
        .check(lab);
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
    let slots = (0..2 * 3 * 5).map(|i| if i % 7 == 3 { -1 } else { (i * 11 % 40) as i32 }).collect();
    Case { slots: Some(slots), layout: Layout::PerHead(16), ..Case::new(Dtype::Bf16, Codec::Bf16, 64) }.check(lab);
}

fn bad_slots_are_reported(lab: &Lab) {
    Case { slots: Some(vec![40, 1, i32::MAX, 3, 4, 5, 6, 7, 8, 9]), ..Case::new(Dtype::Bf16, Codec::Bf16, 64) }.check(lab);
}

fn strided_inputs(lab: &Lab) {
    Case { rows_first: true, ..Case::new(Dtype::F16, Codec::F16, 96) }.check(lab);
}
