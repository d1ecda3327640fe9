//! Low-rank keys and values: projection to latents, and attention over latents.

use crate::attend::dot;
use crate::error::{ReferenceError, shape, value};
use crate::{AttendInput, Attended, Codec, Rope, attend, decode_row, encode_row};

/// Inputs of [`project`]; names as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct ProjectInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// T.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// n: latent groups.
    pub groups: usize,
    /// kv heads a group.
    pub size: usize,
    /// r.
    pub rank: usize,
    /// `[B, Hk, T, d]`, before RoPE.
    pub k: &'a [f32],
    /// `[n, r, size · d]`.
    pub encoder: &'a [f32],
    /// `[n, size]`: the kv heads of each group.
    pub members: &'a [i32],
    /// `[Hk, d]`, taken off first.
    pub mean: Option<&'a [f32]>,
}

/// Latents `[B, n, T, r]`: z = encoder · the group's heads' rows, one after the other (ReCalKV §3.2, eq. 4).
///
/// # Errors
/// A tensor of the wrong size, a member that is no kv head.
pub fn project(i: &ProjectInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    let (d, r) = (i.head_dim, i.rank);
    shape("k", i.k.len(), &[i.seqs, i.kv_heads, i.rows, d])?;
    shape("encoder", i.encoder.len(), &[i.groups, r, i.size * d])?;
    shape("groups", i.members.len(), &[i.groups, i.size])?;
    if let Some(mean) = i.mean {
        shape("mean", mean.len(), &[i.kv_heads, d])?;
    }
    if let Some(bad) = i.members.iter().find(|&&m| m < 0 || m as usize >= i.kv_heads) {
        return value("groups", format!("{bad} is not one of {} kv heads", i.kv_heads));
    }
    let mut out = Vec::with_capacity(i.seqs * i.groups * i.rows * r);
    let mut row = vec![0f64; i.size * d];
    for (b, n, t) in (0..i.seqs).flat_map(|b| (0..i.groups).flat_map(move |n| (0..i.rows).map(move |t| (b, n, t)))) {
        for (j, &head) in i.members[n * i.size..][..i.size].iter().enumerate() {
            let from = &i.k[((b * i.kv_heads + head as usize) * i.rows + t) * d..][..d];
            for (c, &x) in from.iter().enumerate() {
                row[j * d + c] = f64::from(x) - i.mean.map_or(0.0, |m| f64::from(m[head as usize * d + c]));
            }
        }
        let encoder = &i.encoder[n * r * row.len()..][..r * row.len()];
        out.extend(encoder.chunks_exact(row.len()).map(|e| dot(e, &row) as f32));
    }
    Ok(out)
}

/// `dims` numbers from a latent row: basis · z (+ mean), in f64, rounded to f32.
pub fn expand_row(basis: &[f32], z: &[f32], mean: Option<&[f32]>, dims: usize) -> Vec<f32> {
    let r = z.len();
    (0..dims).map(|c| (dot(&basis[c * r..][..r], z) + mean.map_or(0.0, |m| f64::from(m[c]))) as f32).collect()
}

/// Values of a low-rank attention.
#[derive(Clone, Copy, Debug)]
pub enum LowrankValues<'a> {
    /// `[B, Hk, T, dv]`.
    Dense(&'a [f32]),
    /// Latents `[B, Nv, T, rv]`, their basis `[Hk, dv, rv]` or `[B, Hk, dv, rv]`, and which latents each kv head reads.
    Latent {
        /// `[B, Nv, T, rv]`.
        z: &'a [f32],
        /// `[Hk, dv, rv]` or `[B, Hk, dv, rv]`.
        basis: &'a [f32],
        /// `[Hk]`.
        group: &'a [i32],
        /// Nv.
        groups: usize,
        /// rv.
        rank: usize,
    },
}

/// Inputs of [`attend_lowrank`]; names and defaults as in `OPS.md`.
#[derive(Clone, Debug)]
pub struct LowrankInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// S.
    pub query_rows: usize,
    /// T.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// dv.
    pub value_dim: usize,
    /// Nk.
    pub key_groups: usize,
    /// rk.
    pub key_rank: usize,
    /// `[B, Hq, S, d]`, rotated.
    pub q: &'a [f32],
    /// `[B, Nk, T, rk]`, before RoPE.
    pub zk: &'a [f32],
    /// `[Hk, d, rk]` or `[B, Hk, d, rk]`.
    pub key_basis: &'a [f32],
    /// `[Hk]`: which latents each kv head reads.
    pub group_k: &'a [i32],
    /// `[Hk, d]`.
    pub key_mean: Option<&'a [f32]>,
    /// Values.
    pub values: LowrankValues<'a>,
    /// How rebuilt keys are rotated.
    pub rope: &'a Rope,
    /// Store latents as int8, a scale and zero a row, and read them back.
    pub int8_latents: bool,
    /// `[B]` or `[B, Hk]`; default T.
    pub lengths: Option<&'a [i32]>,
    /// `[T]` or `[B, T]`; default the row index.
    pub positions: Option<&'a [i32]>,
    /// `[B, S]`; default the position of row length − S + s.
    pub q_positions: Option<&'a [i32]>,
    /// `[Hq]`.
    pub sink_logits: Option<&'a [f32]>,
    /// Default 1/√d.
    pub scale: Option<f64>,
    /// 0 = off.
    pub softcap: f64,
    /// 0 = off.
    pub window: i64,
}

