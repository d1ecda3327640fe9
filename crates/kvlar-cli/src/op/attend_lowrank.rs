//! attend_lowrank.

use super::attention::{Common, Queries};
use super::case::{Case, Output, expect, finite};
use super::lab::{Lab, reference_dtype};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar::{
    AttendShape, Bases, Buffer, Codec, Dtype, HeadSets, Latents, LowrankArgs, LowrankShape, Pool, Rope, Rows, Segment,
    SegmentShape, Workspace, padded_rank,
};
use kvlar_reference::{Attended, Int8Basis, LowrankInput, LowrankValues, RopeLayout, RotaryPairs, encode_row};

#[derive(Clone, Copy)]
struct Dims {
    b: usize,
    hq: usize,
    hk: usize,
    s: usize,
    t: usize,
    d: usize,
    dv: usize,
    key_groups: usize,
    key_rank: usize,
}

enum Values {
    Dense(Vec<f32>),
    Latent { z: Vec<f32>, basis: Vec<f32>, group: Vec<i32>, groups: usize, rank: usize },
}

/// Everything that low-rank attention reads, rounded and checked.
struct Inputs {
    dims: Dims,
    q: Vec<f32>,
    zk: Vec<f32>,
    uk: Vec<f32>,
    group_k: Vec<i32>,
    mean: Option<Vec<f32>>,
    values: Values,
    rope: kvlar_reference::Rope,
    common: Common,
    latents: Latents,
}

/// A basis `[Hk, dim, rank]` or `[B, Hk, dim, rank]`.
fn basis(case: &mut Case, name: &str, b: usize, hk: usize, dim: usize, rank: usize) -> Result<Vec<f32>> {
    let Some(u) = case.floats_if_any(name)? else { return input(format!("no tensor {name}")) };
    if u.shape != [hk, dim, rank] {
        expect(name, &u.shape, &[b, hk, dim, rank])?;
    }
    Ok(u.values)
}

fn groups(case: &mut Case, name: &str, hk: usize, groups: usize) -> Result<Vec<i32>> {
    let Some(group) = case.ints(name, &[&[hk]])? else { return input(format!("no tensor {name}")) };
    match group.iter().find(|&&g| g < 0 || g as usize >= groups) {
        Some(bad) => input(format!("{name}: {bad} is not one of {groups} latent groups")),
        None => Ok(group),
    }
}

