//! attend.

use super::case::{Case, Output, expect, finite};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar::{
    AttendArgs, AttendShape, Buffer, Codec, Device, Dtype, Pool, Rows, Schedule, Segment, SegmentShape, Stream, View, Workspace,
};
use kvlar_reference::{AttendInput, Attended};

/// What every attention op takes besides its rows.
#[derive(Clone)]
pub struct Common {
    pub lengths: Option<Vec<i32>>,
    pub positions: Option<Vec<i32>>,
    pub q_positions: Option<Vec<i32>>,
    pub sink_logits: Option<Vec<f32>>,
    pub dtype: Dtype,
    pub scale: f64,
    pub softcap: f64,
    pub window: u32,
}

impl Common {
    /// Of q `[b, hq, s, d]` over `t` rows of `hk` kv heads.
    pub fn read(case: &mut Case, (b, hq, hk, s, t, d): (usize, usize, usize, usize, usize, usize)) -> Result<Self> {
        let lengths = case.ints("lengths", &[&[b], &[b, hk]])?;
        if let Some(bad) = lengths.iter().flatten().find(|&&n| n < 0 || n as usize > t) {
            return input(format!("lengths: {bad} is outside 0..={t}"));
        }
        let positions = case.ints("positions", &[&[t], &[b, t]])?;
        let q_positions = case.ints("q_positions", &[&[b, s]])?;
        let sink_logits = case.floats_if_any("sink_logits")?;
        if let Some(sinks) = &sink_logits {
            expect("sink_logits", &sinks.shape, &[hq])?;
        }
        let dtype = case.dtype()?;
        let scale = finite("scale", case.scalar("scale", 1.0 / (d as f64).sqrt())?)?;
        let softcap = finite("softcap", case.scalar("softcap", 0.0)?)?;
        if softcap < 0.0 {
            return input(format!("softcap: {softcap} is negative"));
        }
        let window: u32 = case.scalar("window", 0)?;
        if window > i32::MAX as u32 {
            return input(format!("window: {window} is above 2^31 - 1"));
        }
        let sink_logits = sink_logits.map(|x| x.values);
        Ok(Self { lengths, positions, q_positions, sink_logits, dtype, scale, softcap, window })
    }
}

/// Everything that attention reads, rounded and checked.
struct Inputs {
    dims: Dims,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    common: Common,
    page_size: usize,
    schedule: Schedule,
}

#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    hq: usize,
    hk: usize,
    s: usize,
    t: usize,
    d: usize,
    dv: usize,
}

pub fn reference_dtype(dtype: Dtype) -> kvlar_reference::Dtype {
    match dtype {
        Dtype::Bf16 => kvlar_reference::Dtype::Bf16,
        Dtype::F16 => kvlar_reference::Dtype::F16,
        Dtype::F32 => kvlar_reference::Dtype::F32,
    }
}

impl Inputs {
    fn read(case: &mut Case) -> Result<Self> {
        let (q, k, v) = (case.floats("q", 4)?, case.floats("k", 4)?, case.floats("v", 4)?);
        let [b, hq, s, d] = q.shape[..] else { return input("q") };
        let (hk, t, dv) = (k.shape[1], k.shape[2], v.shape[3]);
        expect("k", &k.shape, &[b, hk, t, d])?;
        expect("v", &v.shape, &[b, hk, t, dv])?;
        if hk == 0 || !hq.is_multiple_of(hk) || d == 0 || dv == 0 {
            return input(format!("q has {hq} heads of {d} dimensions, k {hk} heads, v {dv} dimensions"));
        }
        let common = Common::read(case, (b, hq, hk, s, t, d))?;
        let page_size: usize = case.scalar("page_size", 64)?;
        if page_size != 0 && (!page_size.is_power_of_two() || !(16..=1 << 20).contains(&page_size)) {
            return input(format!("page_size: {page_size} is neither 0 nor a power of two from 16 to 2^20"));
        }
        let schedule = case.choice("schedule", &[("balanced", Schedule::Balanced), ("own", Schedule::Own)])?;
        case.finish()?;
        let round = |x: Vec<f32>| reference_dtype(common.dtype).round_all(&x);
        Ok(Self {
            dims: Dims { b, hq, hk, s, t, d, dv },
            q: round(q.values),
            k: round(k.values),
            v: round(v.values),
            common,
            page_size,
            schedule,
        })
    }

