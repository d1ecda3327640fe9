//! Cases of appending latents: checked byte for byte where latents come ready-made.

use super::{DeviceEncoding, Encoding, rows_first};
use crate::pages::{DevicePages, Layout, Pages};
use crate::{Lab, once_a_case, reference_dtype};
use kvlar::{
    AppendLowrankArgs, AppendLowrankPlan, AppendLowrankShape, Buffer, Codec, Dtype, SideArgs, SideShape, Status, Strides,
    Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::{EncodedRow, encode_row};

/// What one side of an append is.
#[derive(Clone, Debug)]
pub enum SideCase {
    None,
    /// `above`: added to all latents, so that a range of one sign does not hold zero.
    Project {
        members: Vec<Vec<i32>>,
        rank: usize,
        mean: bool,
        above: f32,
        codec: Codec,
    },
    Latent {
        groups: usize,
        rank: usize,
        codec: Codec,
    },
    Dense {
        head_dim: usize,
        codec: Codec,
    },
}

/// A case of `append_lowrank`.
#[derive(Clone, Debug)]
pub struct AppendLowrankCase {
    pub dtype: Dtype,
    pub keys: SideCase,
    pub values: SideCase,
    pub layout: Layout,
    pub seqs: usize,
    pub kv_heads: usize,
    pub new_rows: usize,
    pub capacity: usize,
    pub head_dim: usize,
    /// Row that each new row goes to, `[B][S]`; default: the first ones.
    pub slots: Option<Vec<i32>>,
    /// Entries of the table that are replaced.
    pub bad_pages: Vec<(usize, i32)>,
    /// Pages that the pool of values has, where that of keys has more.
    pub value_pages: Option<usize>,
    pub positions: bool,
    pub rows_first: bool,
    /// Elements of x (or of ready-made latents) that are replaced.
    pub odd: Vec<(usize, f32)>,
    pub launches: usize,
    pub seed: u64,
}

/// A side's data, and what should be stored.
struct SideData {
    shape: SideShape,
    encoding: Option<Encoding>,
    /// `[B, groups, S, rank]`.
    rows: Vec<f32>,
    rank: usize,
}

struct SideOnDevice {
    encoding: Option<DeviceEncoding>,
    rows: Option<(Buffer, Option<Strides>)>,
    pool: Buffer,
}

impl AppendLowrankCase {
    /// Keys to latents in the type of x, values likewise; two sequences, four heads in pairs, pages of 16.
    pub fn new(dtype: Dtype, new_rows: usize, head_dim: usize, ranks: (usize, usize)) -> Self {
        let codec = Option::<Codec>::from(dtype).expect("a 16-bit type");
        let side = |members: &[[i32; 2]], rank| SideCase::Project {
            members: members.iter().map(|m| m.to_vec()).collect(),
            rank,
            mean: false,
            above: 0.0,
            codec,
        };
        Self {
            dtype,
            keys: side(&[[2, 0], [3, 1]], ranks.0),
            values: side(&[[0, 1], [2, 3]], ranks.1),
            layout: Layout::Hnd(16),
            seqs: 2,
            kv_heads: 4,
            new_rows,
            capacity: new_rows.next_multiple_of(16) + 16,
            head_dim,
            slots: None,
            bad_pages: Vec::new(),
            value_pages: None,
            positions: true,
            rows_first: false,
            odd: Vec::new(),
            launches: 1,
            seed: 1,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// int8 latents on both sides.
    pub fn int8(mut self) -> Self {
        for side in [&mut self.keys, &mut self.values] {
            match side {
                SideCase::None => {}
                SideCase::Project { codec, .. } | SideCase::Latent { codec, .. } | SideCase::Dense { codec, .. } => {
                    *codec = Codec::Int8
                }
            }
        }
        self
    }

    fn data(&self, rng: &mut Rng, side: &SideCase) -> SideData {
        let round = reference_dtype(self.dtype);
        let random = |rng: &mut Rng, n: usize| {
            let mut x = round.round_all(&rng.normals(n, 1.0));
            for &(i, value) in self.odd.iter().filter(|o| o.0 < n) {
                x[i] = value;
            }
            x
        };
        let tokens = self.seqs * self.new_rows;
        let kv_heads = self.kv_heads;
        match side {
            SideCase::None => SideData { shape: SideShape::None, encoding: None, rows: Vec::new(), rank: 0 },
            SideCase::Project { members, rank, mean, above, codec } => {
                let dims = [self.seqs, kv_heads, self.new_rows, self.head_dim];
                let mut e = Encoding::new(rng, self.dtype, dims, members.clone(), *rank, *mean);
                if *above != 0.0 {
                    // encoder (x − mean) + above: a mean whose image is −above in every rank.
                    e.encoder.chunks_mut(members[0].len() * self.head_dim).for_each(|row| row[0] = 1.0);
                    let mut shift = vec![0.0; kv_heads * self.head_dim];
                    members.iter().for_each(|m| shift[m[0] as usize * self.head_dim] = -above);
                    e.mean = Some(shift);
                }
                for &(i, value) in &self.odd {
                    e.x[i] = value;
                }
                let (head_dim, groups, size) = (self.head_dim, members.len(), members[0].len());
                let shape = SideShape::Project { kv_heads, head_dim, groups, size, rank: *rank, codec: *codec };
                SideData { shape, rows: e.latents(), encoding: Some(e), rank: *rank }
            }
            SideCase::Latent { groups, rank, codec } => {
                let shape = SideShape::Latent { groups: *groups, rank: *rank, codec: *codec };
                SideData { shape, encoding: None, rows: random(rng, tokens * groups * rank), rank: *rank }
            }
            SideCase::Dense { head_dim, codec } => {
                let shape = SideShape::Dense { kv_heads, head_dim: *head_dim, codec: *codec };
                SideData { shape, encoding: None, rows: random(rng, tokens * kv_heads * head_dim), rank: *head_dim }
            }
        }
    }

    fn upload(&self, lab: &Lab, side: &SideData, pages: &Pages) -> SideOnDevice {
        let n = side.shape.stored();
        let pool = match side.shape.codec() {
            Some(codec) => lab.poisoned(pages.pool_bytes(&codec.into(), n)),
            None => lab.poisoned(0),
        };
        let dims = [self.seqs, side.shape.groups(), self.new_rows, side.rank];
        let strides = self.rows_first.then(|| Strides::rows_first(dims[1], dims[2], dims[3]));
        let rows = (side.encoding.is_none() && side.shape != SideShape::None).then(|| {
            let x = if self.rows_first { rows_first(&side.rows, dims) } else { side.rows.clone() };
            (lab.upload_as(&x, self.dtype), strides)
        });
        let encoding = side.encoding.as_ref().map(|e| DeviceEncoding::upload(lab, e, self.rows_first));
        SideOnDevice { encoding, rows, pool }
    }

    /// Appends, and compares everything with the reference.
    ///
    /// # Panics
    /// If it differs.
    pub fn check(&self, lab: &Lab) {
        self.run(lab, |_, _, _| {});
    }

    /// As [`Self::check`]; `change` may use the arguments first.
    pub fn run(&self, lab: &Lab, change: impl Fn(&AppendLowrankPlan, &mut AppendLowrankArgs<'_>, &mut Workspace)) {
        let (b, s) = (self.seqs, self.new_rows);
        let made = once_a_case(self, || {
            let mut rng = Rng::new(self.seed);
            let sides = [self.data(&mut rng, &self.keys), self.data(&mut rng, &self.values)];
            let owners = sides.iter().map(|d| d.shape.groups()).max().unwrap_or(0);
            let pages = Pages::new(&mut rng, self.layout, b, owners, self.capacity, &vec![0; b]).with_full_table(&mut rng);
            (sides, pages)
        });
        let (sides, mut pages) = (&made.0, made.1.clone());
        let positions: Vec<i32> = (0..b * s).map(|i| 1000 + i as i32 * 3).collect();
        let slots = self.slots.clone().unwrap_or_else(|| (0..b).flat_map(|_| 0..s as i32).collect());
        let good = pages.table.clone();
        for &(i, page) in &self.bad_pages {
            pages.table[i] = page;
        }
        let table = DevicePages::upload(lab, &pages);
        pages.table = good;
        let of_side = |d: &SideData| Pages { heads: d.shape.groups().max(1), ..pages.clone() };
        let side_pages = [of_side(&sides[0]), of_side(&sides[1])];
        let [mut keys, mut values] = [0, 1].map(|i| self.upload(lab, &sides[i], &side_pages[i]));
        let mut row_positions = lab.poisoned(4 * pages.position_count());
        let (positions_in, slots_in) = (lab.upload(&positions), lab.upload(&slots));
        let shape = AppendLowrankShape { dtype: self.dtype, seqs: b, new_rows: s, keys: sides[0].shape, values: sides[1].shape };
        let plan = shape.plan(&lab.device).expect("a plan");
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).expect("a workspace");
        for _ in 0..self.launches {
            let mut args = AppendLowrankArgs {
                keys: keys.args(&sides[0], &side_pages[0]),
                values: values.args(&sides[1], &side_pages[1]),
                positions: self.positions.then(|| positions_in.view()),
                slots: slots_in.view(),
                rows: table.rows(),
                row_positions: self.positions.then(|| row_positions.view_mut()),
            };
            if self.layout == Layout::Contiguous && !self.positions {
                args.rows.position_seq_stride = 0;
            }
            if let (Some(n), SideArgs::Project { pool, .. } | SideArgs::Store { pool, .. }) = (self.value_pages, &mut args.values)
            {
                pool.page_count = n;
            }
            change(&plan, &mut args, &mut workspace);
            plan.launch(&lab.stream, &mut args, &mut workspace).expect("append_lowrank");
        }
        let status = workspace.status(&lab.stream).expect("a status");
        let counters = lab.counters(&workspace, plan.workspace());
        assert!(counters.iter().all(|&x| x == 0), "counters are not left at zero");

        let mut expected = Expected { case: self, pages: &pages, slots: &slots, bad_slot: false, bad_page: false };
        for (i, (side, memory)) in sides.iter().zip([&keys, &values]).enumerate() {
            if side.shape != SideShape::None {
                expected.check_side(["keys", "values"][i], side, &side_pages[i], lab.download(&memory.pool));
            }
        }
        let stored: Vec<i32> = lab.download(&row_positions);
        assert_eq!(stored, expected.positions(&positions, pages.heads), "positions\n{self:?}");
        expected.check_status(status);
    }
}

impl SideOnDevice {
    fn args<'a>(&'a mut self, side: &SideData, pages: &Pages) -> SideArgs<'a> {
        let n = side.shape.stored();
        let Some(codec) = side.shape.codec() else { return SideArgs::None };
        let pool = pages.pool(self.pool.view_mut(), &codec.into(), n);
        match (&self.encoding, &self.rows) {
            (Some(e), _) => SideArgs::Project { from: e.projection(), pool },
            (None, Some((x, x_strides))) => SideArgs::Store { x: x.view(), x_strides: *x_strides, pool },
            (None, None) => SideArgs::None,
        }
    }
}

/// What should be stored, and the comparison with what is.
struct Expected<'a> {
    case: &'a AppendLowrankCase,
    pages: &'a Pages,
    slots: &'a [i32],
    bad_slot: bool,
    bad_page: bool,
}