impl Inputs {
    fn read(case: &mut Case) -> Result<Self> {
        let (q, zk) = (case.floats("q", 4)?, case.floats("zk", 4)?);
        let ([b, hq, s, d], [zb, key_groups, t, key_rank]) = (shape4(&q.shape), shape4(&zk.shape));
        let Some(uk) = case.shape("uk") else { return input("no tensor uk") };
        if !(3..=4).contains(&uk.len()) {
            return input(format!("uk is {uk:?}; it must be [Hk, d, rk] or [B, Hk, d, rk]"));
        }
        let hk = uk[uk.len() - 3];
        if hk == 0 || !hq.is_multiple_of(hk) || d == 0 || key_rank == 0 {
            return input(format!("q has {hq} heads of {d} dimensions, uk {hk} heads, zk a rank of {key_rank}"));
        }
        if zb != b {
            return input(format!("zk is of {zb} sequences, q of {b}"));
        }
        if s > 8 {
            return input(format!("q has {s} query rows; up to 8 are possible"));
        }
        let uk = basis(case, "uk", b, hk, d, key_rank)?;
        let group_k = groups(case, "group_k", hk, key_groups)?;
        let mean = case.floats_if_any("mean_k")?;
        if let Some(m) = &mean {
            expect("mean_k", &m.shape, &[hk, d])?;
        }
        let (v, zv) = (case.floats_if_any("v")?, case.floats_if_any("zv")?);
        let (values, dv) = match (v, zv) {
            (Some(_), Some(_)) => return input("v and zv are both there: values are dense or latents"),
            (None, None) => return input("no tensor v, nor zv with uv and group_v"),
            (Some(v), None) => {
                let dv = v.shape.last().copied().unwrap_or(0);
                expect("v", &v.shape, &[b, hk, t, dv])?;
                (Values::Dense(v.values), dv)
            }
            (None, Some(z)) => {
                let (Some(uv), [_, groups_v, _, rank]) = (case.shape("uv"), shape4(&z.shape)) else {
                    return input("no tensor uv");
                };
                expect("zv", &z.shape, &[b, groups_v, t, rank])?;
                let dv = if uv.len() >= 3 { uv[uv.len() - 2] } else { 0 };
                let basis = basis(case, "uv", b, hk, dv, rank)?;
                let group = groups(case, "group_v", hk, groups_v)?;
                (Values::Latent { z: z.values, basis, group, groups: groups_v, rank }, dv)
            }
        };
        if dv == 0 {
            return input("values have no dimensions");
        }
        let inv_freq = case.floats("inv_freq", 1)?.values;
        if 2 * inv_freq.len() > d {
            return input(format!("inv_freq: {} frequencies rotate more than {d} dimensions", inv_freq.len()));
        }
        let layout = case.choice("rope", &[("half", RopeLayout::Half), ("interleaved", RopeLayout::Interleaved)])?;
        let attention_factor = finite("attention_factor", case.scalar("attention_factor", 1.0)?)? as f32;
        let common = Common::read(case, (b, hq, hk, s, t, d))?;
        let latents = case.choice("latent", &[("dtype", Latents::Dtype), ("int8", Latents::Int8)])?;
        let basis = case.choice("basis", &[("dtype", Latents::Int8), ("int8", Latents::Int8Basis)])?;
        if basis == Latents::Int8Basis && latents != Latents::Int8 {
            return input("basis: int8 needs latent = int8");
        }
        case.finish()?;
        let round = |x: Vec<f32>| reference_dtype(common.dtype).round_all(&x);
        let values = match values {
            Values::Dense(v) => Values::Dense(round(v)),
            Values::Latent { z, basis, group, groups, rank } => Values::Latent { z: round(z), basis, group, groups, rank },
        };
        Ok(Self {
            dims: Dims { b, hq, hk, s, t, d, dv, key_groups, key_rank },
            q: round(q.values),
            zk: round(zk.values),
            uk,
            group_k,
            mean: mean.map(|m| m.values),
            values,
            rope: kvlar_reference::Rope { inv_freq, attention_factor, layout },
            common,
            latents: if latents == Latents::Dtype { latents } else { basis },
        })
    }

    fn pairs(&self) -> RotaryPairs {
        RotaryPairs { rotary_dim: self.rope.rotary_dim(), half: self.rope.layout == RopeLayout::Half }
    }

    /// The key basis in 8 bits, of all sequences that have one.
    fn int8_basis(&self) -> Result<Int8Basis> {
        let Dims { d, key_rank, .. } = self.dims;
        Ok(Int8Basis::quantize(&self.uk, self.mean.as_deref(), self.uk.len() / (d * key_rank), d, key_rank, self.pairs())?)
    }

    fn reference(&self) -> Result<Attended> {
        let Dims { b, hq, hk, s, t, d, dv, key_groups, key_rank } = self.dims;
        let dequantized;
        let key_basis = if self.latents == Latents::Int8Basis {
            dequantized = self.int8_basis()?.dequantize(d, key_rank, self.pairs());
            &dequantized
        } else {
            &self.uk
        };
        Ok(kvlar_reference::attend_lowrank(&LowrankInput {
            seqs: b,
            q_heads: hq,
            kv_heads: hk,
            query_rows: s,
            rows: t,
            head_dim: d,
            value_dim: dv,
            key_groups,
            key_rank,
            q: &self.q,
            zk: &self.zk,
            key_basis,
            group_k: &self.group_k,
            key_mean: self.mean.as_deref(),
            values: match &self.values {
                Values::Dense(v) => LowrankValues::Dense(v),
                Values::Latent { z, basis, group, groups, rank } => {
                    LowrankValues::Latent { z, basis, group, groups: *groups, rank: *rank }
                }
            },
            rope: &self.rope,
            int8_latents: self.latents != Latents::Dtype,
            lengths: self.common.lengths.as_deref(),
            positions: self.common.positions.as_deref(),
            q_positions: self.common.q_positions.as_deref(),
            sink_logits: self.common.sink_logits.as_deref(),
            scale: Some(self.common.scale),
            softcap: self.common.softcap,
            window: i64::from(self.common.window),
        })?)
    }
}