/// Latent rows as they are read: through int8 if so stored.
fn stored_latents(z: &[f32], rank: usize, int8: bool) -> Result<Vec<f32>, ReferenceError> {
    if !int8 {
        return Ok(z.to_vec());
    }
    let mut out = Vec::with_capacity(z.len());
    for row in z.chunks_exact(rank.max(1)) {
        let stored = encode_row(row, Codec::Int8, rank)?;
        out.extend(decode_row(&stored.codes, &stored.params, rank, Codec::Int8, rank)?);
    }
    Ok(out)
}

fn check_groups(name: &'static str, group: &[i32], kv_heads: usize, groups: usize) -> Result<(), ReferenceError> {
    shape(name, group.len(), &[kv_heads])?;
    match group.iter().find(|&&g| g < 0 || g as usize >= groups) {
        Some(bad) => value(name, format!("{bad} is not one of {groups} latent groups")),
        None => Ok(()),
    }
}

fn check_basis(name: &'static str, elements: usize, seqs: usize, one: [usize; 3]) -> Result<bool, ReferenceError> {
    let each = one.iter().product::<usize>();
    if elements != each && elements == seqs * each {
        return Ok(true);
    }
    shape(name, elements, &one).map(|()| false)
}

/// Attention over low-rank keys: k = RoPE(basis · z + mean), then as [`crate::attend`] (ReCalKV §3.2; Palu §3.3).
///
/// # Errors
/// A tensor of the wrong size, a group that does not exist.
pub fn attend_lowrank(i: &LowrankInput<'_>) -> Result<Attended, ReferenceError> {
    let (d, dv, r, hk, t) = (i.head_dim, i.value_dim, i.key_rank, i.kv_heads, i.rows);
    shape("zk", i.zk.len(), &[i.seqs, i.key_groups, t, r])?;
    let per_seq_keys = check_basis("uk", i.key_basis.len(), i.seqs, [hk, d, r])?;
    check_groups("group_k", i.group_k, hk, i.key_groups)?;
    if let Some(mean) = i.key_mean {
        shape("mean_k", mean.len(), &[hk, d])?;
    }
    i.rope.check(d)?;
    let zk = stored_latents(i.zk, r, i.int8_latents)?;
    let zv = match i.values {
        LowrankValues::Dense(v) => {
            shape("v", v.len(), &[i.seqs, hk, t, dv])?;
            Vec::new()
        }
        LowrankValues::Latent { z, basis, group, groups, rank } => {
            shape("zv", z.len(), &[i.seqs, groups, t, rank])?;
            check_basis("uv", basis.len(), i.seqs, [hk, dv, rank])?;
            check_groups("group_v", group, hk, groups)?;
            stored_latents(z, rank, i.int8_latents)?
        }
    };
    if let Some(x) = i.positions.filter(|x| x.len() != t) {
        shape("positions", x.len(), &[i.seqs, t])?;
    }
    let position = |b: usize, row: usize| match i.positions {
        None => row as i64,
        Some(p) => i64::from(p[if p.len() == t { row } else { b * t + row }]),
    };
    let (mut keys, mut values) = (Vec::with_capacity(i.seqs * hk * t * d), Vec::new());
    for (b, h) in (0..i.seqs).flat_map(|b| (0..hk).map(move |h| (b, h))) {
        let basis = &i.key_basis[(if per_seq_keys { b * hk } else { 0 } + h) * d * r..][..d * r];
        let mean = i.key_mean.map(|m| &m[h * d..][..d]);
        let latents = &zk[(b * i.key_groups + i.group_k[h] as usize) * t * r..];
        for row in 0..t {
            keys.extend(i.rope.rotate(&expand_row(basis, &latents[row * r..][..r], mean, d), position(b, row)));
        }
        if let LowrankValues::Latent { basis, group, groups, rank, .. } = i.values {
            let at = if basis.len() == hk * dv * rank { h } else { b * hk + h };
            let latents = &zv[(b * groups + group[h] as usize) * t * rank..];
            for row in 0..t {
                values.extend(expand_row(&basis[at * dv * rank..][..dv * rank], &latents[row * rank..][..rank], None, dv));
            }
        }
    }
    attend(&AttendInput {
        seqs: i.seqs,
        q_heads: i.q_heads,
        kv_heads: hk,
        query_rows: i.query_rows,
        rows: t,
        head_dim: d,
        value_dim: dv,
        q: i.q,
        k: &keys,
        v: if let LowrankValues::Dense(v) = i.values { v } else { &values },
        lengths: i.lengths,
        positions: i.positions,
        q_positions: i.q_positions,
        sink_logits: i.sink_logits,
        scale: i.scale,
        softcap: i.softcap,
        window: i.window,
    })
}
