//! Latents and RoPE: `recalkv.md` §7 invariants 11 and 12, through the reference op that attends over latents.

use kvlar_reference::testing::Rng;
use kvlar_reference::{
    AttendInput, Attended, LowrankInput, LowrankValues, Rope, RopeLayout, RopeScaling, attend, attend_lowrank,
};

const HEADS: usize = 3;
const ROWS: usize = 11;
const D: usize = 8;

/// Heads that share one group of latents as wide as a head.
struct Case {
    rope: Rope,
    /// [HEADS, D, D].
    basis: Vec<f32>,
    /// [ROWS, D].
    latents: Vec<f32>,
    /// [HEADS, D], before RoPE.
    q: Vec<f32>,
    /// [ROWS, D], for all heads alike.
    v: Vec<f32>,
}

impl Case {
    fn new(rng: &mut Rng, rope: Rope, basis: Vec<f32>) -> Self {
        Self { rope, basis, latents: rng.normals(ROWS * D, 1.0), q: rng.normals(HEADS * D, 1.0), v: rng.normals(ROWS * D, 1.0) }
    }

    fn rotated(&self, q: &[f32], position: i32) -> Vec<f32> {
        q.chunks(D).flat_map(|q| self.rope.rotate(q, i64::from(position))).collect()
    }

    /// Keys rebuilt, then rotated; rows at `first` and on, the query at `at`.
    fn rebuilt(&self, first: i32, at: i32) -> Attended {
        let positions: Vec<i32> = (first..first + ROWS as i32).collect();
        let v = self.v.repeat(HEADS);
        attend_lowrank(&LowrankInput {
            seqs: 1,
            q_heads: HEADS,
            kv_heads: HEADS,
            query_rows: 1,
            rows: ROWS,
            head_dim: D,
            value_dim: D,
            key_groups: 1,
            key_rank: D,
            q: &self.rotated(&self.q, at),
            zk: &self.latents,
            key_basis: &self.basis,
            group_k: &[0; HEADS],
            key_mean: None,
            values: LowrankValues::Dense(&v),
            rope: &self.rope,
            int8_latents: false,
            lengths: None,
            positions: Some(&positions),
            q_positions: Some(&[at]),
            sink_logits: None,
            scale: None,
            softcap: 0.0,
            window: 0,
        })
        .unwrap()
    }

    /// Latents rotated as if they were keys, which all heads share; each head's query taken through its basis.
    fn rotated_latents(&self, first: i32, at: i32) -> Attended {
        let q = self.rotated(&self.q, at);
        let through = |h: usize, c: usize| (0..D).map(|i| self.basis[(h * D + i) * D + c] * q[h * D + i]).sum();
        let q: Vec<f32> = (0..HEADS * D).map(|i| through(i / D, i % D)).collect();
        let rows = self.latents.chunks(D).zip(i64::from(first)..);
        let k: Vec<f32> = rows.flat_map(|(z, position)| self.rope.rotate(z, position)).collect();
        attend(&AttendInput {
            seqs: 1,
            q_heads: HEADS,
            kv_heads: 1,
            query_rows: 1,
            rows: ROWS,
            head_dim: D,
            value_dim: D,
            q: &q,
            k: &k,
            v: &self.v,
            ..AttendInput::default()
        })
        .unwrap()
    }
}

fn difference(a: &Attended, b: &Attended) -> f32 {
    let pairs = a.out.iter().zip(&b.out).chain(a.lse.iter().zip(&b.lse));
    assert_eq!((a.out.len(), a.lse.len()), (b.out.len(), b.lse.len()));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// All and some dimensions rotating, in both layouts.
fn ropes() -> Vec<Rope> {
    let rope = |rotary, layout| Rope::new(100.0, rotary, layout, RopeScaling::None);
    [RopeLayout::Half, RopeLayout::Interleaved].into_iter().flat_map(|l| [rope(D, l), rope(D - 4, l)]).collect()
}

/// The dimension whose factor a dimension shares: the first of its rotary pair.
fn pair(rope: &Rope, i: usize) -> usize {
    match rope.layout {
        _ if i >= rope.rotary_dim() => i,
        RopeLayout::Half => i % (rope.rotary_dim() / 2),
        RopeLayout::Interleaved => i / 2 * 2,
    }
}

/// Invariant 12: a basis that mixes heads only, frequency by frequency, commutes with RoPE.
#[test]
fn bases_of_rotary_pairs_across_heads_commute_with_rope() {
    for (seed, rope) in ropes().into_iter().enumerate() {
        let mut rng = Rng::new(seed as u64);
        let factors = rng.normals(HEADS * D, 1.0);
        let at = |i: usize| {
            let (h, r, c) = (i / (D * D), i / D % D, i % D);
            if r == c { factors[h * D + pair(&rope, r)] } else { 0.0 }
        };
        let basis = (0..HEADS * D * D).map(at).collect();
        let case = Case::new(&mut rng, rope.clone(), basis);
        for (first, at) in [(0, 11), (500, 600)] {
            let apart = difference(&case.rebuilt(first, at), &case.rotated_latents(first, at));
            assert!(apart < 2e-5, "{rope:?}: {apart} apart");
        }
        // Any other does not: not one that mixes dimensions, nor one that treats those of a pair differently.
        let others = [
            rng.normals(HEADS * D * D, 0.5),
            (0..HEADS * D * D).map(|i| if i / D % D == i % D { factors[i / (D * D) * D + i % D] } else { 0.0 }).collect(),
        ];
        for basis in others {
            let case = Case::new(&mut rng, rope.clone(), basis);
            let apart = difference(&case.rebuilt(0, 11), &case.rotated_latents(0, 11));
            assert!(apart > 1e-3, "{rope:?}: {apart} apart");
        }
    }
}

/// Invariant 11: RoPE is relative, also for keys rebuilt from latents.
#[test]
fn the_same_offset_on_all_positions_changes_nothing() {
    for (seed, rope) in ropes().into_iter().enumerate() {
        let mut rng = Rng::new(10 + seed as u64);
        let basis = rng.normals(HEADS * D * D, 0.5);
        let case = Case::new(&mut rng, rope, basis);
        let plain = case.rebuilt(0, 11);
        for offset in [1, 100, 1_000_000] {
            let apart = difference(&case.rebuilt(offset, 11 + offset), &plain);
            assert!(apart < 2e-5, "by {offset}: {apart} apart");
        }
        assert!(difference(&case.rebuilt(0, 14), &plain) > 1e-3, "the distance makes no difference");
    }
}