impl Expected<'_> {
    /// Page and row in it of a new row; `None` if it is not stored.
    fn place(&mut self, seq: usize, group: usize, row: usize) -> Option<(usize, usize)> {
        let slot = usize::try_from(self.slots[seq * self.case.new_rows + row]).ok()?;
        if slot >= self.pages.capacity {
            self.bad_slot = true;
            return None;
        }
        let Some(n) = self.pages.page_rows() else { return Some((0, slot)) };
        let per_table = self.pages.capacity.div_ceil(n);
        let table = if matches!(self.pages.layout, Layout::PerHead(_)) { seq * self.pages.heads + group } else { seq };
        let entry = table * per_table + slot / n;
        let page = self.pages.table[entry] as usize;
        if self.case.bad_pages.iter().any(|b| b.0 == entry) || self.case.value_pages.is_some_and(|n| page >= n) {
            self.bad_page = true;
            return None;
        }
        Some((page, slot % n))
    }

    fn check_side(&mut self, name: &str, side: &SideData, pages: &Pages, mut actual: Vec<u8>) {
        let (codec, n, rank) = (side.shape.codec().expect("a side"), side.shape.stored(), side.rank);
        let pool = pages.pool(Bytes(actual.len()), &codec.into(), n);
        let (row_bytes, params_bytes) = side.shape.row_bytes();
        for (i, x) in side.rows.chunks_exact(rank).enumerate() {
            let (seq, group, row) = (
                i / self.case.new_rows / side.shape.groups(),
                i / self.case.new_rows % side.shape.groups(),
                i % self.case.new_rows,
            );
            let Some((page, in_page)) = self.place(seq, group, row) else { continue };
            let start = seq * pool.seq_stride + group * pool.head_stride + page * pool.page_stride;
            let (codes, params) = (start + in_page * pool.row_stride, start + pool.params_offset + in_page * pool.params_stride);
            let stored =
                EncodedRow { codes: actual[codes..][..row_bytes].to_vec(), params: actual[params..][..params_bytes].to_vec() };
            let mut expected = encode_row(x, codec.reference(), rank).expect("a row");
            expected.codes.resize(row_bytes, 0);
            let at = || format!("{name}: row {row} of sequence {seq} group {group}\n{:?}", self.case);
            match &side.encoding {
                None => same_bytes(&stored, &expected, codec, &at),
                Some(e) if codec == Codec::Int8 => close_codes(&stored, &expected, rank, &at, e),
                Some(e) => {
                    let of = |row: &EncodedRow| decoded(row, n, codec);
                    let (a, b) = (of(&stored), of(&expected));
                    assert!(stored.codes[2 * rank..].iter().all(|&x| x == 0), "padding of {}", at());
                    kvlar_reference::compare::compare(&a[..rank], &b[..rank], e.tolerance(self.case.dtype))
                        .unwrap_or_else(|error| panic!("{error}: {}", at()));
                }
            }
            actual[codes..][..row_bytes].fill(0xff);
            actual[params..][..params_bytes].fill(0xff);
        }
        assert!(actual.iter().all(|&x| x == 0xff), "{name}: bytes of other rows were written\n{:?}", self.case);
    }

    fn positions(&mut self, positions: &[i32], owners: usize) -> Vec<i32> {
        let (c, mut expected) = (self.case, vec![-1; self.pages.position_count()]);
        for (seq, group, row) in (0..c.seqs).flat_map(|b| (0..owners).flat_map(move |g| (0..c.new_rows).map(move |r| (b, g, r))))
        {
            if self.place(seq, group, row).is_some() && c.positions {
                let slot = self.slots[seq * c.new_rows + row] as usize;
                expected[self.pages.position_index(seq, group, slot)] = positions[seq * c.new_rows + row];
            }
        }
        expected
    }

    fn check_status(&self, status: Status) {
        assert_eq!(status.bad_slot(), self.bad_slot, "{:?}", self.case);
        assert_eq!(status.bad_page(), self.bad_page, "{:?}", self.case);
        assert!(!status.bad_length());
    }
}

