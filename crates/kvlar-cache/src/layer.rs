//! How a layer keeps its rows: token-wise, or as latents.

use crate::error::invalid;
use crate::{CacheConfig, Result};
use half::{bf16, f16};
use kvlar::{
    AppendLowrankArgs, AppendLowrankShape, AttendShape, Bases, Buffer, Codec, Device, Dtype, HeadGroups, HeadSets, Latents,
    LowrankShape, LowrankValues, Memory, Pool, Projection, SegmentShape, SideArgs, SideShape, Stream, View, ViewMut,
};
use kvlar_calibrate::{Factors, Latent, LayerPlan, Side};

/// Rows of one side: keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowFormat {
    pub codec: Codec,
    /// Latent groups, or kv heads.
    pub heads: usize,
    /// Values a row.
    pub dim: usize,
}

impl RowFormat {
    /// Bytes of a token's rows, with scales, zeros and padding.
    pub fn token_bytes(&self) -> usize {
        self.heads * (self.codec.row_bytes(self.dim) + self.codec.params_bytes(self.dim, self.dim))
    }

    /// Pages: `[page][head][row]`, scales and zeros of a head behind its rows.
    pub fn pool<M: Memory>(&self, config: &CacheConfig, data: M) -> Pool<M> {
        let (row, params) = (self.codec.row_bytes(self.dim), self.codec.params_bytes(self.dim, self.dim));
        Pool::hnd(data, config.pages, config.page_rows, self.heads, row, params)
    }
}

/// A layer's memory, and what it needs to fill and read it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub keys: (RowFormat, Buffer),
    pub values: (RowFormat, Buffer),
    pub lowrank: Option<LowrankLayer>,
}

/// The matrices of a low-rank layer, on the device.
#[derive(Debug)]
pub(crate) struct LowrankLayer {
    sets: HeadSets,
    latents: Latents,
    keys: DeviceFactors,
    mean: Option<Buffer>,
    values: Option<DeviceFactors>,
    bytes: usize,
}

#[derive(Debug)]
struct DeviceFactors {
    encoder: Buffer,
    basis: Buffer,
    groups: HeadGroups,
    size: usize,
    count: usize,
    rank: usize,
    codec: Codec,
}

impl Layer {
    /// Rows as `config.codec` says.
    pub fn token_wise(device: &Device, config: &CacheConfig) -> Result<Self> {
        let rows = |dim| RowFormat { codec: config.codec, heads: config.kv_heads, dim };
        Self::alloc(device, config, rows(config.head_dim), rows(config.value_dim), None)
    }

    fn alloc(
        device: &Device,
        config: &CacheConfig,
        keys: RowFormat,
        values: RowFormat,
        lowrank: Option<LowrankLayer>,
    ) -> Result<Self> {
        let rows = config.pages * config.page_rows;
        let buffer = |f: &RowFormat| device.alloc(rows * f.token_bytes());
        Ok(Self { keys: (keys, buffer(&keys)?), values: (values, buffer(&values)?), lowrank })
    }

