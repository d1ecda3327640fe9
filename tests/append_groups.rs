//! append_groups: new rows stay as they are, and leave in groups to be encoded, against the reference's codecs.

use kvlar::{
    AppendArgs, AppendGroupsArgs, AppendGroupsShape, AppendShape, Buffer, Codec, Dtype, Format, Rope, RopeLayout, Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Rope as Rotation, RopeScaling};
use kvlar_tests::pages::{DevicePages, Layout, Pages, RowFormat};
use kvlar_tests::{Lab, on_every_device, reference_dtype};

on_every_device!(
    formats,
    steps_of_any_size_give_equal_bits,
    recent_rows_stay,
    sinks_are_negative,
    rotation_is_that_of_append,
    other_rows_are_left_alone,
);

/// Rows of an exact page.
const EXACT_ROWS: usize = 16;

/// A run of steps over two sequences.
#[derive(Clone, Debug)]
struct Run {
    dtype: Dtype,
    keys: RowFormat,
    values: RowFormat,
    layout: Layout,
    heads: usize,
    dims: (usize, usize),
    pack_rows: usize,
    /// Rows that are never encoded: at the beginning, and at least so many at the end.
    sinks: usize,
    recent: usize,
    rope: bool,
    /// New rows of each step, of each sequence; fewer than the most are padded.
    steps: Vec<[usize; 2]>,
}

/// Encoded rows of a run.
struct Encoded {
    keys: Vec<u8>,
    values: Vec<u8>,
    pages: Pages,
    /// Given rows `[seq][head][row][dim]`, rounded.
    k: Vec<Vec<Vec<f32>>>,
    v: Vec<Vec<Vec<f32>>>,
    /// Rows that were encoded.
    packed: [usize; 2],
}

impl Run {
    fn new(keys: Format, values: Format, steps: &[[usize; 2]]) -> Self {
        Self {
            dtype: Dtype::Bf16,
            keys: keys.into(),
            values: values.into(),
            layout: Layout::Hnd(64),
            heads: 2,
            dims: (64, 32),
            pack_rows: 32,
            sinks: 0,
            recent: 0,
            rope: false,
            steps: steps.to_vec(),
        }
    }

    fn total(&self, seq: usize) -> usize {
        self.steps.iter().map(|s| s[seq]).sum()
    }

    /// The first row behind the sinks that stays, where `total` are held.
    fn start(&self, total: usize) -> usize {
        total.saturating_sub(self.sinks + self.recent) / self.pack_rows * self.pack_rows
    }