/// Memory that nothing is read from: for the strides of a pool.
struct Bytes(usize);

impl kvlar::Memory for Bytes {
    fn address(&self) -> u64 {
        0
    }
    fn bytes(&self) -> usize {
        self.0
    }
}

fn decoded(row: &EncodedRow, n: usize, codec: Codec) -> Vec<f32> {
    kvlar_reference::decode_row(&row.codes, &row.params, n, codec.reference(), n).expect("a row")
}

/// Scale and zero.
fn affine(row: &EncodedRow) -> [f32; 2] {
    [0, 2].map(|i| half::f16::from_le_bytes([row.params[i], row.params[i + 1]]).to_f32())
}

/// Bit for bit; of a NaN only that it is one.
fn same_bytes(actual: &EncodedRow, expected: &EncodedRow, codec: Codec, at: &dyn Fn() -> String) {
    if actual == expected {
        return;
    }
    if codec == Codec::Int8 {
        let (a, b) = (affine(actual), affine(expected));
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())), "{a:?} {b:?}: {}", at());
        assert_eq!(actual.codes, expected.codes, "{}", at());
        return;
    }
    let n = actual.codes.len() / 2;
    let (a, b) = (decoded(actual, n, codec), decoded(expected, n, codec));
    let differs = (0..n).find(|&i| a[i].to_bits() != b[i].to_bits() && !(a[i].is_nan() && b[i].is_nan()));
    assert!(differs.is_none(), "value {differs:?}: {}", at());
}