fn shape4(shape: &[usize]) -> [usize; 4] {
    <[usize; 4]>::try_from(shape).unwrap_or_default()
}

/// Rows of `rank` values as the cache holds them: encoded, padded to a multiple of 32, contiguous, scales behind the rows of
/// each (sequence, group).
struct Stored {
    bytes: Vec<u8>,
    row: usize,
    params: usize,
    head: usize,
}

fn store(x: &[f32], heads: usize, t: usize, rank: usize, padded: usize, codec: Codec) -> Result<Stored> {
    let (row, params) = (codec.row_bytes(padded), codec.params_bytes(rank, rank));
    let head = (t.max(1) * (row + params)).next_multiple_of(16);
    let mut bytes = vec![0u8; heads * head];
    for (i, x) in x.chunks_exact(rank).enumerate() {
        let stored = encode_row(x, codec.reference(), rank)?;
        let start = i / t * head;
        bytes[start + i % t * row..][..stored.codes.len().min(row)].copy_from_slice(&stored.codes[..stored.codes.len().min(row)]);
        bytes[start + t * row + i % t * params..][..params].copy_from_slice(&stored.params);
    }
    Ok(Stored { bytes, row, params, head })
}

impl Stored {
    fn pool<'a>(&self, data: &'a Buffer, groups: usize, t: usize) -> Pool<kvlar::View<'a>> {
        let mut pool = Pool::contiguous(data.view(), groups, t.max(1), self.row);
        pool.head_stride = self.head;
        pool.seq_stride = groups * self.head;
        (pool.params_offset, pool.params_stride) = (t.max(1) * self.row, self.params);
        pool
    }
}

/// Basis rows of `rank` values, padded with zeros.
fn padded_basis(basis: &[f32], rank: usize, padded: usize) -> Vec<f32> {
    basis.chunks_exact(rank).flat_map(|row| row.iter().copied().chain(std::iter::repeat(0.0)).take(padded)).collect()
}