    fn run(&self, lab: &Lab) -> Encoded {
        let (h, (d, dv), sinks) = (self.heads, self.dims, self.sinks);
        let dtype = reference_dtype(self.dtype);
        let mut rng = Rng::new(21);
        let longest = self.total(0).max(self.total(1)).max(1);
        let rows = |dim: usize, rng: &mut Rng| -> Vec<Vec<Vec<f32>>> {
            let head = |rng: &mut Rng| dtype.round_all(&rng.normals(longest * dim, 1.0));
            (0..2).map(|_| (0..h).map(|_| head(rng)).collect()).collect()
        };
        let (k, v) = (rows(d, &mut rng), rows(dv, &mut rng));
        let capacity = longest.next_multiple_of(self.pack_rows);
        let pages = Pages::new(&mut rng, self.layout, 2, h, capacity, &[0, 0]).with_full_table(&mut rng);
        let native = RowFormat::from(Option::<Codec>::from(self.dtype).unwrap());
        // All rows behind the sinks have a place as they are; those that are encoded at once are not written there.
        let exact = Pages::new(&mut rng, Layout::Hnd(EXACT_ROWS), 2, h, capacity, &[0, 0]).with_full_table(&mut rng);
        let (on_device, exact_on_device) = (DevicePages::upload(lab, &pages), DevicePages::upload(lab, &exact));
        let poisoned = |pages: &Pages, rows: &RowFormat, dim| lab.poisoned(pages.pool_bytes(rows, dim));
        let (mut keys, mut values) = (poisoned(&pages, &self.keys, d), poisoned(&pages, &self.values, dv));
        let (mut exact_keys, mut exact_values) = (poisoned(&exact, &native, d), poisoned(&exact, &native, dv));
        let source = lab.upload(&exact.table);
        let rotation = Rotation::new(10000.0, d, RopeLayout::Half, RopeScaling::None);
        let inv_freq = lab.upload(&rotation.inv_freq);
        let tables = [self.keys.upload(lab), self.values.upload(lab)];
        let mut workspace = Workspace::new(&lab.device, Default::default()).unwrap();
        let mut held = [0usize; 2];
        for step in &self.steps {
            let new = step[0].max(step[1]).max(1);
            let (mut k_new, mut v_new, mut positions, mut slots, mut packing) = (vec![], vec![], vec![], vec![], vec![]);
            for seq in 0..2 {
                let (before, total) = (held[seq], held[seq] + step[seq]);
                let (from, to) = (self.start(before), self.start(total));
                for (of, dim, all) in [(&k, d, &mut k_new), (&v, dv, &mut v_new)] {
                    for head in &of[seq] {
                        all.extend_from_slice(&head[before * dim..total * dim]);
                        all.resize(all.len() + (new - step[seq]) * dim, f32::NAN);
                    }
                }
                for i in 0..new {
                    let row = (before + i) as i32 - sinks as i32;
                    positions.push((before + i) as i32);
                    slots.push(if i < step[seq] && row >= to as i32 { row } else { -1 });
                }
                packing.extend([before as i32 - sinks as i32, 0, from as i32, (to - from) as i32]);
                held[seq] = total;
            }
            let shape = AppendGroupsShape {
                append: AppendShape {
                    dtype: self.dtype,
                    key_format: native.format,
                    value_format: native.format,
                    seqs: 2,
                    kv_heads: h,
                    new_rows: new,
                    head_dim: d,
                    value_dim: dv,
                },
                key_format: self.keys.format,
                value_format: self.values.format,
                pack_rows: self.pack_rows,
                max_packs: new.div_ceil(self.pack_rows) + 1,
            };
            let plan = shape.plan(&lab.device).expect("a plan");
            let (k_in, v_in) = (lab.upload_as(&k_new, self.dtype), lab.upload_as(&v_new, self.dtype));
            let (positions, slots, packing) = (lab.upload(&positions), lab.upload(&slots), lab.upload(&packing));
            let mut args = AppendGroupsArgs {
                append: AppendArgs {
                    k: k_in.view(),
                    k_strides: None,
                    v: v_in.view(),
                    v_strides: None,
                    positions: positions.view(),
                    slots: slots.view(),
                    slots_per_head: false,
                    rope: self.rope.then(|| Rope {
                        inv_freq: inv_freq.view(),
                        rotary_dim: rotation.rotary_dim(),
                        layout: rotation.layout,
                        attention_factor: rotation.attention_factor,
                    }),
                    rows: exact_on_device.rows(),
                    row_positions: None,
                    keys: exact.pool(exact_keys.view_mut(), &native, d),
                    values: exact.pool(exact_values.view_mut(), &native, dv),
                    tables: Default::default(),
                },
                rows: on_device.rows(),
                keys: pages.pool(keys.view_mut(), &self.keys, d),
                values: pages.pool(values.view_mut(), &self.values, dv),
                tables: kvlar::Tables {
                    keys: tables[0].as_ref().map(Buffer::view),
                    values: tables[1].as_ref().map(Buffer::view),
                },
                source: source.view(),
                source_pages: exact.table.len() / 2,
                packing: packing.view(),
            };
            plan.launch(&lab.stream, &mut args, &mut workspace).expect("append_groups");
        }
        let status = workspace.status(&lab.stream).unwrap();
        assert!(!status.bad_page() && !status.bad_slot());
        let packed = [0, 1].map(|seq| self.start(self.total(seq)));
        Encoded { keys: lab.download(&keys), values: lab.download(&values), pages, k, v, packed }
    }

    /// Runs, and compares every byte of the encoded rows with the reference, where nothing is rotated.
    fn check(&self, lab: &Lab) {
        let encoded = self.run(lab);
        for (pool, rows, given, dim, what) in [
            (&encoded.keys, &self.keys, &encoded.k, self.dims.0, "keys"),
            (&encoded.values, &self.values, &encoded.v, self.dims.1, "values"),
        ] {
            let mut expected = vec![0xffu8; pool.len()];
            for (seq, head) in (0..2).flat_map(|s| (0..self.heads).map(move |h| (s, h))) {
                let from = &given[seq][head][self.sinks * dim..];
                encoded.pages.store_all(&mut expected, (seq, head), &from[..encoded.packed[seq] * dim], dim, rows);
            }
            let differs = pool.iter().zip(&expected).position(|(a, b)| a != b);
            assert!(differs.is_none(), "{self:?}: {what}: byte {differs:?}");
        }
    }
}

fn grouped(codec: Codec, group: usize) -> Format {
    Format { group: Some(group), ..codec.into() }
}

/// KIVI: channel-wise keys, values in groups of 32.
fn kivi() -> (Format, Format) {
    (Codec::Int2Channel.into(), grouped(Codec::Int2, 32))
}

/// Steps that end within groups, at their ends, and pass several.
const STEPS: [[usize; 2]; 6] = [[40, 5], [1, 27], [23, 1], [1, 0], [70, 31], [0, 64]];

