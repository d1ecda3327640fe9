//! A cache, and a model of it: what every sequence should hold, and what attention should see of it.
#![allow(dead_code)] // each test program uses a part of it

use kvlar::{Codec, Device, Dtype, Format, Stream};
use kvlar_cache::{Batch, BatchShape, Cache, CacheConfig, CacheError, NewRows, Queries, SeqId};
use kvlar_calibrate::{
    Factors, Latent, LayerPlan, LayerShape, ModelShape, PLAN_FORMAT, PairLayout, Plan, RecalkvConfig, RopePairs, Side,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, compare};
use std::collections::BTreeMap;

pub const LAYERS: usize = 2;
pub const HEADS: usize = 2;
pub const Q_HEADS: usize = 4;
pub const DIM: usize = 16;
pub const PAGE: usize = 16;

pub fn config(codec: Codec, pages: usize) -> CacheConfig {
    CacheConfig {
        layers: LAYERS,
        kv_heads: HEADS,
        head_dim: DIM,
        value_dim: DIM,
        dtype: Dtype::F16,
        keys: codec.into(),
        values: codec.into(),
        sink_rows: 0,
        recent_rows: 0,
        page_rows: PAGE,
        pages,
        max_rows: 100,
        max_seqs: 8,
        rollback_rows: 0,
    }
}

/// What stays exact: sinks, recent rows, and tokens that may be taken back without loss.
pub type Exact = (usize, usize, usize);

/// The first row behind the sinks that is exact in a sequence of `total` rows: groups become latents or codes as soon as none
/// of their rows is among the last `recent`.
pub fn first_exact(total: usize, (sinks, recent, _): Exact, group: usize) -> usize {
    let mut first = sinks;
    while first + group + recent <= total {
        first += group;
    }
    first.min(total)
}

pub struct Lab {
    pub stream: Stream,
    pub cache: Cache,
    /// Tokens of each sequence, by name.
    pub model: BTreeMap<SeqId, Vec<u64>>,
    pub next_token: u64,
    pub codec: Codec,
    pub tolerance: Tolerance,
    /// What low-rank layers do to rows that do not stay exact.
    pub factor: f32,
    /// How rows are encoded once they do not stay exact any more, if that is what happens to them.
    pub encoded: Option<[Format; 2]>,
    pub exact: Exact,
    /// Rows that leave the exact ones together.
    pub group: usize,
    /// Of each sequence: behind the sinks, no row before it can be exact again, since more was taken back than can be
    /// without loss.
    pub lost: BTreeMap<SeqId, usize>,
    /// Of each sequence: rows committed, and the most that it has held since it last lost rows.
    pub held: BTreeMap<SeqId, (usize, usize)>,
    /// Of the last step, of each layer.
    pub outputs: Vec<Vec<f32>>,
    /// The planned layer that keeps keys (values) as they are, if any.
    pub dense_keys: Option<usize>,
    pub dense_values: Option<usize>,
}

/// Latents that hold both heads' rows, the second head's first: nothing is lost, but all of the low-rank path is taken.
/// Rebuilt rows are `factor` times what was given.
pub fn latents(factor: f32) -> Side {
    let groups = vec![vec![1, 0]];
    let width = HEADS * DIM;
    let encoder = (0..width * width).map(|i| if i / width == i % width { 1.0 } else { 0.0 }).collect();
    let at = |head: usize| groups[0].iter().position(|&h| h == head).unwrap() * DIM;
    let select = |head: usize| (0..DIM * width).map(move |i| if at(head) + i / width == i % width { factor } else { 0.0 });
    let basis = (0..HEADS).flat_map(select).collect();
    Side::LowRank(Factors { groups: groups.clone(), rank: width, basis, encoder, mean: None, latent: Latent::Model })
}

/// Low-rank keys and values in the first layer, low-rank keys beside dense values in the second.
pub fn plan() -> Plan {
    exact_plan(1.0, (0, 0))
}

/// The same with rebuilt rows that can be told from exact ones, and rows that stay exact.
pub fn exact_plan(factor: f32, (sink_rows, recent_rows): (usize, usize)) -> Plan {
    let layer = LayerShape { q_heads: Q_HEADS, kv_heads: HEADS, head_dim: DIM, value_dim: DIM };
    Plan {
        format: PLAN_FORMAT,
        method: "recalkv".into(),
        fingerprint: "a model".into(),
        model: ModelShape { layers: LAYERS, layer, hidden: 64, rope: RopePairs { rotary_dim: 0, layout: PairLayout::Half } },
        config: RecalkvConfig::default().into(),
        sink_rows,
        recent_rows,
        layers: vec![
            LayerPlan { keys: latents(factor), values: latents(factor) },
            LayerPlan { keys: latents(factor), values: Side::Dense },
        ],
    }
}

