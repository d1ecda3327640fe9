//! append.

use super::case::{Case, Output, expect, finite};
use super::formats::{Stored, group};
use super::lab::{Lab, reference_dtype};
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{AppendArgs, AppendShape, Dtype, EncodeShape, Format, Pool, RopeLayout, Rows, Tables, Workspace};
use kvlar_reference::{AppendInput, Appended, Codec, Rope};

/// A codec whose rows can be written one by one, to any slot.
fn token_wise(case: &mut Case, key: &'static str, default: &str, group: Option<usize>, dim: usize) -> Result<Stored> {
    let stored = Stored::read(case, key, Some(default), group, dim)?;
    let format = stored.format;
    if format.codec.is_channel_wise() {
        return input(format!("{key}: {format} encodes groups of rows; append writes rows one by one (encode takes it)"));
    }
    if format.codec == Codec::Pq {
        return input(format!("{key}: {format} needs codebooks, which append does not take (encode and scan do)"));
    }
    Ok(stored)
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (k, v) = (case.floats("k", 4)?, case.floats("v", 4)?);
    let inv_freq = case.floats("inv_freq", 1)?.values;
    let ([b, h, s, d], dv) = (<[usize; 4]>::try_from(k.shape).unwrap_or_default(), v.shape[3]);
    expect("v", &v.shape, &[b, h, s, dv])?;
    if d == 0 || dv == 0 {
        return input(format!("k has {d} dimensions, v {dv}"));
    }
    if 2 * inv_freq.len() > d {
        return input(format!("inv_freq: {} frequencies rotate more than {d} dimensions", inv_freq.len()));
    }
    let Some(positions) = case.ints("positions", &[&[b, s]])? else { return input("no tensor positions") };
    let slots = case.ints("slots", &[&[b, s]])?.unwrap_or_else(|| (0..b).flat_map(|_| 0..s as i32).collect());
    for row in slots.chunks(s.max(1)) {
        if let Some(bad) = row.iter().find(|&&x| x < -1 || x >= s as i32) {
            return input(format!("slots: {bad} is neither -1 nor below {s}"));
        }
        if let Some(twice) = row.iter().enumerate().find(|(i, x)| **x >= 0 && row[..*i].contains(x)) {
            return input(format!("slots: {} is there twice", twice.1));
        }
    }
    let dtype = case.dtype()?;
    let default = if dtype == Dtype::F16 { "f16" } else { "bf16" };
    let group = group(case)?;
    let keys = token_wise(case, "key_codec", default, group, d)?.with_scales(case, "k_scale", h)?;
    let values = token_wise(case, "value_codec", default, group, dv)?.with_scales(case, "v_scale", h)?;
    let layout = case.choice("rope", &[("half", RopeLayout::Half), ("interleaved", RopeLayout::Interleaved)])?;
    let attention_factor = finite("attention_factor", case.scalar("attention_factor", 1.0)?)? as f32;
    case.finish()?;
    let (k, v) = (reference_dtype(dtype).round_all(&k.values), reference_dtype(dtype).round_all(&v.values));
    let rope = Rope { inv_freq, attention_factor, layout };
    let out = if backend == Backend::Reference {
        kvlar_reference::append(&AppendInput {
            seqs: b,
            kv_heads: h,
            new_rows: s,
            head_dim: d,
            value_dim: dv,
            k: &k,
            v: &v,
            positions: &positions,
            slots: &slots,
            rope: &rope,
            keys: keys.storage(),
            values: values.storage(),
        })?
    } else {
        let shape = AppendShape {
            dtype,
            key_format: keys.launched()?,
            value_format: values.launched()?,
            seqs: b,
            kv_heads: h,
            new_rows: s,
            head_dim: d,
            value_dim: dv,
        };
        on_device(&shape, backend, [&keys, &values], [&k, &v], [&positions, &slots], &rope)?
    };
    Ok(Output::default().floats("k_decoded", &[b, h, s, d], &out.k_decoded).floats("v_decoded", &[b, h, s, dv], &out.v_decoded))
}

