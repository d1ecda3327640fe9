//! Cases of append: random rows into random pages, checked byte for byte.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, reference_dtype};
use kvlar::{AppendArgs, AppendShape, Buffer, Dtype, Format, Rope, RopeLayout, Strides, Tables, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Rope as Rotation, RopeScaling};

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct AppendCase {
    pub dtype: Dtype,
    pub keys: RowFormat,
    pub values: RowFormat,
    pub layout: Layout,
    pub seqs: usize,
    pub heads: usize,
    pub new_rows: usize,
    pub capacity: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub rope: Rotation,
    pub first_position: i32,
    /// Row that each new row goes to, `[B][S]` or `[B][Hk][S]`; default: the first ones.
    pub slots: Option<Vec<i32>>,
    pub rows_first: bool,
    pub seed: u64,
}

fn half_split(dim: usize) -> Rotation {
    Rotation::new(10000.0, dim, RopeLayout::Half, RopeScaling::None)
}

impl AppendCase {
    /// Two sequences of three heads, five new rows in pages of 16.
    pub fn new(dtype: Dtype, format: impl Into<Format>, dim: usize) -> Self {
        let rows = RowFormat::from(format);
        Self {
            dtype,
            keys: rows.clone(),
            values: rows,
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

    /// Appends, and compares everything with the reference.
    ///
    /// # Panics
    /// If it differs.
    pub fn check(&self, lab: &Lab) {
        let mut rng = Rng::new(self.seed);
        let (b, h, s, d, dv) = (self.seqs, self.heads, self.new_rows, self.head_dim, self.value_dim);
        let dtype = reference_dtype(self.dtype);
        let k = dtype.round_all(&rng.normals(b * h * s * d, 1.0));
        let v = dtype.round_all(&rng.normals(b * h * s * dv, 1.0));
        let positions: Vec<i32> = (0..b * s).map(|i| self.first_position + i as i32 * 3).collect();
        let slots = self.slots.clone().unwrap_or_else(|| (0..b).flat_map(|_| 0..s as i32).collect());
        let pages = Pages::new(&mut rng, self.layout, b, h, self.capacity, &vec![0; b]).with_full_table(&mut rng);
        let on_device = DevicePages::upload(lab, &pages);
        let (kc, vc) = (&self.keys, &self.values);
        let mut keys = lab.poisoned(pages.pool_bytes(kc, d));
        let mut values = lab.poisoned(pages.pool_bytes(vc, dv));
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
            key_format: kc.format,
            value_format: vc.format,
            seqs: b,
            kv_heads: h,
            new_rows: s,
            head_dim: d,
            value_dim: dv,
        };
        let plan = shape.plan(&lab.device).expect("a plan");
        let (key_scales, value_scales) = (kc.upload(lab), vc.upload(lab));
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
            keys: pages.pool(keys.view_mut(), kc, d),
            values: pages.pool(values.view_mut(), vc, dv),
            tables: Tables { keys: key_scales.as_ref().map(Buffer::view), values: value_scales.as_ref().map(Buffer::view) },
            key_scores: None,
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
            (Tolerance::append(kc.format.codec.reference(), f64::from(self.rope.attention_factor) * 5.0), Tolerance::EXACT);
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
            let key = pages.store(&mut scratch, at, &rotated, kc);
            let value = pages.store(&mut scratch, at, &v[from * dv..][..dv], vc);
            let compare = |pool: &[u8], expected: &[f32], rows: &RowFormat, tolerance, what: &str| {
                let actual = pages.load(pool, at, expected.len(), rows);
                kvlar_reference::compare::compare(&actual, expected, tolerance)
                    .unwrap_or_else(|e| panic!("{what} row {row} of sequence {seq} head {head} at {slot}: {e}"));
            };
            compare(&keys, &key, kc, key_tolerance, "key");
            compare(&values, &value, vc, value_tolerance, "value");
            pages.poison(&mut keys, at, d, kc);
            pages.poison(&mut values, at, dv, vc);
        }
        assert!(keys.iter().chain(&values).all(|&x| x == 0xff), "bytes of other rows were written");
        assert_eq!(stored, expected_positions);
        let status = workspace.status(&lab.stream).expect("a status");
        assert_eq!(status.bad_slot(), bad_slot);
        assert!(!status.bad_page() && !status.bad_length());
    }
}
