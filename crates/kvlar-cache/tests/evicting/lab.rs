//! An evicting cache, and a model of it: which tokens each head of each layer holds, and what attention should see of them.

use crate::devices::tolerance;
pub use crate::lab::{DIM, HEADS, LAYERS, PAGE, Q_HEADS};
use crate::lab::{f16_bytes, row};
use kvlar::{Buffer, Codec, Device, Dtype, Stream};
use kvlar_cache::{
    BatchShape, CacheError, EvictingBatch, EvictingCache, EvictingConfig, Evictor, Moment, NewRows, Observed, Policy, Queries,
    SeqId, Size,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, compare};
use std::collections::BTreeMap;

pub fn config(codec: Codec, pages: usize) -> EvictingConfig {
    EvictingConfig {
        layers: LAYERS,
        kv_heads: HEADS,
        head_dim: DIM,
        value_dim: DIM,
        dtype: Dtype::F16,
        keys: codec.into(),
        values: codec.into(),
        page_rows: PAGE,
        pages,
        max_rows: 160,
        max_seqs: 4,
        staged: 120,
    }
}

/// A sequence as it should be.
#[derive(Clone, Default, Debug)]
pub struct Expected {
    /// Ids of all tokens that were seen; a token's position is its index.
    pub tokens: Vec<u64>,
    /// Positions of the rows that each head of each layer holds, `[layer][head]`.
    pub rows: Vec<Vec<Vec<usize>>>,
    pub committed: usize,
}

pub struct Lab {
    pub stream: Stream,
    pub cache: EvictingCache,
    pub model: BTreeMap<SeqId, Expected>,
    pub next_token: u64,
    pub codec: Codec,
    pub tolerance: Tolerance,
    /// Heads of a layer hold the same rows.
    pub by_layer: bool,
    /// What the last step's queries were, of each layer, and of which sequences: `[seqs, Hq, rows, DIM]`.
    pub queries: Vec<Vec<f32>>,
    /// Whether steps are a prompt's.
    pub prompt: bool,
    pub evictor: Evictor,
}

/// Numbers of a hidden state.
pub const HIDDEN: usize = 16;

/// What a layer's attention takes of a token.
pub fn hidden(token: u64, layer: usize) -> Vec<f32> {
    let mut rng = Rng::new(token * 1000 + layer as u64 + 7);
    kvlar_reference::Dtype::F16.round_all(&rng.normals(HIDDEN, 1.0))
}

/// Nothing is ever evicted unless a test asks for it.
pub fn keep_all() -> Policy {
    Policy::kvzip(Size::Share(1.0))
}

impl Lab {
    pub fn new(device: &Device, codec: Codec, pages: usize, policy: Policy) -> Self {
        let cache = EvictingCache::new(device, config(codec, pages), policy).unwrap();
        Self::of(device.stream().unwrap(), cache, codec)
    }

    pub fn of(stream: Stream, cache: EvictingCache, codec: Codec) -> Self {
        let (model, tolerance, evictor) = (BTreeMap::new(), tolerance(stream.device(), codec), cache.evictor().unwrap());
        let queries = vec![Vec::new(); LAYERS];
        Self { stream, cache, model, next_token: 1, codec, tolerance, by_layer: false, queries, prompt: true, evictor }
    }

    pub fn create(&mut self) -> Result<SeqId, CacheError> {
        let seq = self.cache.create()?;
        let rows = vec![vec![Vec::new(); HEADS]; LAYERS];
        self.model.insert(seq, Expected { rows, ..Expected::default() });
        Ok(seq)
    }

    pub fn fork(&mut self, from: SeqId) -> Result<SeqId, CacheError> {
        let seq = self.cache.fork(&self.stream, from)?;
        self.model.insert(seq, self.model[&from].clone());
        Ok(seq)
    }

    pub fn truncate(&mut self, seq: SeqId, tokens: usize) -> Result<(), CacheError> {
        self.cache.truncate(seq, tokens)?;
        let s = self.model.get_mut(&seq).unwrap();
        s.tokens.truncate(tokens);
        s.rows.iter_mut().flatten().for_each(|rows| rows.retain(|&p| p < tokens));
        Ok(())
    }

