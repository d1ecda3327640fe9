//! A step's launches, captured once and replayed in later steps, do what they do when they are enqueued each time.

use crate::devices::on_every_device;
use crate::evicting::lab as evicting;
use crate::lab::{DIM, HEADS, LAYERS, Q_HEADS, config, exact_plan, f16_bytes};
use kvlar::{Buffer, Codec, Device, Format, Graph, Stream};
use kvlar_cache::{
    Batch, BatchShape, Cache, CacheConfig, EvictingBatch, EvictingCache, Evictor, Moment, NewRows, Policy, Queries, SeqId,
};
use kvlar_reference::testing::Rng;

on_every_device!(dense_rows_and_codes, rows_that_are_encoded_later, latents_beside_exact_rows, rows_that_are_evicted);

/// Tokens of a batch's sequences, one each.
const SEQS: usize = 2;

/// What both caches do.
trait Steps {
    type Batch;
    fn batch(&self, tokens: usize) -> Self::Batch;
    fn begin(&mut self, stream: &Stream, batch: &mut Self::Batch, new: &[(SeqId, usize)]);
    fn layer(&mut self, stream: &Stream, batch: &mut Self::Batch, layer: usize, of: &mut Tensors);
    fn finish(&mut self, batch: &mut Self::Batch);
}

macro_rules! steps {
    ($cache:ty, $batch:ty) => {
        impl Steps for $cache {
            type Batch = $batch;
            fn batch(&self, tokens: usize) -> $batch {
                <$cache>::batch(self, BatchShape::new(SEQS, tokens, Q_HEADS)).unwrap()
            }
            fn begin(&mut self, stream: &Stream, batch: &mut $batch, new: &[(SeqId, usize)]) {
                <$cache>::begin(self, stream, batch, new).unwrap();
            }
            fn layer(&mut self, stream: &Stream, batch: &mut $batch, layer: usize, of: &mut Tensors) {
                let new = NewRows { k: of.k.view(), k_strides: None, v: of.v.view(), v_strides: None };
                self.append(stream, batch, layer, new, None).unwrap();
                let queries = Queries {
                    q: of.q.view(),
                    q_strides: None,
                    out: of.out.view_mut(),
                    out_strides: None,
                    lse: None,
                    sink_logits: None,
                    rope: None,
                };
                self.attend(stream, batch, layer, queries).unwrap();
            }
            fn finish(&mut self, batch: &mut $batch) {
                <$cache>::finish(self, batch).unwrap();
            }
        }
    };
}

steps!(Cache, Batch);
steps!(EvictingCache, EvictingBatch);

/// A layer's inputs and output.
struct Tensors {
    k: Buffer,
    v: Buffer,
    q: Buffer,
    out: Buffer,
}

/// A cache, two sequences in it, and how their steps run.
struct Side<C: Steps> {
    stream: Stream,
    cache: C,
    seqs: [SeqId; SEQS],
    batch: C::Batch,
    layers: Vec<Tensors>,
    captured: bool,
    graph: Option<Graph>,
    rng: Rng,
}

impl<C: Steps> Side<C> {
    fn new(stream: Stream, cache: C, seqs: [SeqId; SEQS], captured: bool) -> Self {
        let (batch, layers) = (cache.batch(1), Self::tensors(&stream, 1));
        Self { stream, cache, seqs, batch, layers, captured, graph: None, rng: Rng::new(11) }
    }

    fn tensors(stream: &Stream, tokens: usize) -> Vec<Tensors> {
        let of = |heads: usize, bytes: usize| stream.device().alloc(SEQS * heads * tokens * DIM * bytes).unwrap();
        let layer = |_| Tensors { k: of(HEADS, 2), v: of(HEADS, 2), q: of(Q_HEADS, 2), out: of(Q_HEADS, 4) };
        (0..LAYERS).map(layer).collect()
    }

    fn fill(&mut self, layers: &mut [Tensors]) {
        for buffer in layers.iter_mut().flat_map(|t| [&mut t.k, &mut t.v, &mut t.q]) {
            let values = self.rng.normals(buffer.len() / 2, 1.0);
            self.stream.upload(buffer, 0, &f16_bytes(&values)).unwrap();
        }
    }

    /// Several tokens of each sequence.
    fn prompt(&mut self, tokens: [usize; SEQS]) {
        let most = tokens[0].max(tokens[1]);
        let (mut batch, mut layers) = (self.cache.batch(most), Self::tensors(&self.stream, most));
        self.fill(&mut layers);
        self.cache.begin(&self.stream, &mut batch, &[(self.seqs[0], tokens[0]), (self.seqs[1], tokens[1])]);
        for (layer, of) in layers.iter_mut().enumerate() {
            self.cache.layer(&self.stream, &mut batch, layer, of);
        }
        self.cache.finish(&mut batch);
    }