    /// As a plan says. Keys that stay dense beside low-rank values become latents of full rank, one group a head: the same
    /// bytes.
    pub fn planned(device: &Device, stream: &Stream, config: &CacheConfig, plan: &LayerPlan) -> Result<Self> {
        if plan.keys == Side::Dense && plan.values == Side::Dense {
            return Self::token_wise(device, config);
        }
        let identity;
        let keys = match &plan.keys {
            Side::LowRank(f) => f,
            Side::Dense => {
                identity = identity_factors(config.kv_heads, config.head_dim);
                &identity
            }
        };
        let values = plan.values.factors();
        check(keys, "keys", config.kv_heads, config.head_dim)?;
        if let Some(values) = values {
            check(values, "values", config.kv_heads, config.value_dim)?;
            if values.mean.is_some() {
                return invalid("plan", "value latents with a mean: fit the plan without");
            }
            if values.latent != keys.latent && values.latent != Latent::Model {
                return invalid("plan", format!("{:?} value latents beside {:?} key latents", values.latent, keys.latent));
            }
        }
        let latents = match keys.latent {
            Latent::Model => Latents::Dtype,
            Latent::Int8 => Latents::Int8,
            Latent::Int4 => Latents::Int4,
        };
        let group_v = values.map(Factors::group_of);
        let basis_type = if latents == Latents::Dtype { config.dtype } else { Dtype::F16 };
        let key_factors = DeviceFactors::new(device, stream, config, keys, basis_type)?;
        let value_factors = values.map(|f| DeviceFactors::new(device, stream, config, f, config.dtype)).transpose()?;
        let mean = keys.mean.as_ref().map(|m| upload(device, stream, bytemuck::cast_slice(m))).transpose()?;
        let all = [Some(&key_factors), value_factors.as_ref()];
        let matrices: usize = all.into_iter().flatten().map(|f| f.encoder.len() + f.basis.len()).sum();
        let key_rows = RowFormat { codec: key_factors.codec, heads: key_factors.count, dim: key_factors.rank };
        let value_rows = match &value_factors {
            Some(f) => RowFormat { codec: f.codec, heads: f.count, dim: f.rank },
            None => RowFormat { codec: native(config.dtype), heads: config.kv_heads, dim: config.value_dim },
        };
        let lowrank = LowrankLayer {
            sets: HeadSets::new(device, stream, &keys.group_of(), group_v.as_deref())?,
            latents,
            bytes: matrices + mean.as_ref().map_or(0, Buffer::len),
            keys: key_factors,
            mean,
            values: value_factors,
        };
        Self::alloc(device, config, key_rows, value_rows, Some(lowrank))
    }

    /// Bytes that a token takes.
    pub fn token_bytes(&self) -> usize {
        self.keys.0.token_bytes() + self.values.0.token_bytes()
    }

    /// Bytes that do not grow: bases, encoders, means.
    pub fn fixed_bytes(&self) -> usize {
        self.lowrank.as_ref().map_or(0, |l| l.bytes)
    }
}

pub(crate) fn native(dtype: Dtype) -> Codec {
    if dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 }
}

fn upload(device: &Device, stream: &Stream, bytes: &[u8]) -> Result<Buffer> {
    let mut buffer = device.alloc(bytes.len())?;
    stream.upload(&mut buffer, 0, bytes)?;
    Ok(buffer)
}

fn upload_as(device: &Device, stream: &Stream, values: &[f32], dtype: Dtype) -> Result<Buffer> {
    let bits: Vec<u16> = match dtype {
        Dtype::F16 => values.iter().map(|&x| f16::from_f32(x).to_bits()).collect(),
        _ => values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect(),
    };
    upload(device, stream, bytemuck::cast_slice(&bits))
}

/// Latents that are the rows themselves.
fn identity_factors(heads: usize, dim: usize) -> Factors {
    let one: Vec<f32> = (0..dim * dim).map(|i| if i / dim == i % dim { 1.0 } else { 0.0 }).collect();
    let all: Vec<f32> = (0..heads).flat_map(|_| one.iter().copied()).collect();
    Factors {
        groups: (0..heads).map(|h| vec![h]).collect(),
        rank: dim,
        basis: all.clone(),
        encoder: all,
        mean: None,
        latent: Latent::Model,
    }
}

fn check(f: &Factors, side: &'static str, heads: usize, dim: usize) -> Result<()> {
    let size = f.groups.first().map_or(0, Vec::len);
    if f.heads() != heads || f.dim() != dim {
        return invalid(
            "plan",
            format!("{side} of {} heads of {} dimensions; the cache has {heads} of {dim}", f.heads(), f.dim()),
        );
    }
    if f.groups.iter().any(|g| g.len() != size) {
        return invalid("plan", format!("{side} in groups of different sizes"));
    }
    if !f.rank.is_multiple_of(kvlar::RANK_MULTIPLE) {
        return invalid("plan", format!("{side} of rank {}, which is no multiple of {}", f.rank, kvlar::RANK_MULTIPLE));
    }
    Ok(())
}

