//! How a layer keeps its rows: token-wise, or as latents.

mod read;

use crate::error::invalid;
use crate::exact::{EXACT_PAGE_ROWS, ExactShape};
use crate::quantized::QuantizedLayer;
use crate::sequence::Kind;
use crate::{CacheConfig, CacheError, Result};
use half::{bf16, f16};
use kvlar::{
    AppendLowrankArgs, AppendLowrankShape, AttendShape, Bases, Buffer, Codec, Device, Dtype, Format, HeadGroups, HeadSets,
    Latents, LowrankShape, LowrankValues, MAX_SEGMENTS, Memory, Pool, Projection, SegmentShape, SideArgs, SideShape, Stream,
    View, ViewMut,
};
use kvlar_calibrate::{Factors, KeyBasis, Latent, PairLayout, Plan, Side};
use kvlar_reference::{Int8Basis, RotaryPairs};
use std::borrow::Cow;

/// Rows of one side: keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowFormat {
    pub format: Format,
    /// Latent groups, or kv heads.
    pub heads: usize,
    /// Values a row.
    pub dim: usize,
}

impl RowFormat {
    /// Bytes of `tokens` tokens' rows, with scales, zeros and padding.
    pub fn bytes(&self, tokens: usize) -> usize {
        self.heads * self.format.stored(self.dim).bytes(tokens)
    }

    /// Bytes of a token's rows, and of its share of what belongs to groups of rows.
    pub fn token_bytes(&self) -> usize {
        let group = self.format.stored(self.dim).params_rows;
        self.bytes(group).div_ceil(group)
    }

    /// Pages: `[page][head][row]`, scales and zeros of a head behind its rows.
    pub fn pool<M: Memory>(&self, pages: usize, page_rows: usize, data: M) -> Pool<M> {
        Pool::pages(data, pages, page_rows, self.heads, self.format.stored(self.dim))
    }
}

/// Rows of keys and of values, in pages of one size.
#[derive(Debug)]
pub(crate) struct Store {
    pages: usize,
    page_rows: usize,
    keys: (RowFormat, Buffer),
    values: (RowFormat, Buffer),
}

impl Store {
    pub fn new(device: &Device, pages: usize, page_rows: usize, keys: RowFormat, values: RowFormat) -> Result<Self> {
        let buffer = |f: &RowFormat| device.alloc(pages * f.bytes(page_rows));
        Ok(Self { pages, page_rows, keys: (keys, buffer(&keys)?), values: (values, buffer(&values)?) })
    }

    /// Of keys, then of values.
    pub fn pools(&self) -> (Pool<View<'_>>, Pool<View<'_>>) {
        let Self { pages, page_rows, keys, values } = self;
        (keys.0.pool(*pages, *page_rows, keys.1.view()), values.0.pool(*pages, *page_rows, values.1.view()))
    }

    pub fn pools_mut(&mut self) -> (Pool<ViewMut<'_>>, Pool<ViewMut<'_>>) {
        let (pages, page_rows) = (self.pages, self.page_rows);
        let Self { keys, values, .. } = self;
        (keys.0.pool(pages, page_rows, keys.1.view_mut()), values.0.pool(pages, page_rows, values.1.view_mut()))
    }

    /// Of keys, then of values.
    pub fn formats(&self) -> [Format; 2] {
        [self.keys.0.format, self.values.0.format]
    }

    /// Bytes that a token takes.
    pub fn token_bytes(&self) -> usize {
        self.keys.0.token_bytes() + self.values.0.token_bytes()
    }

    /// Bytes that it allocated.
    pub fn bytes(&self) -> usize {
        self.keys.1.len() + self.values.1.len()
    }

    pub fn copy_page(&mut self, stream: &Stream, from: usize, to: usize) -> Result<()> {
        for (format, buffer) in [&mut self.keys, &mut self.values] {
            let bytes = format.bytes(self.page_rows);
            stream.copy_within(buffer, from * bytes..(from + 1) * bytes, to * bytes)?;
        }
        Ok(())
    }
}