/// Appends into pages of 64 rows, then reads everything back with decode.
fn on_device(
    shape: &AppendShape,
    backend: Backend,
    stored: [&Stored; 2],
    kv: [&[f32]; 2],
    ints: [&[i32]; 2],
    rope: &Rope,
) -> Result<Appended> {
    const PAGE: usize = 64;
    let AppendShape { seqs: b, kv_heads: h, new_rows: s, head_dim: d, value_dim: dv, dtype, .. } = *shape;
    let lab = Lab::open(backend, dtype)?;
    let plan = shape.plan(&lab.device)?;
    if b * h * s == 0 {
        return Ok(Appended { k_decoded: Vec::new(), v_decoded: Vec::new() });
    }
    let pages = s.div_ceil(PAGE);
    let table = lab.upload(&(0..(b * pages) as i32).rev().collect::<Vec<_>>())?;
    let lengths = lab.upload(&vec![s as i32; b])?;
    let rows = Rows { max_rows: s, ..Rows::block_table(table.view(), pages, lengths.view(), PAGE)? };
    let sizes = |format: Format, dim: usize| (format.row_bytes(dim), format.params_bytes(dim));
    let (key, value) = (sizes(shape.key_format, d), sizes(shape.value_format, dv));
    let scales = [stored[0].upload_tables(&lab)?, stored[1].upload_tables(&lab)?];
    let [key_scales, value_scales] = scales.each_ref().map(|s| s.as_ref().map(kvlar::Buffer::view));
    let mut keys = lab.device.alloc(b * pages * h * PAGE * (key.0 + key.1))?;
    let mut values = lab.device.alloc(b * pages * h * PAGE * (value.0 + value.1))?;
    let (k, v) = (lab.upload_as(kv[0], dtype)?, lab.upload_as(kv[1], dtype)?);
    let (positions, slots, inv_freq) = (lab.upload(ints[0])?, lab.upload(ints[1])?, lab.upload(&rope.inv_freq)?);
    let mut workspace = Workspace::new(&lab.device, Default::default())?;
    let mut args = AppendArgs {
        k: k.view(),
        k_strides: None,
        v: v.view(),
        v_strides: None,
        positions: positions.view(),
        slots: slots.view(),
        slots_per_head: false,
        rope: Some(kvlar::Rope {
            inv_freq: inv_freq.view(),
            rotary_dim: rope.rotary_dim(),
            layout: rope.layout,
            attention_factor: rope.attention_factor,
        }),
        rows,
        row_positions: None,
        keys: Pool::hnd(keys.view_mut(), b * pages, PAGE, h, key.0, key.1),
        values: Pool::hnd(values.view_mut(), b * pages, PAGE, h, value.0, value.1),
        tables: Tables { keys: key_scales, values: value_scales },
        key_scores: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    let read = |buffer: &kvlar::Buffer,
                (format, scales): (Format, Option<kvlar::View<'_>>),
                dim: usize,
                (row, params): (usize, usize)|
     -> Result<Vec<f32>> {
        let shape = EncodeShape { format, dtype: Dtype::F32, seqs: b, heads: h, rows: s, dim };
        let mut out = lab.device.alloc(4 * b * h * s * dim)?;
        let pool = Pool::hnd(buffer.view(), b * pages, PAGE, h, row, params);
        shape.plan(&lab.device)?.decode(&lab.stream, &rows, &pool, scales, &mut out.view_mut())?;
        let mut decoded = lab.download(&out)?;
        // Rows that nothing was written to.
        for (i, row) in decoded.chunks_exact_mut(dim).enumerate() {
            let (seq, slot) = (i / s / h, (i % s) as i32);
            if !ints[1][seq * s..(seq + 1) * s].contains(&slot) {
                row.fill(0.0);
            }
        }
        Ok(decoded)
    };
    Ok(Appended {
        k_decoded: read(&keys, (shape.key_format, key_scales), d, key)?,
        v_decoded: read(&values, (shape.value_format, value_scales), dv, value)?,
    })
}
