//! What each policy should keep, worked out from the model alone.

use super::lab::{DIM, Expected, HEADS, LAYERS, Lab, Q_HEADS, hidden};
use kvlar_cache::SeqId;
use kvlar_calibrate::gate::Gates;
use kvlar_reference::{
    Dtype, HeadReduction, KeyMethod, KeysInput, Pool, RowReduction, WindowInput, ordered_row, score_keys, score_window,
};

/// Scores of rows, `[layer][head]`, beside their positions in the model.
pub type Scores = Vec<Vec<Vec<f32>>>;
/// Positions that each head of each layer keeps.
pub type Kept = Vec<Vec<Vec<usize>>>;

impl Lab {
    fn expected(&self, seq: SeqId) -> &Expected {
        &self.model[&seq]
    }

    /// Of every row, by `score(layer, head, position)`.
    pub fn scores(&self, seq: SeqId, score: impl Fn(usize, usize, usize) -> f32) -> Scores {
        let rows = &self.expected(seq).rows;
        let of = |l: usize, h: usize| rows[l][h].iter().map(|&p| score(l, h, p)).collect();
        (0..LAYERS).map(|l| (0..HEADS).map(|h| of(l, h)).collect()).collect()
    }

    /// Keys of a head's rows, as scores take them.
    pub fn keys(&self, seq: SeqId, layer: usize, head: usize, value: bool) -> Vec<f32> {
        let s = self.expected(seq);
        let rows: Vec<f32> = s.rows[layer][head].iter().flat_map(|&p| self.seen(s.tokens[p], layer, head, value)).collect();
        Dtype::F16.round_all(&rows)
    }

    pub fn key_scores(&self, seq: SeqId, method: KeyMethod) -> Scores {
        let of = |l, h| {
            let (k, v) = (self.keys(seq, l, h, false), self.keys(seq, l, h, true));
            let rows = k.len() / DIM;
            let (head_dim, value_dim) = (DIM, DIM);
            score_keys(&KeysInput { seqs: 1, kv_heads: 1, rows, head_dim, value_dim, k: &k, v: Some(&v), method }).unwrap()
        };
        (0..LAYERS).map(|l| (0..HEADS).map(|h| of(l, h)).collect()).collect()
    }

    /// Attention of the last `window` queries of the last step over the rows before them; of its only sequence.
    pub fn window_scores(&self, seq: SeqId, window: usize, over_rows: RowReduction, pool: Pool) -> Scores {
        let group = Q_HEADS / HEADS;
        let of = |l: usize, h: usize| {
            let k = self.keys(seq, l, h, false);
            let rows = k.len() / DIM;
            let step = self.queries[l].len() / Q_HEADS / DIM;
            let q: Vec<f32> = (h * group..(h + 1) * group)
                .flat_map(|head| self.queries[l][(head * step + step - window) * DIM..(head + 1) * step * DIM].to_vec())
                .collect();
            score_window(&WindowInput {
                seqs: 1,
                q_heads: group,
                kv_heads: 1,
                window,
                rows,
                head_dim: DIM,
                q: &q,
                k: &k,
                row_reduction: over_rows,
                pool,
                head_reduction: HeadReduction::Mean,
                ..WindowInput::default()
            })
            .unwrap()
        };
        (0..LAYERS).map(|l| (0..HEADS).map(|h| of(l, h)).collect()).collect()
    }

    /// Of every token, by gates: `[layer][head]`, at the rows that are held.
    pub fn gate_scores(&self, seq: SeqId, gates: &Gates) -> Scores {
        let tokens = &self.expected(seq).tokens;
        let all: Vec<Vec<f32>> = (0..LAYERS)
            .map(|l| {
                let states: Vec<f32> = tokens.iter().flat_map(|&t| hidden(t, l)).collect();
                gates.layer(l).unwrap().score(&states, kvlar_reference::Dtype::F16).unwrap()
            })
            .collect();
        self.scores(seq, |l, h, p| all[l][h * tokens.len() + p])
    }

    /// The rows of each head for which `keep(layer, head, row)`.
    pub fn filter(&self, seq: SeqId, keep: impl Fn(usize, usize, usize) -> bool) -> Kept {
        let rows = &self.expected(seq).rows;
        let of = |l: usize, h: usize| {
            let all = rows[l][h].iter().enumerate();
            all.filter(|(i, _)| keep(l, h, *i)).map(|(_, &p)| p).collect()
        };
        (0..LAYERS).map(|l| (0..HEADS).map(|h| of(l, h)).collect()).collect()
    }

    /// Whether a row stays in any case.
    fn forced(&self, seq: SeqId, (sinks, recent): (usize, usize), position: usize) -> bool {
        let s = self.expected(seq);
        position < sinks || position >= s.tokens.len().saturating_sub(recent).min(s.committed)
    }

    /// The best `k[layer][head]` rows of each head, sinks and recent ones first.
    pub fn best_of_each(&self, seq: SeqId, scores: &Scores, forced: (usize, usize), k: impl Fn(usize, usize) -> usize) -> Kept {
        let rows = &self.expected(seq).rows;
        let chosen = |l: usize, h: usize| -> Vec<usize> {
            let mut order: Vec<usize> = (0..rows[l][h].len()).collect();
            let rank = |i: usize| {
                let first = self.forced(seq, forced, rows[l][h][i]);
                (first, ordered_row(scores[l][h].get(i).copied().unwrap_or(f32::NAN), i as u32))
            };
            order.sort_by_key(|&i| std::cmp::Reverse(rank(i)));
            let least = rows[l][h].iter().filter(|&&p| self.forced(seq, forced, p)).count();
            order.truncate(k(l, h).max(least));
            order
        };
        let chosen: Vec<Vec<Vec<usize>>> = (0..LAYERS).map(|l| (0..HEADS).map(|h| chosen(l, h)).collect()).collect();
        self.filter(seq, |l, h, i| chosen[l][h].contains(&i))
    }

    /// The best `k` rows of all heads of those that compete, and all others.
    pub fn best_of_all(&self, seq: SeqId, scores: &Scores, competes: impl Fn(usize) -> bool, k: usize) -> Kept {
        let rows = &self.expected(seq).rows;
        let mut all = Vec::new();
        for (l, h) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
            for (i, &p) in rows[l][h].iter().enumerate().filter(|(_, p)| competes(**p)) {
                all.push((ordered_row(scores[l][h][i], 0), std::cmp::Reverse((l, h, i)), p));
            }
        }
        all.sort();
        let kept: Vec<(usize, usize, usize)> = all.iter().rev().take(k).map(|x| x.1.0).collect();
        self.filter(seq, |l, h, i| !competes(rows[l][h][i]) || kept.contains(&(l, h, i)))
    }
}