impl DeviceFactors {
    fn new(device: &Device, stream: &Stream, config: &CacheConfig, f: &Factors, basis: Dtype) -> Result<Self> {
        let size = f.groups.first().map_or(0, Vec::len);
        let members: Vec<i32> = f.groups.iter().flatten().map(|&h| h as i32).collect();
        Ok(Self {
            encoder: upload_as(device, stream, &f.encoder, config.dtype)?,
            basis: upload_as(device, stream, &f.basis, basis)?,
            groups: HeadGroups::new(device, stream, config.kv_heads, size, &members)?,
            size,
            count: f.groups.len(),
            rank: f.rank,
            codec: match f.latent {
                Latent::Model => native(config.dtype),
                Latent::Int8 => Codec::Int8,
                Latent::Int4 => Codec::Int4,
            },
        })
    }

    fn side(&self, kv_heads: usize, head_dim: usize) -> SideShape {
        let Self { count, size, rank, codec, .. } = *self;
        SideShape::Project { kv_heads, head_dim, groups: count, size, rank, codec }
    }
}

impl LowrankLayer {
    /// How new rows become latents.
    pub fn append_shape(&self, config: &CacheConfig, seqs: usize, new_rows: usize) -> AppendLowrankShape {
        let values = match &self.values {
            Some(f) => f.side(config.kv_heads, config.value_dim),
            None => SideShape::Dense { kv_heads: config.kv_heads, head_dim: config.value_dim, codec: native(config.dtype) },
        };
        AppendLowrankShape { dtype: config.dtype, seqs, new_rows, keys: self.keys.side(config.kv_heads, config.head_dim), values }
    }

    /// Arguments of an append of k before RoPE and v.
    pub fn append_args<'a>(
        &'a self,
        new: &crate::NewRows<'a>,
        rows: kvlar::Rows<'a>,
        slots: View<'a>,
        keys: Pool<ViewMut<'a>>,
        values: Pool<ViewMut<'a>>,
    ) -> AppendLowrankArgs<'a> {
        fn project<'a>(
            f: &'a DeviceFactors,
            x: View<'a>,
            x_strides: Option<kvlar::Strides>,
            pool: Pool<ViewMut<'a>>,
        ) -> SideArgs<'a> {
            let from = Projection { x, x_strides, encoder: f.encoder.view(), groups: &f.groups, offset: None };
            SideArgs::Project { from, pool }
        }
        AppendLowrankArgs {
            keys: project(&self.keys, new.k, new.k_strides, keys),
            values: match &self.values {
                Some(f) => project(f, new.v, new.v_strides, values),
                None => SideArgs::Store { x: new.v, x_strides: new.v_strides, pool: values },
            },
            positions: None,
            slots,
            rows,
            row_positions: None,
        }
    }

    /// How latents are attended over.
    pub fn attend_shape(&self, config: &CacheConfig, attend: AttendShape) -> LowrankShape {
        let rows = SegmentShape { codec: native(config.dtype), max_rows: config.max_rows };
        let attend = AttendShape { segments: [Some(rows), None, None, None], ..attend };
        let values = match &self.values {
            Some(f) => LowrankValues::Latent { rank: f.rank, codec: f.codec },
            None => LowrankValues::Dense,
        };
        LowrankShape {
            key_mean: self.mean.is_some(),
            ..LowrankShape::new(attend, config.max_rows, self.keys.rank, self.latents, values, self.sets.shape())
        }
    }

    pub fn bases(&self) -> Bases<'_> {
        Bases {
            keys: self.keys.basis.view(),
            keys_per_seq: false,
            key_scales: None,
            key_mean: self.mean.as_ref().map(Buffer::view),
            values: self.values.as_ref().map(|f| f.basis.view()),
            values_per_seq: false,
        }
    }

    pub fn sets(&self) -> &HeadSets {
        &self.sets
    }
}