/// A layer's memory, and what it needs to fill and read it.
#[derive(Debug)]
pub(crate) struct Layer {
    /// All rows; all that are not exact, where rows are encoded later.
    pub rows: Store,
    /// Rows that are kept as they are beside latents, or until they are encoded.
    pub exact: Option<Store>,
    pub lowrank: Option<LowrankLayer>,
    /// Where a plan says how rows are encoded, or some of them stay exact.
    pub quantized: Option<QuantizedLayer>,
}

/// The matrices of a low-rank layer, on the device.
#[derive(Debug)]
pub(crate) struct LowrankLayer {
    sets: HeadSets,
    /// Which latents each kv head's keys are made of.
    group_of: Vec<i32>,
    latents: Latents,
    keys: DeviceFactors,
    /// Of an int8 basis.
    key_scales: Option<Buffer>,
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
    /// Numbers of a stored latent, of which the last may be padding.
    rank: usize,
    /// Numbers that rows are projected to.
    projected: usize,
    codec: Codec,
}

impl Layer {
    /// Rows as `config` says.
    pub fn token_wise(device: &Device, config: &CacheConfig) -> Result<Self> {
        let rows = |format, dim| RowFormat { format, heads: config.kv_heads, dim };
        let (keys, values) = (rows(config.keys, config.head_dim), rows(config.values, config.value_dim));
        let rows = Store::new(device, config.pages, config.page_rows, keys, values)?;
        Ok(Self { rows, exact: None, lowrank: None, quantized: None })
    }

    /// Rows in formats of their own, those of `exact` not yet.
    pub fn quantized(device: &Device, config: &CacheConfig, exact: &ExactShape, quantized: QuantizedLayer) -> Result<Self> {
        let [keys, values] = quantized.formats;
        let rows = Self::token_wise(device, &CacheConfig { keys, values, ..*config })?;
        Ok(Self { quantized: Some(quantized), exact: exact_store(device, config, exact)?, ..rows })
    }

    /// As a plan says.
    pub fn planned(
        device: &Device,
        stream: &Stream,
        config: &CacheConfig,
        exact: &ExactShape,
        layer: usize,
        plan: &Plan,
    ) -> Result<Self> {
        if let Some(quantized) = QuantizedLayer::planned(device, stream, config, layer, plan)? {
            return Self::quantized(device, config, exact, quantized);
        }
        let of = &plan.layers[layer];
        if of.keys == Side::Dense && of.values == Side::Dense {
            return Self::token_wise(device, config);
        }
        let (lowrank, [keys, values]) = LowrankLayer::planned(device, stream, config, layer, plan)?;
        let rows = Store::new(device, config.pages, config.page_rows, keys, values)?;
        Ok(Self { rows, exact: exact_store(device, config, exact)?, lowrank: Some(lowrank), quantized: None })
    }

    /// Rows of a kind.
    pub fn store_mut(&mut self, kind: Kind) -> Option<&mut Store> {
        if kind.is_exact() { self.exact.as_mut() } else { Some(&mut self.rows) }
    }

    /// Bytes that do not grow: bases, encoders, means, codebooks.
    pub fn fixed_bytes(&self) -> usize {
        self.lowrank.as_ref().map_or(0, |l| l.bytes) + self.quantized.as_ref().map_or(0, QuantizedLayer::bytes)
    }
}