/// Codes of latents that are off by a rounding: scale and zero by an ulp, codes by one, and few of those.
fn close_codes(actual: &EncodedRow, expected: &EncodedRow, rank: usize, at: &dyn Fn() -> String, e: &Encoding) {
    let (a, b) = (affine(actual), affine(expected));
    if b[0].is_nan() {
        assert!(a[0].is_nan() && a[1].is_nan() && actual.codes.iter().all(|&c| c == 0), "{a:?}: {}", at());
        return;
    }
    let error = e.tolerance(Dtype::F32).absolute as f32;
    let off = |i: usize| (a[i] - b[i]).abs() - b[i].abs() / 1024.0;
    assert!(off(0) <= error / 100.0 && off(1) <= error, "scale and zero {a:?} instead of {b:?}: {}", at());
    let differing = |codes: &[u8]| codes.iter().zip(&expected.codes).filter(|(a, b)| a != b).count();
    assert!(actual.codes[..rank].iter().zip(&expected.codes).all(|(a, b)| a.abs_diff(*b) <= 1), "codes: {}", at());
    assert!(actual.codes[rank..].iter().all(|&c| c == 0), "padding: {}", at());
    if a == b && rank > 1 && b[0] > 10.0 * error {
        assert!(differing(&actual.codes) <= 1 + rank / 50, "{} codes differ: {}", differing(&actual.codes), at());
    }
}