    /// One token of each sequence: the bits of each layer's output.
    fn step(&mut self) -> Vec<u8> {
        let mut layers = std::mem::take(&mut self.layers);
        self.fill(&mut layers);
        self.cache.begin(&self.stream, &mut self.batch, &self.seqs.map(|s| (s, 1)));
        if !self.captured || self.graph.is_none() {
            let (cache, batch) = (&mut self.cache, &mut self.batch);
            let mut all = |stream: &Stream| {
                layers.iter_mut().enumerate().for_each(|(layer, of)| cache.layer(stream, batch, layer, of));
                Ok(())
            };
            match self.captured {
                true => self.graph = Some(self.stream.capture(all).unwrap()),
                false => all(&self.stream).unwrap(),
            }
        }
        if let Some(graph) = &self.graph {
            // SAFETY: what it touches lives in this struct.
            unsafe { graph.launch(&self.stream) }.unwrap();
        }
        let mut outputs = Vec::new();
        for of in &layers {
            let mut out = vec![0; of.out.len()];
            self.stream.download(&of.out, 0, &mut out).unwrap();
            outputs.extend(out);
        }
        self.layers = layers;
        self.cache.finish(&mut self.batch);
        outputs
    }
}

/// Both ways, with what `between` does after each step.
fn compare<C: Steps>(make: impl Fn(bool) -> Side<C>, mut between: impl FnMut(&mut Side<C>, usize)) {
    let sides = [false, true].map(|captured| {
        let mut side = make(captured);
        side.prompt([8, 3]);
        let mut outputs = Vec::new();
        for step in 0..45 {
            outputs.push(side.step());
            between(&mut side, step);
        }
        outputs
    });
    assert!(sides[0].iter().flatten().any(|&b| b != 0));
    for (step, (enqueued, replayed)) in sides[0].iter().zip(&sides[1]).enumerate() {
        assert!(enqueued == replayed, "step {step}");
    }
}

fn side(stream: Stream, mut cache: Cache, captured: bool) -> Side<Cache> {
    let seqs = [cache.create(), cache.create()];
    Side::new(stream, cache, seqs, captured)
}

fn of_config(device: &Device, config: CacheConfig) {
    let make = |captured| side(device.stream().unwrap(), Cache::new(device, config).unwrap(), captured);
    compare(make, |side, step| {
        // Another length, and other pages.
        if step == 20 {
            let rows = side.cache.len(side.seqs[0]).unwrap();
            side.cache.truncate(side.seqs[0], rows - 5).unwrap();
        }
        if step == 25 {
            let fork = side.cache.fork(side.seqs[1]).unwrap();
            side.cache.remove(std::mem::replace(&mut side.seqs[1], fork)).unwrap();
        }
    });
}

fn dense_rows_and_codes(device: &Device) {
    let pair = |keys: Format, values: Format| CacheConfig { keys, values, ..config(Codec::F16, 12) };
    let turned = Format { hadamard: true, ..Codec::Int4.into() };
    for (keys, values) in [(Codec::F16.into(), Codec::F16.into()), (turned, Codec::Int4.into())] {
        of_config(device, pair(keys, values));
    }
    // Decoded first: no kernel attends over this pair.
    of_config(device, pair(Codec::F16.into(), Codec::Int4.into()));
}

fn rows_that_are_encoded_later(device: &Device) {
    let [keys, values] = [Codec::Int4Channel.into(), Codec::Int4.into()];
    let exact = CacheConfig { sink_rows: 3, recent_rows: 9, rollback_rows: 8, page_rows: 32, ..config(Codec::F16, 12) };
    of_config(device, CacheConfig { keys, values, ..exact });
}

fn latents_beside_exact_rows(device: &Device) {
    let make = |captured| {
        let stream = device.stream().unwrap();
        let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &exact_plan(0.5, (3, 9))).unwrap();
        side(stream, cache, captured)
    };
    compare(make, |_, _| {});
}

fn rows_that_are_evicted(device: &Device) {
    let mut evictor: Option<Evictor> = None;
    let make = |captured| {
        let mut cache = EvictingCache::new(device, evicting::config(Codec::F16, 100), Policy::streaming_llm(20)).unwrap();
        let seqs = [cache.create().unwrap(), cache.create().unwrap()];
        Side::new(device.stream().unwrap(), cache, seqs, captured)
    };
    compare(make, |side, step| {
        if step == 0 {
            evictor = Some(side.cache.evictor().unwrap());
        }
        let evictor = evictor.as_mut().unwrap();
        if step % 13 == 12 {
            for seq in side.seqs {
                let rows = side.cache.len(seq).unwrap();
                side.cache.commit(seq, rows).unwrap();
                side.cache.evict(&side.stream, evictor, seq, Moment::Prompt).unwrap();
                side.cache.collect(&side.stream, evictor, seq).unwrap();
            }
        }
    });
}
