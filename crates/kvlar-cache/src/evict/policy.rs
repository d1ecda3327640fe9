//! Which rows go: how they are scored, who shares a budget, how large it is, and when.

use super::EvictingConfig;
use crate::Result;
use crate::error::invalid;
use kvlar::{Pooling, ScoreReduction};
use kvlar_calibrate::gate::Gates;
use kvlar_reference::KeyMethod;
use std::sync::Arc;

/// What a row is worth.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Scorer {
    /// Rows differ in age alone.
    Age,
    /// Attention that the last tokens of a prompt pay to it (SnapKV, arXiv 2404.14469).
    Window(WindowScore),
    /// All attention that was ever paid to it (H2O, arXiv 2306.14048): a sum over queries, the mean over the query heads of a
    /// kv head.
    Column,
    /// Attention of the last query, the mean over all heads of a layer (TOVA, arXiv 2401.06104): a layer's heads keep the same
    /// tokens.
    LastQuery,
    /// What keys (and values) say by themselves.
    Keys(KeyMethod),
    /// A small network of the token's hidden state (Fast KVzip, arXiv 2601.17668, §3).
    Gate(Arc<Gates>),
    /// What the engine says ([`super::EvictingCache::set_scores`]): KVzip (arXiv 2505.23416), whose scores take forward passes.
    Given,
}

/// How attention of the last tokens is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowScore {
    /// w: how many tokens; they are always kept.
    pub rows: usize,
    /// Over the queries of the window.
    pub over_rows: ScoreReduction,
    /// Over neighbours, of each query head.
    pub pool: Pooling,
    /// Over the query heads of a kv head.
    pub over_heads: ScoreReduction,
}

/// Who shares a budget.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Sharing {
    /// Nobody: each head keeps as many rows.
    Each,
    /// Layers by depth (PyramidKV, arXiv 2406.02069).
    Pyramid {
        /// How many times less than the average the last layer keeps.
        beta: usize,
    },
    /// Layers by where the best scores are (DynamicKV, arXiv 2412.14838).
    Dynamic {
        /// A layer keeps at most this times the average.
        r_max: f64,
        /// Layers between two rounds.
        interval: usize,
    },
    /// The heads of a layer, likewise (Ada-KV, arXiv 2407.11550).
    Heads {
        /// Share of the average that each head keeps in any case.
        alpha: f64,
    },
    /// All heads of all layers: the best of all rows.
    All {
        /// Rows that each head keeps in any case, beside sinks and recent ones.
        floor: usize,
        /// Rows that are worth as little as the first to go, go (Fast KVzip as released); there must be no floor.
        strict: bool,
    },
}

/// How many rows stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// A share of the tokens seen, rounded to a whole number of tokens.
    Share(f64),
    /// Tokens.
    Tokens(usize),
}

impl Size {
    /// Of so many tokens.
    pub(super) fn of(self, tokens: usize) -> usize {
        match self {
            Self::Share(share) => (share * tokens as f64).round() as usize,
            Self::Tokens(n) => n.min(tokens),
        }
    }
}

/// When rows are evicted from a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Never.
    Keep,
    /// Once it is complete.
    AtEnd,
    /// Chunk by chunk: what leaves the window is judged once and for all (Fast KVzip, §3.1 of the notes on its release).
    EachChunk,
}

/// Which rows of a sequence go, and when. Start from one of the systems and change fields.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What a row is worth.
    pub scorer: Scorer,
    /// Who shares a budget.
    pub sharing: Sharing,
    /// Rows that a head keeps on average, sinks and recent ones among them.
    pub size: Size,
    /// The first tokens stay.
    pub sinks: usize,
    /// The last tokens stay.
    pub recent: usize,
    /// Of a prompt.
    pub prompt: Prompt,
    /// While decoding, every so many tokens; `None`: never.
    pub decode: Option<usize>,
    /// While decoding holes are filled from a head's last rows, which moves less; else rows stay in order.
    pub fill_holes: bool,
}

impl Policy {
    fn window(rows: usize, over_rows: ScoreReduction, pool: Pooling) -> Scorer {
        Scorer::Window(WindowScore { rows, over_rows, pool, over_heads: ScoreReduction::Mean })
    }

    /// At the end of a prompt; while decoding rows are added.
    fn of_prompt(scorer: Scorer, sharing: Sharing, size: Size, recent: usize) -> Self {
        Self { scorer, sharing, size, sinks: 0, recent, prompt: Prompt::AtEnd, decode: None, fill_holes: false }
    }

