//! Runs of append_groups: steps that bring rows, of which groups are encoded, against the reference's codecs.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, reference_dtype};
use kvlar::{
    AppendArgs, AppendGroupsArgs, AppendGroupsShape, AppendShape, Buffer, Codec, Dtype, Format, Rope, RopeLayout, Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Rope as Rotation, RopeScaling};

/// Rows of an exact page.
const EXACT_ROWS: usize = 16;

/// A run of steps over two sequences.
#[derive(Clone, Debug)]
pub struct GroupsRun {
    pub dtype: Dtype,
    pub keys: RowFormat,
    pub values: RowFormat,
    pub layout: Layout,
    pub heads: usize,
    pub dims: (usize, usize),
    pub pack_rows: usize,
    /// Rows that are never encoded: at the beginning, and at least so many at the end.
    pub sinks: usize,
    pub recent: usize,
    pub rope: bool,
    /// New rows of each step, of each sequence; fewer than the most are padded.
    pub steps: Vec<[usize; 2]>,
}

/// Encoded rows of a run.
pub struct Encoded {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub pages: Pages,
    /// Given rows `[seq][head][row][dim]`, rounded.
    pub k: Vec<Vec<Vec<f32>>>,
    pub v: Vec<Vec<Vec<f32>>>,
    /// Rows that were encoded.
    pub packed: [usize; 2],
}

impl GroupsRun {
    pub fn new(keys: Format, values: Format, steps: &[[usize; 2]]) -> Self {
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

    pub fn run(&self, lab: &Lab) -> Encoded {
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
        let exact_pages = exact.table.len() / 2;
        let rotation = Rotation::new(10000.0, d, RopeLayout::Half, RopeScaling::None);
        let inv_freq = lab.upload(&rotation.inv_freq);
        let tables = [self.keys.upload(lab), self.values.upload(lab)];
        let mut workspace = Workspace::new(&lab.device, Default::default()).unwrap();
        let mut held = [0usize; 2];
        for step in &self.steps {
            let new = step[0].max(step[1]).max(1);
            let (mut k_new, mut v_new, mut positions, mut slots, mut packing) = (vec![], vec![], vec![], vec![], vec![]);
            let mut source = vec![-1; 2 * exact_pages];
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
                // Pages before those that are read are not given.
                let page = from / EXACT_ROWS;
                let pages = &exact.table[seq * exact_pages..][page..exact_pages];
                source[seq * exact_pages..][..pages.len()].copy_from_slice(pages);
                let first = page * EXACT_ROWS;
                packing.extend([before as i32 - sinks as i32, first as i32, from as i32, (to - from) as i32]);
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
            let source = lab.upload(&source);
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
                    key_scores: None,
                },
                rows: on_device.rows(),
                keys: pages.pool(keys.view_mut(), &self.keys, d),
                values: pages.pool(values.view_mut(), &self.values, dv),
                tables: kvlar::Tables {
                    keys: tables[0].as_ref().map(Buffer::view),
                    values: tables[1].as_ref().map(Buffer::view),
                },
                source: source.view(),
                source_pages: exact_pages,
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
    pub fn check(&self, lab: &Lab) {
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