/// Room for the exact rows of as many sequences as may hold tokens.
fn exact_store(device: &Device, config: &CacheConfig, exact: &ExactShape) -> Result<Option<Store>> {
    if !exact.any() {
        return Ok(None);
    }
    let own = |dim| RowFormat { format: native(config.dtype).into(), heads: config.kv_heads, dim };
    let pages = config.max_seqs * exact.pages_per_seq();
    Ok(Some(Store::new(device, pages, EXACT_PAGE_ROWS, own(config.head_dim), own(config.value_dim))?))
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

/// Latents that are the rows themselves, and zeros up to a rank that kernels take.
fn identity_factors(heads: usize, dim: usize) -> Factors {
    let rank = dim.next_multiple_of(kvlar::RANK_MULTIPLE);
    let one = |columns: usize| (0..dim * rank).map(move |i| if i / columns == i % columns { 1.0 } else { 0.0 });
    let all = |columns: usize| (0..heads).flat_map(|_| one(columns)).collect();
    Factors {
        groups: (0..heads).map(|h| vec![h]).collect(),
        rank,
        basis: all(rank),
        encoder: all(dim),
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

/// Numbers of a group's rows, one after another.
fn width(f: &Factors) -> usize {
    f.groups.first().map_or(0, Vec::len) * f.dim()
}

/// Factors whose rank is padded beyond the rows' width, without zeros that kernels do not need: a latent is never longer
/// than what it is made of, but for what its own padding to [`kvlar::RANK_MULTIPLE`] adds.
fn trimmed<'a>(f: &'a Factors, side: &'static str) -> Result<Cow<'a, Factors>> {
    let (width, rank) = (width(f), kvlar::padded_rank(width(f)));
    if f.rank <= width {
        return Ok(Cow::Borrowed(f));
    }
    let (rows, columns) = (f.encoder.chunks_exact(f.rank * width), f.basis.chunks_exact(f.rank));
    let beyond = rows.clone().flat_map(|e| &e[width * width..]).chain(columns.clone().flat_map(|b| &b[width..]));
    if beyond.into_iter().any(|x| *x != 0.0) {
        let of = f.rank;
        return invalid(
            "plan",
            format!("{side} of rank {of} are longer than the rows of {width} they are made of: fit it again"),
        );
    }
    Ok(Cow::Owned(Factors {
        rank,
        basis: columns.flat_map(|b| b.iter().take(rank)).copied().collect(),
        encoder: rows.flat_map(|e| &e[..width * width]).copied().collect(),
        ..f.clone()
    }))
}

impl DeviceFactors {
    fn new(device: &Device, stream: &Stream, config: &CacheConfig, f: &Factors, basis: Buffer) -> Result<Self> {
        let size = f.groups.first().map_or(0, Vec::len);
        let members: Vec<i32> = f.groups.iter().flatten().map(|&h| h as i32).collect();
        Ok(Self {
            encoder: upload_as(device, stream, &f.encoder, config.dtype)?,
            basis,
            groups: HeadGroups::new(device, stream, config.kv_heads, size, &members)?,
            size,
            count: f.groups.len(),
            rank: f.rank,
            projected: f.rank.min(width(f)),
            codec: match f.latent {
                Latent::Model => native(config.dtype),
                Latent::Int8 => Codec::Int8,
                Latent::Int4 => Codec::Int4,
            },
        })
    }

    fn side(&self, kv_heads: usize, head_dim: usize) -> SideShape {
        let Self { count, size, projected, codec, .. } = *self;
        SideShape::Project { kv_heads, head_dim, groups: count, size, rank: projected, codec }
    }
}

impl LowrankLayer {
    /// Bytes of its matrices.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// As a plan says, of a layer that keeps latents: its matrices, and the formats of key and value rows. Keys that stay dense
    /// beside low-rank values become latents of full rank, one group a head: the same bytes, but for padding.
    pub fn planned(
        device: &Device,
        stream: &Stream,
        config: &CacheConfig,
        layer: usize,
        plan: &Plan,
    ) -> Result<(Self, [RowFormat; 2])> {
        let pairs = plan.model.rope;
        let int8_basis = plan.key_basis() == KeyBasis::Int8;
        let plan = &plan.layers[layer];
        let identity;
        let keys = match &plan.keys {
            Side::LowRank(f) => f,
            // Codes were told apart above.
            Side::Dense | Side::Quantized(_) => {
                identity = identity_factors(config.kv_heads, config.head_dim);
                &identity
            }
        };
        check(keys, "keys", config.kv_heads, config.head_dim)?;
        let keys = &*trimmed(keys, "keys")?;
        let values = match plan.values.factors() {
            Some(f) => {
                check(f, "values", config.kv_heads, config.value_dim)?;
                Some(trimmed(f, "values")?)
            }
            None => None,
        };
        let values = values.as_deref();
        if let Some(values) = values {
            if values.mean.is_some() {
                return invalid("plan", "value latents with a mean: fit the plan without");
            }
            if values.latent != keys.latent && values.latent != Latent::Model {
                return invalid("plan", format!("{:?} value latents beside {:?} key latents", values.latent, keys.latent));
            }
        }
        let latents = match keys.latent {
            Latent::Model => Latents::Dtype,
            Latent::Int8 if int8_basis => Latents::Int8Basis,
            Latent::Int8 => Latents::Int8,
            Latent::Int4 => Latents::Int4,
        };
        let group_v = values.map(Factors::group_of);
        let mut key_scales = None;
        let basis = match latents {
            Latents::Int8Basis => {
                let pairs = RotaryPairs { rotary_dim: pairs.rotary_dim, half: pairs.layout == PairLayout::Half };
                let int8 =
                    Int8Basis::quantize(&keys.basis, keys.mean.as_deref(), config.kv_heads, config.head_dim, keys.rank, pairs)
                        .map_err(|e| CacheError::Invalid { arg: "plan", problem: e.to_string() })?;
                key_scales = Some(upload(device, stream, bytemuck::cast_slice(&int8.scales))?);
                upload(device, stream, bytemuck::cast_slice(&int8.codes))?
            }
            Latents::Dtype => upload_as(device, stream, &keys.basis, config.dtype)?,
            Latents::Int8 | Latents::Int4 => upload_as(device, stream, &keys.basis, Dtype::F16)?,
        };
        let key_factors = DeviceFactors::new(device, stream, config, keys, basis)?;
        let value_factors = match values {
            Some(f) => {
                let basis = upload_as(device, stream, &f.basis, config.dtype)?;
                Some(DeviceFactors::new(device, stream, config, f, basis)?)
            }
            None => None,
        };
        let mean = keys.mean.as_ref().map(|m| upload(device, stream, bytemuck::cast_slice(m))).transpose()?;
        let all = [Some(&key_factors), value_factors.as_ref()];
        let matrices: usize = all.into_iter().flatten().map(|f| f.encoder.len() + f.basis.len()).sum();
        let own = |dim| RowFormat { format: native(config.dtype).into(), heads: config.kv_heads, dim };
        let key_rows = RowFormat { format: key_factors.codec.into(), heads: key_factors.count, dim: key_factors.rank };
        let value_rows = match &value_factors {
            Some(f) => RowFormat { format: f.codec.into(), heads: f.count, dim: f.rank },
            None => own(config.value_dim),
        };
        let lowrank = Self {
            sets: HeadSets::new(device, stream, &keys.group_of(), group_v.as_deref())?,
            group_of: keys.group_of(),
            latents,
            bytes: matrices + [&mean, &key_scales].into_iter().flatten().map(Buffer::len).sum::<usize>(),
            keys: key_factors,
            key_scales,
            mean,
            values: value_factors,
        };
        Ok((lowrank, [key_rows, value_rows]))
    }

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
        (keys, values): (Pool<ViewMut<'a>>, Pool<ViewMut<'a>>),
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

    /// How sinks, latents and recent rows are attended over.
    pub fn attend_shape(&self, config: &CacheConfig, exact: &ExactShape, attend: AttendShape) -> LowrankShape {
        let own = native(config.dtype);
        let pages = |n: usize| (n > 0).then_some(SegmentShape::new(own, n * EXACT_PAGE_ROWS));
        let latents = SegmentShape::new(self.latents.codec(own), config.max_rows);
        let mut segments = [None; MAX_SEGMENTS];
        let mut latent_segments = [false; MAX_SEGMENTS];
        let all = [pages(exact.sink_pages()), Some(latents), pages(exact.recent_pages())];
        for (i, segment) in all.into_iter().flatten().enumerate() {
            segments[i] = Some(segment);
            latent_segments[i] = exact.sink_pages().min(1) == i;
        }
        let values = match &self.values {
            Some(f) => LowrankValues::Latent { rank: f.rank, codec: f.codec },
            None => LowrankValues::Dense,
        };
        LowrankShape {
            attend: AttendShape { segments, ..attend },
            latent_segments,
            key_rank: self.keys.rank,
            latents: self.latents,
            key_mean: self.mean.is_some(),
            values,
            stored_positions: false,
            sets: self.sets.shape(),
        }
    }

    pub fn bases(&self) -> Bases<'_> {
        Bases {
            keys: self.keys.basis.view(),
            keys_per_seq: false,
            key_scales: self.key_scales.as_ref().map(Buffer::view),
            key_mean: self.mean.as_ref().map(Buffer::view),
            values: self.values.as_ref().map(|f| f.basis.view()),
            values_per_seq: false,
        }
    }

    pub fn sets(&self) -> &HeadSets {
        &self.sets
    }
}