    /// StreamingLLM (arXiv 2309.17453): 4 sinks and the last tokens, `tokens` in all.
    pub fn streaming_llm(tokens: usize) -> Self {
        let recent = tokens.saturating_sub(4);
        Self { sinks: 4, decode: Some(64), ..Self::of_prompt(Scorer::Age, Sharing::Each, Size::Tokens(tokens), recent) }
    }

    /// SnapKV (arXiv 2404.14469): attention of the last 32 tokens, max-pooled over 7 neighbours.
    pub fn snapkv(size: Size) -> Self {
        Self::of_prompt(Self::window(32, ScoreReduction::Mean, Pooling::Max(7)), Sharing::Each, size, 32)
    }

    /// PyramidKV (arXiv 2406.02069): SnapKV's scores, fewer rows in deeper layers.
    pub fn pyramidkv(size: Size) -> Self {
        Self { sharing: Sharing::Pyramid { beta: 20 }, ..Self::snapkv(size) }
    }

    /// DynamicKV (arXiv 2412.14838, §3): attention of the last 8 tokens, averaged over 7 neighbours; layers share a budget by
    /// where the best scores are.
    pub fn dynamickv(size: Size) -> Self {
        let sharing = Sharing::Dynamic { r_max: 10.0, interval: 4 };
        Self::of_prompt(Self::window(8, ScoreReduction::Sum, Pooling::Avg(7)), sharing, size, 8)
    }

    /// Ada-KV (arXiv 2407.11550): SnapKV's scores, heads of a layer share its budget.
    pub fn adakv(size: Size) -> Self {
        Self { sharing: Sharing::Heads { alpha: 0.5 }, ..Self::snapkv(size) }
    }

    /// H2O (arXiv 2306.14048): half of `tokens` are those that got most attention so far, half the last. What tokens that
    /// are taken back paid in attention stays paid.
    pub fn h2o(tokens: usize) -> Self {
        let recent = tokens / 2;
        Self {
            decode: Some(64),
            fill_holes: true,
            ..Self::of_prompt(Scorer::Column, Sharing::Each, Size::Tokens(tokens), recent)
        }
    }

    /// TOVA (arXiv 2401.06104): what the last query pays least attention to goes, at every step.
    pub fn tova(tokens: usize) -> Self {
        Self { decode: Some(1), ..Self::of_prompt(Scorer::LastQuery, Sharing::Each, Size::Tokens(tokens), 1) }
    }

    /// L2 norm (arXiv 2406.11430): keys of a small norm stay.
    pub fn l2_norm(size: Size) -> Self {
        Self::of_prompt(Scorer::Keys(KeyMethod::L2Norm), Sharing::Each, size, 0)
    }

    /// KeyDiff (arXiv 2504.15364): keys that are unlike the mean stay.
    pub fn keydiff(size: Size) -> Self {
        Self::of_prompt(Scorer::Keys(KeyMethod::KeyDiff), Sharing::Each, size, 0)
    }

    /// LagKV (arXiv 2504.04704): tokens whose keys and values differ from what the next 128 span; 4 sinks.
    pub fn lagkv(size: Size) -> Self {
        Self { sinks: 4, ..Self::of_prompt(Scorer::Keys(KeyMethod::LagKv), Sharing::Each, size, 0) }
    }

    /// KVzip (arXiv 2505.23416): the best of all rows by attention when the model repeats the context; the engine gives the
    /// scores.
    pub fn kvzip(size: Size) -> Self {
        Self { sinks: 4, ..Self::of_prompt(Scorer::Given, Sharing::All { floor: 0, strict: false }, size, 0) }
    }

    /// Fast KVzip (arXiv 2601.17668), of a prompt: chunk by chunk, what leaves the last `window` tokens stays if the gates of
    /// all layers say that it is among the best. `window` 4,096 in the paper; 2 % of short contexts.
    pub fn fast_kvzip(gates: Arc<Gates>, share: f64, window: usize) -> Self {
        Self {
            prompt: Prompt::EachChunk,
            ..Self::of_prompt(Scorer::Gate(gates), Sharing::All { floor: 0, strict: false }, Size::Share(share), window)
        }
    }