/// A token's key (or value) of a head in a layer, as f16 holds it.
pub fn row(token: u64, layer: usize, head: usize, value: bool) -> Vec<f32> {
    let mut rng = Rng::new(token * 64 + (layer * HEADS + head) as u64 * 2 + u64::from(value));
    kvlar_reference::Dtype::F16.round_all(&rng.normals(DIM, 1.0))
}

pub fn f16_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
}

impl Lab {
    pub fn new(codec: Codec, pages: usize) -> Self {
        let device = Device::reference();
        let (stream, cache) = (device.stream().unwrap(), Cache::new(&device, config(codec, pages)).unwrap());
        Self::of(stream, cache, codec, Tolerance::merge())
    }

    pub fn of(stream: Stream, cache: Cache, codec: Codec, tolerance: Tolerance) -> Self {
        let (model, lost, held, outputs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self {
            stream,
            cache,
            model,
            next_token: 1,
            codec,
            tolerance,
            factor: 1.0,
            encoded: None,
            exact: (0, 0, 0),
            group: 16,
            lost,
            held,
            outputs,
            dense_keys: None,
            dense_values: Some(1),
        }
    }

    /// Layers of a plan; results are as exact as the device's.
    pub fn planned(device: &Device, pages: usize, tolerance: Tolerance) -> Self {
        let stream = device.stream().unwrap();
        let cache = Cache::planned(device, &stream, config(Codec::F16, pages), &plan()).unwrap();
        Self::of(stream, cache, Codec::F16, tolerance)
    }

    /// Likewise, with rows that stay exact beside latents that do not.
    pub fn exact(device: &Device, pages: usize, tolerance: Tolerance, exact: Exact) -> Self {
        let (stream, factor) = (device.stream().unwrap(), 0.5);
        let plan = exact_plan(factor, (exact.0, exact.1));
        let config = CacheConfig { rollback_rows: exact.2, ..config(Codec::F16, pages) };
        let cache = Cache::planned(device, &stream, config, &plan).unwrap();
        Self { factor, exact, ..Self::of(stream, cache, Codec::F16, tolerance) }
    }

    /// Rows that are encoded `group` at a time, once they do not stay exact any more, in pages of `groups` groups.
    pub fn encoded(
        device: &Device,
        pages: usize,
        tolerance: Tolerance,
        exact: Exact,
        formats: [Format; 2],
        (group, groups): (usize, usize),
    ) -> Self {
        let config = CacheConfig {
            keys: formats[0],
            values: formats[1],
            sink_rows: exact.0,
            recent_rows: exact.1,
            rollback_rows: exact.2,
            page_rows: (group * groups).next_power_of_two(),
            ..config(Codec::F16, pages)
        };
        let (stream, cache) = (device.stream().unwrap(), Cache::new(device, config).unwrap());
        let dense_values = None;
        Self { encoded: Some(formats), exact, group, dense_values, ..Self::of(stream, cache, Codec::F16, tolerance) }
    }

    /// Whether some of the last rows are exact.
    fn keeps_recent(&self) -> bool {
        self.exact.1 > 0 || self.encoded.is_some()
    }

    /// The first row behind the sinks that is exact.
    fn first_exact(&self, total: usize) -> usize {
        if self.keeps_recent() { first_exact(total, self.exact, self.group) } else { total }
    }

    pub fn create(&mut self) -> SeqId {
        let seq = self.cache.create();
        self.model.insert(seq, Vec::new());
        seq
    }

    /// Adds tokens to sequences in one step and checks what attention sees of all of them.
    pub fn extend(&mut self, new: &[(SeqId, usize)]) -> Result<(), CacheError> {
        let rows = new.iter().map(|n| n.1).max().unwrap_or(0).max(1);
        let mut batch = self.cache.batch(BatchShape::new(new.len().max(1), rows, Q_HEADS))?;
        self.extend_in(&mut batch, new)
    }

    /// Likewise, in a batch of as many sequences.
    pub fn extend_in(&mut self, batch: &mut Batch, new: &[(SeqId, usize)]) -> Result<(), CacheError> {
        let rows = batch.shape().new_rows;
        self.cache.begin(&self.stream, batch, new)?;
        let mut tokens = self.model.clone();
        for (seq, n) in new {
            let ids = self.next_token..self.next_token + *n as u64;
            tokens.get_mut(seq).unwrap().extend(ids);
            self.next_token += *n as u64;
        }
        for (seq, _) in new {
            self.check_exact(*seq, tokens[seq].len());
        }
        self.outputs.clear();
        for layer in 0..LAYERS {
            self.layer(batch, new, rows, &tokens, layer);
        }
        self.cache.finish(batch)?;
        for (seq, _) in new {
            let held = self.held.entry(*seq).or_default();
            held.1 = held.1.max(tokens[seq].len());
        }
        self.model = tokens;
        Ok(())
    }

    /// That the sinks and the last rows are exact: which, their number alone says, unless rows were lost.
    fn check_exact(&self, seq: SeqId, total: usize) {
        let lost = self.lost.get(&seq).copied().unwrap_or(0).min(total);
        let expected = (self.exact.0.min(total), self.first_exact(total).max(lost));
        assert_eq!(self.cache.exact_rows(seq).unwrap(), expected, "{seq} of {total} rows, {:?}", self.exact);
    }

    /// What the cache may have given up once a sequence has held `total` rows.
    fn given_up(&self, seq: SeqId) -> usize {
        let (committed, most) = self.held.get(&seq).copied().unwrap_or_default();
        self.first_exact(most.saturating_sub(self.exact.2).max(committed))
    }

    /// Takes tokens back in the model.
    pub fn truncated(&mut self, seq: SeqId, rows: usize) {
        self.model.get_mut(&seq).unwrap().truncate(rows);
        let (committed, most) = self.held.get(&seq).copied().unwrap_or_default();
        let mut lost = self.lost.get(&seq).copied().unwrap_or(0);
        if self.keeps_recent() && rows + self.exact.2 < most {
            lost = lost.max(self.given_up(seq));
            self.held.insert(seq, (committed, rows));
        }
        // Rows that will be written anew on a page of their own are no loss.
        let sinks = self.exact.0;
        self.lost.insert(seq, lost.min(sinks + rows.saturating_sub(sinks).div_ceil(16) * 16));
    }

    /// A fork in the model.
    pub fn forked(&mut self, from: SeqId, to: SeqId) {
        self.model.insert(to, self.model[&from].clone());
        if let Some(&lost) = self.lost.get(&from) {
            self.lost.insert(to, lost);
        }
        if let Some(&held) = self.held.get(&from) {
            self.held.insert(to, held);
        }
    }

    /// Row i of a sequence of `tokens` as attention should see it.
    fn seen(&self, seq: SeqId, layer: usize, head: usize, value: bool, i: usize, tokens: &[u64]) -> Vec<f32> {
        let (sinks, recent) = self.cache.exact_rows(seq).unwrap();
        if let Some(formats) = self.encoded.filter(|_| i >= sinks && i < recent) {
            let first = sinks + (i - sinks) / self.group * self.group;
            let rows: Vec<f32> = tokens[first..first + self.group].iter().flat_map(|&t| row(t, layer, head, value)).collect();
            let storage = kvlar_reference::HeadStorage::from(formats[usize::from(value)].reference());
            let tiers = kvlar_reference::Tiers::none(kvlar_reference::Dtype::F16);
            let stored = kvlar_reference::quantize_rows(&rows, DIM, &storage, tiers).unwrap();
            return stored.decoded[(i - first) * DIM..][..DIM].to_vec();
        }
        let token = tokens[i];
        let dense = if value { self.dense_values } else { self.dense_keys } == Some(layer);
        let rebuilt = i >= sinks && i < recent && !dense;
        let codec = self.codec.reference();
        let given = row(token, layer, head, value).into_iter().map(|x| if rebuilt { self.factor * x } else { x });
        let r = kvlar_reference::encode_row(&given.collect::<Vec<_>>(), codec, DIM).unwrap();
        kvlar_reference::decode_row(&r.codes, &r.params, DIM, codec, DIM).unwrap()
    }

    fn layer(
        &mut self,
        batch: &mut Batch,
        new: &[(SeqId, usize)],
        rows: usize,
        tokens: &BTreeMap<SeqId, Vec<u64>>,
        layer: usize,
    ) {
        let device = self.stream.device().clone();
        let upload = |x: &[f32]| {
            let mut buffer = device.alloc(2 * x.len()).unwrap();
            self.stream.upload(&mut buffer, 0, &f16_bytes(x)).unwrap();
            buffer
        };
        // Rows of padding are NaN: they must not be stored, nor seen.
        let fill = |value: bool| -> Vec<f32> {
            let mut x = Vec::new();
            for ((seq, n), head) in new.iter().flat_map(|s| (0..HEADS).map(move |h| (s, h))) {
                let all = &tokens[seq];
                x.extend(all[all.len() - n..].iter().flat_map(|&t| row(t, layer, head, value)));
                x.extend(std::iter::repeat_n(f32::NAN, (rows - n) * DIM));
            }
            x
        };
        let (k, v) = (upload(&fill(false)), upload(&fill(true)));
        let new_rows = NewRows { k: k.view(), k_strides: None, v: v.view(), v_strides: None };
        self.cache.append(&self.stream, batch, layer, new_rows, None).unwrap();
        let queries =
            kvlar_reference::Dtype::F16.round_all(&Rng::new(layer as u64).normals(new.len() * Q_HEADS * rows * DIM, 1.0));
        let q = upload(&queries);
        let mut out = device.alloc(queries.len() * 4).unwrap();
        self.stream.fill(&mut out, 0..queries.len() * 4, 0xff).unwrap();
        let args = Queries {
            q: q.view(),
            q_strides: None,
            out: out.view_mut(),
            out_strides: None,
            lse: None,
            sink_logits: None,
            rope: None,
        };
        self.cache.attend(&self.stream, batch, layer, args).unwrap();
        let mut bytes = vec![0u8; out.len()];
        self.stream.download(&out, 0, &mut bytes).unwrap();
        let actual: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(batch.workspace().status(&self.stream).unwrap().is_clean());
        for (i, (seq, n)) in new.iter().enumerate() {
            let all = &tokens[seq];
            let dense = |value| -> Vec<f32> {
                let rows = (0..HEADS).flat_map(|h| (0..all.len()).map(move |j| (h, j)));
                rows.flat_map(|(h, j)| self.seen(*seq, layer, h, value, j, all)).collect()
            };
            let (k, v) = (dense(false), dense(true));
            let positions: Vec<i32> = (0..rows).map(|s| if s < *n { (all.len() - n + s) as i32 } else { -1 }).collect();
            let expected = kvlar_reference::attend(&AttendInput {
                seqs: 1,
                q_heads: Q_HEADS,
                kv_heads: HEADS,
                query_rows: rows,
                rows: all.len(),
                head_dim: DIM,
                value_dim: DIM,
                q: &queries[i * Q_HEADS * rows * DIM..(i + 1) * Q_HEADS * rows * DIM],
                k: &k,
                v: &v,
                q_positions: Some(&positions),
                ..Default::default()
            })
            .unwrap();
            let own = &actual[i * Q_HEADS * rows * DIM..(i + 1) * Q_HEADS * rows * DIM];
            compare::compare(own, &expected.out, self.tolerance).unwrap_or_else(|e| panic!("{seq} layer {layer}: {e}"));
        }
        self.outputs.push(actual);
    }

    /// The books: lengths, and that pages are neither lost nor invented.
    pub fn check(&self) {
        for (seq, tokens) in &self.model {
            assert_eq!(self.cache.len(*seq).unwrap(), tokens.len());
        }
        let usage = self.cache.usage();
        assert_eq!(usage.sequences, self.model.len());
        let exact = usage.bytes - self.cache.config().pool_bytes();
        let any = (self.exact.0, self.exact.1) != (0, 0) || self.encoded.is_some();
        assert_eq!((exact > 0, usage.exact_pages > 0), (any, any));
        let pages: usize = self.model.keys().map(|&seq| self.exact_pages(seq)).sum();
        assert!(usage.exact_pages - usage.exact_free <= pages, "more pages of exact rows than sequences need");
        let page_rows = self.cache.config().page_rows;
        let listed = |(&seq, tokens): (&SeqId, &Vec<u64>)| match self.encoded {
            Some(_) => self.cache.exact_rows(seq).unwrap().1.saturating_sub(self.exact.0).div_ceil(page_rows),
            None => tokens.len().div_ceil(page_rows),
        };
        let least: usize = self.model.iter().map(listed).max().unwrap_or(0);
        let most: usize = self.model.iter().map(listed).sum();
        let used = usage.pages - usage.free;
        assert!((least..=most).contains(&used), "{used} pages used, between {least} and {most} expected");
        let used_bytes = used * (usage.bytes - exact) / usage.pages;
        assert!((used_bytes..=used_bytes + exact).contains(&usage.used_bytes));
    }

    /// Pages of exact rows that a sequence holds at most.
    fn exact_pages(&self, seq: SeqId) -> usize {
        let sinks = self.exact.0;
        let total = self.model[&seq].len();
        let first = self.given_up(seq).min(self.first_exact(total));
        let held = if self.keeps_recent() { total.saturating_sub(first) } else { 0 };
        sinks.min(total).div_ceil(16) + held.div_ceil(16)
    }
}