fn on_device(i: &Inputs, backend: Backend) -> Result<Attended> {
    let Dims { b, hq, hk, s, t, d, dv, key_groups, key_rank } = i.dims;
    let lab = Lab::open(backend, i.common.dtype)?;
    let native = if i.common.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
    let codec = if i.latents == Latents::Dtype { native } else { Codec::Int8 };
    let (max_rows, padded) = (t.max(1), padded_rank(key_rank));
    let group_v = if let Values::Latent { group, .. } = &i.values { Some(group.as_slice()) } else { None };
    let sets = HeadSets::new(&lab.device, &lab.stream, &i.group_k, group_v)?;
    let (values, value_rows, value_heads, value_basis) = match &i.values {
        Values::Dense(v) => (kvlar::LowrankValues::Dense, store(v, b * hk, t, dv, dv, native)?, hk, None),
        Values::Latent { z, basis, groups, rank, .. } => {
            let wide = padded_rank(*rank);
            let rows = store(z, b * groups, t, *rank, wide, codec)?;
            (kvlar::LowrankValues::Latent { rank: wide, codec }, rows, *groups, Some(padded_basis(basis, *rank, wide)))
        }
    };
    let attend = AttendShape {
        value_dim: dv,
        scale: i.common.scale as f32,
        softcap: i.common.softcap as f32,
        window: i.common.window,
        ..AttendShape::new(i.common.dtype, b, (hq, hk), s.max(1), d, SegmentShape::new(native, max_rows))
    };
    let shape = LowrankShape {
        key_mean: i.mean.is_some(),
        stored_positions: i.common.positions.is_some(),
        ..LowrankShape::new(attend, max_rows, padded, i.latents, values, sets.shape())
    };
    let plan = shape.plan(&lab.device)?;
    if b * hq * s == 0 {
        return Ok(Attended { out: Vec::new(), lse: Vec::new() });
    }
    let key_rows = store(&i.zk, b * key_groups, t, key_rank, padded, codec)?;
    let (keys, values) = (lab.upload(&key_rows.bytes)?, lab.upload(&value_rows.bytes)?);
    let lengths = lab.upload(i.common.lengths.as_deref().unwrap_or(&vec![t as i32; b]))?;
    let positions = i.common.positions.as_ref().map(|p| {
        let all: Vec<i32> = if p.len() == t { (0..b).flat_map(|_| p.iter().copied()).collect() } else { p.clone() };
        lab.upload(&if t == 0 { vec![0; b] } else { all })
    });
    let positions = positions.transpose()?;
    let mut rows = Rows::contiguous(Some(lengths.view()), max_rows);
    if i.common.lengths.as_ref().is_some_and(|l| l.len() != b) {
        (rows.length_seq_stride, rows.length_head_stride) = (hk, 1);
    }
    rows.positions = positions.as_ref().map(Buffer::view);
    rows.position_seq_stride = max_rows;
    let segments = [Segment {
        rows,
        keys: key_rows.pool(&keys, key_groups, t),
        values: value_rows.pool(&values, value_heads, t),
        tables: Default::default(),
    }];
    let wide_basis = padded_basis(&i.uk, key_rank, padded);
    let int8 = if i.latents == Latents::Int8Basis {
        Some(Int8Basis::quantize(&wide_basis, i.mean.as_deref(), wide_basis.len() / (d * padded), d, padded, i.pairs())?)
    } else {
        None
    };
    let key_basis = match &int8 {
        Some(int8) => lab.upload(&int8.codes)?,
        None => lab.upload_as(&wide_basis, if i.latents == Latents::Int8 { Dtype::F16 } else { i.common.dtype })?,
    };
    let key_scales = int8.as_ref().map(|x| lab.upload(&x.scales)).transpose()?;
    let mean = i.mean.as_ref().map(|m| lab.upload(m)).transpose()?;
    let value_basis_buffer = value_basis.as_ref().map(|u| lab.upload_as(u, i.common.dtype)).transpose()?;
    let inv_freq = lab.upload(&i.rope.inv_freq)?;
    let mut queries = Queries::upload(&lab, &i.q, &i.common, b * hq * s, dv)?;
    let mut work = plan.work_list(&lab.device)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let values_per_seq = value_basis.as_ref().is_some_and(|u| b > 1 && u.len() == b * hk * dv * shape_rank(&shape));
    let mut args = LowrankArgs {
        attend: queries.args(&segments),
        bases: Bases {
            keys: key_basis.view(),
            keys_per_seq: b > 1 && i.uk.len() == b * hk * d * key_rank,
            key_scales: key_scales.as_ref().map(Buffer::view),
            key_mean: mean.as_ref().map(Buffer::view),
            values: value_basis_buffer.as_ref().map(Buffer::view),
            values_per_seq,
        },
        rope: Some(Rope {
            inv_freq: inv_freq.view(),
            rotary_dim: i.rope.rotary_dim(),
            layout: i.rope.layout,
            attention_factor: i.rope.attention_factor,
        }),
        sets: &sets,
    };
    plan.schedule(&lab.stream, &args, &mut work, &mut workspace)?;
    plan.launch(&lab.stream, &mut args, &work, &mut workspace)?;
    queries.attended(&lab)
}

fn shape_rank(shape: &LowrankShape) -> usize {
    match shape.values {
        kvlar::LowrankValues::Dense => 0,
        kvlar::LowrankValues::Latent { rank, .. } => rank,
    }
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let Dims { b, hq, s, dv, .. } = i.dims;
    let r = if backend == Backend::Reference { i.reference()? } else { on_device(&i, backend)? };
    if r.out.len() != b * hq * s * dv {
        return Err(OpError::Other("the device gave another number of results".into()));
    }
    Ok(Output::default().floats("out", &[b, hq, s, dv], &r.out).floats("lse", &[b, hq, s], &r.lse))
}