    pub fn commit(&mut self, seq: SeqId, tokens: usize) -> Result<(), CacheError> {
        self.cache.commit(seq, tokens)?;
        self.model.get_mut(&seq).unwrap().committed = tokens;
        Ok(())
    }

    pub fn remove(&mut self, seq: SeqId) -> Result<(), CacheError> {
        self.cache.remove(seq)?;
        self.model.remove(&seq);
        Ok(())
    }

    /// Adds tokens to sequences in one step and checks what attention sees of all of them.
    pub fn extend(&mut self, new: &[(SeqId, usize)]) -> Result<(), CacheError> {
        let rows = new.iter().map(|n| n.1).max().unwrap_or(0).max(1);
        let mut batch = self.cache.batch(BatchShape::new(new.len().max(1), rows, Q_HEADS))?;
        self.extend_in(&mut batch, new)
    }

    /// Likewise, in a batch of as many sequences.
    pub fn extend_in(&mut self, batch: &mut EvictingBatch, new: &[(SeqId, usize)]) -> Result<(), CacheError> {
        self.cache.begin(&self.stream, batch, new)?;
        let model = self.model.clone();
        for (seq, n) in new {
            let s = self.model.get_mut(seq).unwrap();
            let first = s.tokens.len();
            s.tokens.extend(self.next_token..self.next_token + *n as u64);
            s.rows.iter_mut().flatten().for_each(|rows| rows.extend(first..first + n));
            self.next_token += *n as u64;
        }
        for layer in 0..LAYERS {
            self.layer(batch, new, layer);
        }
        match new.iter().any(|(_, n)| *n == 7) {
            // A step that is taken back leaves no trace.
            true => {
                self.cache.cancel(batch)?;
                self.model = model;
            }
            false => self.cache.finish(batch)?,
        }
        Ok(())
    }

    pub fn upload(&self, x: &[f32]) -> Buffer {
        let mut buffer = self.stream.device().alloc(2 * x.len()).unwrap();
        self.stream.upload(&mut buffer, 0, &f16_bytes(x)).unwrap();
        buffer
    }

    /// What a head holds at a position.
    pub fn seen(&self, token: u64, layer: usize, head: usize, value: bool) -> Vec<f32> {
        let codec = self.codec.reference();
        let r = kvlar_reference::encode_row(&row(token, layer, head, value), codec, DIM).unwrap();
        kvlar_reference::decode_row(&r.codes, &r.params, DIM, codec, DIM).unwrap()
    }