fn formats(lab: &Lab) {
    let rotated = |codec: Codec| Format { hadamard: true, ..codec.into() };
    let (keys, values) = kivi();
    let mut runs = vec![
        Run::new(keys, values, &STEPS),
        Run::new(rotated(Codec::Int4Channel), Codec::Int4.into(), &STEPS),
        Run { dtype: Dtype::F16, ..Run::new(Codec::Int8.into(), Codec::Int4Channel.into(), &STEPS) },
        Run { keys: RowFormat { scales: vec![0.02, 0.1], ..Codec::Fp8.into() }, ..Run::new(keys, Codec::Fp8.into(), &STEPS) },
    ];
    runs.push(Run { pack_rows: 16, layout: Layout::Hnd(16), ..Run::new(rotated(Codec::Int4), Codec::Int2.into(), &STEPS) });
    runs.push(Run {
        keys: grouped(Codec::Int4Channel, 64).into(),
        values: Codec::Int8.into(),
        pack_rows: 64,
        dims: (128, 256),
        layout: Layout::PerHead(128),
        ..Run::new(keys, values, &STEPS)
    });
    runs.push(Run { heads: 3, dims: (80, 64), layout: Layout::Contiguous, ..Run::new(keys, values, &STEPS) });
    for run in runs {
        run.check(lab);
    }
}

/// A step may bring any number of rows: what is encoded is the same, also where keys are rotated.
fn steps_of_any_size_give_equal_bits(lab: &Lab) {
    let (keys, values) = kivi();
    for sinks in [0, 3] {
        let once = Run { rope: true, sinks, ..Run::new(keys, values, &[[100, 100]]) };
        let ones = Run { steps: vec![[1, 2]; 50], ..once.clone() };
        let some = Run { steps: [&ones.steps[..], &[[33, 0], [17, 0]]].concat(), ..ones };
        let (a, b) = (once.run(lab), some.run(lab));
        assert_eq!(a.packed, b.packed);
        assert!(a.keys == b.keys && a.values == b.values, "sinks {sinks}");
    }
}

fn recent_rows_stay(lab: &Lab) {
    let (keys, values) = kivi();
    for recent in [1, 31, 32, 50, 200] {
        Run { recent, ..Run::new(keys, values, &STEPS) }.check(lab);
    }
}

fn sinks_are_negative(lab: &Lab) {
    let (keys, values) = kivi();
    for sinks in [1, 4, 45] {
        Run { sinks, recent: 7, ..Run::new(keys, values, &STEPS) }.check(lab);
    }
}

/// What is encoded at once is what was stored before: rotated and rounded.
fn rotation_is_that_of_append(lab: &Lab) {
    let run = Run { rope: true, ..Run::new(Codec::Int8.into(), Codec::Int8.into(), &[[32, 64]]) };
    let encoded = run.run(lab);
    let rotation = Rotation::new(10000.0, 64, RopeLayout::Half, RopeScaling::None);
    let mut far = 0f32;
    for row in 0..32 {
        let given = &encoded.k[0][1][row * 64..][..64];
        let expected = reference_dtype(run.dtype).round_all(&rotation.rotate(given, row as i64));
        let actual = encoded.pages.load(&encoded.keys, (0, 1, row), 64, &run.keys);
        far = expected.iter().zip(&actual).fold(far, |far, (a, b)| far.max((a - b).abs()));
    }
    // Half a code of 255 over a range of about 6, and a rounding of the rotation.
    assert!(far < 0.05 && far > 0.0, "{far}");
}

/// Without whole groups nothing is encoded, and tables beyond are not followed.
fn other_rows_are_left_alone(lab: &Lab) {
    let (keys, values) = kivi();
    let encoded = Run::new(keys, values, &[[31, 1], [0, 30]]).run(lab);
    assert_eq!(encoded.packed, [0, 0]);
    assert!(encoded.keys.iter().chain(&encoded.values).all(|&x| x == 0xff));
}

#[test]
fn shapes_that_contradict_themselves_are_refused() {
    let lab = Lab::reference();
    let (keys, values) = kivi();
    let native = Format::from(Codec::Bf16);
    let append = AppendShape {
        dtype: Dtype::Bf16,
        key_format: native,
        value_format: native,
        seqs: 1,
        kv_heads: 1,
        new_rows: 1,
        head_dim: 64,
        value_dim: 64,
    };
    let shape = AppendGroupsShape { append, key_format: keys, value_format: values, pack_rows: 32, max_packs: 1 };
    shape.plan(&lab.device).unwrap();
    let refused = |shape: AppendGroupsShape, what: &[&str]| {
        kvlar_tests::says(&shape.plan(&lab.device).expect_err("a refusal"), what);
    };
    refused(AppendGroupsShape { pack_rows: 0, ..shape }, &["pack_rows", "0 rows"]);
    refused(AppendGroupsShape { pack_rows: 64, ..shape }, &["key format", "groups of 32", "64"]);
    refused(AppendGroupsShape { value_format: grouped(Codec::Int2, 48), ..shape }, &["value format", "48", "64 values"]);
    refused(AppendGroupsShape { max_packs: 1 << 40, ..shape }, &["max_packs", "too many"]);
    let f16 = AppendShape { key_format: Codec::F16.into(), ..append };
    refused(AppendGroupsShape { append: f16, ..shape }, &["append_groups", "another type than bf16"]);
}