    fn reference(&self) -> Result<Attended> {
        let Dims { b, hq, hk, s, t, d, dv } = self.dims;
        Ok(kvlar_reference::attend(&AttendInput {
            seqs: b,
            q_heads: hq,
            kv_heads: hk,
            query_rows: s,
            rows: t,
            head_dim: d,
            value_dim: dv,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            lengths: self.common.lengths.as_deref(),
            positions: self.common.positions.as_deref(),
            q_positions: self.common.q_positions.as_deref(),
            sink_logits: self.common.sink_logits.as_deref(),
            scale: Some(self.common.scale),
            softcap: self.common.softcap,
            window: i64::from(self.common.window),
        })?)
    }

    /// Rows of a page; all of them where rows are contiguous.
    fn page_rows(&self) -> usize {
        if self.page_size == 0 { self.dims.t.max(1) } else { self.page_size }
    }

    /// Pages of each sequence lie scattered over the pool, as a cache's do: in reverse order here.
    fn table(&self) -> Vec<i32> {
        let pages = self.dims.b * self.dims.t.max(1).div_ceil(self.page_rows());
        (0..pages as i32).rev().collect()
    }

    /// `[B, Hk, T, dim]` as pages `[page][head][row]`.
    fn paged(&self, x: &[f32], dim: usize) -> Vec<f32> {
        let Dims { b, hk, t, .. } = self.dims;
        if self.page_size == 0 {
            let padding = if t == 0 { b * hk * dim } else { 0 }; // the capacity is at least one row
            return x.iter().copied().chain(std::iter::repeat_n(f32::NAN, padding)).collect();
        }
        let (page_rows, table) = (self.page_rows(), self.table());
        let per_seq = table.len() / b.max(1);
        let mut pool = vec![f32::NAN; table.len() * hk * page_rows * dim];
        for (row, from) in x.chunks_exact(dim).enumerate() {
            let (seq, head, row) = (row / t / hk, row / t % hk, row % t);
            let page = table[seq * per_seq + row / page_rows] as usize;
            pool[((page * hk + head) * page_rows + row % page_rows) * dim..][..dim].copy_from_slice(from);
        }
        pool
    }

    /// The pool of keys or values, as [`Inputs::paged`] lays it out; `pages` a sequence.
    fn pool<'a>(&self, data: View<'a>, pages: usize, dim: usize) -> Pool<View<'a>> {
        let Dims { b, hk, t, .. } = self.dims;
        if self.page_size == 0 {
            Pool::contiguous(data, hk, t.max(1), 2 * dim)
        } else {
            Pool::hnd(data, b * pages, self.page_rows(), hk, 2 * dim, 0)
        }
    }

    /// Positions laid out as the rows are.
    fn stored_positions(&self) -> Option<Vec<i32>> {
        let Dims { b, t, .. } = self.dims;
        let given = self.common.positions.as_ref()?;
        let at = |seq: usize, row: usize| given[if given.len() == t && b * t != t { row } else { seq * t + row }];
        if self.page_size == 0 {
            let positions: Vec<i32> =
                (0..b).flat_map(|seq| (0..t).map(move |row| (seq, row))).map(|(seq, row)| at(seq, row)).collect();
            return Some(if t == 0 { vec![0; b] } else { positions });
        }
        let (page_rows, table) = (self.page_rows(), self.table());
        let mut stored = vec![0; table.len() * page_rows];
        for (seq, row) in (0..b).flat_map(|s| (0..t).map(move |r| (s, r))) {
            stored[table[seq * (table.len() / b) + row / page_rows] as usize * page_rows + row % page_rows] = at(seq, row);
        }
        Some(stored)
    }
}

/// A device and what is needed to move tensors.
pub struct Lab {
    pub device: Device,
    pub stream: Stream,
}