    /// Fast KVzip while decoding: every 128 tokens the best `tokens` a head on average stay, and the last 128 and first 4.
    pub fn fast_kvzip_decode(gates: Arc<Gates>, tokens: usize) -> Self {
        Self {
            sinks: 4,
            decode: Some(128),
            fill_holes: true,
            ..Self::of_prompt(Scorer::Gate(gates), Sharing::All { floor: 0, strict: false }, Size::Tokens(tokens), 128)
        }
    }

    /// Whether scores are made of stored rows.
    pub(super) fn reads_rows(&self) -> bool {
        matches!(self.scorer, Scorer::Window(_) | Scorer::Column | Scorer::LastQuery | Scorer::Keys(_))
    }

    /// Whether scores are made of values too.
    pub(super) fn reads_values(&self) -> bool {
        matches!(self.scorer, Scorer::Keys(method) if method.needs_values())
    }

    /// Whether rows are scored when some are to go, and not in the step that shows them.
    pub(super) fn scores_late(&self) -> bool {
        matches!(self.scorer, Scorer::Keys(_))
    }

    /// Whether layers, or heads of a layer, share budgets.
    pub(super) fn shares_layers(&self) -> bool {
        matches!(self.sharing, Sharing::Pyramid { .. } | Sharing::Dynamic { .. } | Sharing::Heads { .. })
    }

    /// Whether a row's score stays with it from one eviction to the next.
    pub(super) fn persistent_scores(&self) -> bool {
        matches!(self.scorer, Scorer::Column | Scorer::Gate(_) | Scorer::Given)
    }

    /// Whether the heads of a layer keep the same tokens.
    pub(super) fn by_layer(&self) -> bool {
        matches!(self.scorer, Scorer::LastQuery)
    }

    pub(super) fn check(&self, config: &EvictingConfig) -> Result<()> {
        if let Size::Share(share) = self.size
            && !(share > 0.0 && share <= 1.0)
        {
            return invalid("size", format!("a share of {share} is not above 0 and at most 1"));
        }
        if let Size::Tokens(n) = self.size
            && n < self.sinks + self.recent
        {
            return invalid("size", format!("{n} tokens are fewer than {} sinks and {} recent ones", self.sinks, self.recent));
        }
        if self.decode == Some(0) {
            return invalid("decode", "every 0 tokens");
        }
        if let Scorer::Window(w) = self.scorer {
            let even = matches!(w.pool, Pooling::Avg(k) | Pooling::Max(k) if k.is_multiple_of(2));
            if w.rows == 0 || even {
                return invalid("window", format!("{} tokens, {:?}: at least one, and an odd number", w.rows, w.pool));
            }
            if self.decode.is_some() {
                return invalid("decode", "attention of a prompt's last tokens says nothing while decoding");
            }
        }
        match self.sharing {
            Sharing::Pyramid { beta: 0 } => return invalid("beta", "0"),
            Sharing::Dynamic { r_max, interval } if interval == 0 || !(r_max > 0.0 && r_max.is_finite()) => {
                return invalid("r_max", format!("{r_max}, rounds every {interval} layers"));
            }
            Sharing::Heads { alpha } if !(0.0..=1.0).contains(&alpha) => {
                return invalid("alpha", format!("{alpha} is not between 0 and 1"));
            }
            Sharing::All { floor, strict: true } if floor > 0 => return invalid("floor", "not with a strict threshold"),
            _ => {}
        }
        if let Scorer::Gate(gates) = &self.scorer {
            let problem = match gates.layers().len() {
                n if n != config.layers => format!("they are of {n} layers, the cache has {}", config.layers),
                _ => match gates.layers().iter().flatten().find(|g| g.shape.kv_heads != config.kv_heads) {
                    Some(g) => format!("they are of {} kv heads, the cache has {}", g.shape.kv_heads, config.kv_heads),
                    None => String::new(),
                },
            };
            if !problem.is_empty() {
                return invalid("gates", problem);
            }
            if config.staged == 0 {
                return invalid("staged", "0 tokens: scores of gates wait until it is known which rows stay");
            }
        }
        if self.prompt == Prompt::EachChunk {
            let by_gate = matches!(self.scorer, Scorer::Gate(_));
            let (all, share) = (matches!(self.sharing, Sharing::All { .. }), matches!(self.size, Size::Share(_)));
            if !(by_gate && all && share) {
                return invalid("prompt", "chunk by chunk: with gates, a budget of all heads, and a share of the prompt");
            }
        }
        Ok(())
    }
}