    fn layer(&mut self, batch: &mut EvictingBatch, new: &[(SeqId, usize)], layer: usize) {
        let BatchShape { seqs, new_rows: rows, .. } = *batch.shape();
        // Rows of padding are NaN: they must not be stored, nor seen.
        let fill = |value: bool| -> Vec<f32> {
            let mut x = Vec::new();
            for ((seq, n), head) in new.iter().flat_map(|s| (0..HEADS).map(move |h| (s, h))) {
                let all = &self.model[seq].tokens;
                x.extend(all[all.len() - n..].iter().flat_map(|&t| row(t, layer, head, value)));
                x.extend(std::iter::repeat_n(f32::NAN, (rows - n) * DIM));
            }
            x.resize(seqs * HEADS * rows * DIM, f32::NAN);
            x
        };
        let (k, v) = (self.upload(&fill(false)), self.upload(&fill(true)));
        let new_rows = NewRows { k: k.view(), k_strides: None, v: v.view(), v_strides: None };
        self.cache.append(&self.stream, batch, layer, new_rows, None).unwrap();
        let count = seqs * Q_HEADS * rows * DIM;
        let queries = kvlar_reference::Dtype::F16.round_all(&Rng::new(layer as u64 + self.next_token).normals(count, 1.0));
        let q = self.upload(&queries);
        let hidden: Vec<f32> = (0..seqs * rows)
            .flat_map(|i| match new.get(i / rows) {
                Some((seq, n)) if i % rows < *n => {
                    let all = &self.model[seq].tokens;
                    hidden(all[all.len() - n + i % rows], layer)
                }
                _ => vec![f32::NAN; HIDDEN],
            })
            .collect();
        let hidden = self.upload(&hidden);
        let seen = Observed { q: Some(q.view()), q_strides: None, hidden: Some(hidden.view()), prompt: self.prompt };
        self.cache.observe(&self.stream, batch, layer, seen).unwrap();
        self.queries[layer] = queries.clone();
        let mut out = self.stream.device().alloc(queries.len() * 4).unwrap();
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
        let mut actual = vec![0f32; queries.len()];
        self.stream.download(&out, 0, bytemuck::cast_slice_mut(&mut actual)).unwrap();
        assert!(batch.workspace().status(&self.stream).unwrap().is_clean());
        let group = Q_HEADS / HEADS;
        for (i, head) in (0..new.len()).flat_map(|i| (0..HEADS).map(move |h| (i, h))) {
            let ((seq, n), s) = (new[i], &self.model[&new[i].0]);
            let held = &s.rows[layer][head];
            assert_eq!(self.cache.rows(seq, layer).unwrap()[if self.by_layer { 0 } else { head }], held.len());
            let dense = |value| -> Vec<f32> { held.iter().flat_map(|&p| self.seen(s.tokens[p], layer, head, value)).collect() };
            let (k, v) = (dense(false), dense(true));
            let of_rows: Vec<i32> = held.iter().map(|&p| p as i32).collect();
            let total = s.tokens.len();
            let positions: Vec<i32> = (0..rows).map(|s| if s < n { (total - n + s) as i32 } else { -1 }).collect();
            let at = (i * Q_HEADS + head * group) * rows * DIM;
            let expected = kvlar_reference::attend(&AttendInput {
                seqs: 1,
                q_heads: group,
                kv_heads: 1,
                query_rows: rows,
                rows: held.len(),
                head_dim: DIM,
                value_dim: DIM,
                q: &queries[at..at + group * rows * DIM],
                k: &k,
                v: &v,
                positions: Some(&of_rows),
                q_positions: Some(&positions),
                ..Default::default()
            })
            .unwrap();
            let own = &actual[at..at + group * rows * DIM];
            compare::compare(own, &expected.out, self.tolerance)
                .unwrap_or_else(|e| panic!("{seq} layer {layer} head {head} of {} rows: {e}", held.len()));
        }
    }

    /// Evicts as the policy says; `expected`: positions that each head of each layer keeps, if anything goes.
    pub fn evict(&mut self, seq: SeqId, moment: Moment, expected: Option<Vec<Vec<Vec<usize>>>>) -> Result<(), CacheError> {
        let some = self.cache.evict(&self.stream, &mut self.evictor, seq, moment)?;
        assert_eq!(some, expected.is_some());
        if some {
            assert!(matches!(self.cache.truncate(seq, 0), Err(CacheError::Busy(_))));
            assert!(matches!(self.cache.fork(&self.stream, seq), Err(CacheError::Busy(_))));
        }
        self.cache.collect(&self.stream, &mut self.evictor, seq)?;
        assert!(self.evictor.workspace().status(&self.stream).unwrap().is_clean());
        if let Some(rows) = expected {
            self.model.get_mut(&seq).unwrap().rows = rows;
        }
        self.check();
        Ok(())
    }

    /// The books: lengths, and that pages are neither lost nor shared wrongly.
    pub fn check(&self) {
        for (seq, s) in &self.model {
            assert_eq!(self.cache.len(*seq).unwrap(), s.tokens.len());
            for layer in 0..LAYERS {
                let rows: Vec<usize> = s.rows[layer].iter().map(Vec::len).collect();
                assert_eq!(self.cache.rows(*seq, layer).unwrap(), if self.by_layer { &rows[..1] } else { &rows[..] });
            }
        }
        let usage = self.cache.usage();
        assert_eq!(usage.sequences, self.model.len());
        let pages = |s: &Expected| -> usize {
            let heads = s.rows.iter().flat_map(|l| &l[..if self.by_layer { 1 } else { HEADS }]);
            heads.map(|rows| rows.len().div_ceil(PAGE)).sum()
        };
        let most: usize = self.model.values().map(pages).sum();
        let least = self.model.values().map(pages).max().unwrap_or(0);
        let used = usage.pages - usage.free;
        assert!((least..=most).contains(&used), "{used} pages used, between {least} and {most} expected");
        if self.model.len() <= 1 {
            assert_eq!((used, usage.shared), (most, 0));
        }
    }
}