impl Lab {
    pub fn open(backend: Backend, dtype: Dtype) -> Result<Self> {
        if dtype == Dtype::F32 {
            return Err(OpError::Unsupported("dtype f32 runs on the reference only".into()));
        }
        let device = backend.open()?;
        Ok(Self { stream: device.stream()?, device })
    }

    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = self.device.alloc(bytes.len())?;
        self.stream.upload(&mut buffer, 0, bytes)?;
        Ok(buffer)
    }

    pub fn upload_as(&self, values: &[f32], dtype: Dtype) -> Result<Buffer> {
        match dtype {
            Dtype::F32 => self.upload(values),
            Dtype::Bf16 => self.upload(&values.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect::<Vec<_>>()),
            Dtype::F16 => self.upload(&values.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect::<Vec<_>>()),
        }
    }

    pub fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        let mut values = vec![0f32; buffer.len() / 4];
        self.stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

fn on_device(i: &Inputs, backend: Backend) -> Result<Attended> {
    let Dims { b, hq, hk, s, t, d, dv } = i.dims;
    let lab = Lab::open(backend, i.common.dtype)?;
    let codec = if i.common.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
    let max_rows = t.max(1);
    let shape = AttendShape {
        value_dim: dv,
        scale: i.common.scale as f32,
        softcap: i.common.softcap as f32,
        window: i.common.window,
        schedule: i.schedule,
        ..AttendShape::new(i.common.dtype, b, (hq, hk), s.max(1), d, SegmentShape::new(codec, max_rows))
    };
    let plan = shape.plan(&lab.device)?;
    if b * hq * s == 0 {
        return Ok(Attended { out: Vec::new(), lse: Vec::new() });
    }
    let table = lab.upload(&i.table())?;
    let lengths = lab.upload(i.common.lengths.as_deref().unwrap_or(&vec![t as i32; b]))?;
    let positions = i.stored_positions().map(|p| lab.upload(&p)).transpose()?;
    let (page_rows, pages) = (i.page_rows(), i.table().len() / b);
    let mut rows = if i.page_size == 0 {
        Rows::contiguous(Some(lengths.view()), max_rows)
    } else {
        Rows { max_rows, ..Rows::block_table(table.view(), pages, lengths.view(), page_rows)? }
    };
    if i.common.lengths.as_ref().is_some_and(|l| l.len() != b) {
        (rows.length_seq_stride, rows.length_head_stride) = (hk, 1);
    }
    rows.positions = positions.as_ref().map(Buffer::view);
    rows.position_seq_stride = if i.page_size == 0 { max_rows } else { 0 };
    let (keys, values) = (lab.upload_as(&i.paged(&i.k, d), i.common.dtype)?, lab.upload_as(&i.paged(&i.v, dv), i.common.dtype)?);
    let segments = [Segment {
        rows,
        keys: i.pool(keys.view(), pages, d),
        values: i.pool(values.view(), pages, dv),
        tables: Default::default(),
    }];
    let q = lab.upload_as(&i.q, i.common.dtype)?;
    let q_positions = i.common.q_positions.as_ref().map(|p| lab.upload(p)).transpose()?;
    let sinks = i.common.sink_logits.as_ref().map(|x| lab.upload(x)).transpose()?;
    let (mut out, mut lse) = (lab.device.alloc(4 * b * hq * s * dv)?, lab.device.alloc(4 * b * hq * s)?);
    let mut work = plan.work_list(&lab.device)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = AttendArgs {
        q: q.view(),
        q_strides: None,
        out: out.view_mut(),
        out_strides: None,
        lse: Some(lse.view_mut()),
        segments: &segments,
        q_positions: q_positions.as_ref().map(Buffer::view),
        sink_logits: sinks.as_ref().map(Buffer::view),
    };
    plan.schedule(&lab.stream, &args, &mut work, &mut workspace)?;
    plan.launch(&lab.stream, &mut args, &work, &mut workspace)?;
    Ok(Attended { out: lab.download(&out)?, lse: lab.download(&lse)? })
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let Dims { b, hq, s, dv, .. } = i.dims;
    let r = if backend == Backend::Reference { i.reference()? } else { on_device(&i, backend)? };
    Ok(Output::default().floats("out", &[b, hq, s, dv], &r.out).floats("lse", &[b, hq, s], &r.lse))
}
