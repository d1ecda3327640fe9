//! Attention over the rows that a selection keeps: what it loses, and how its parts come together (HCAttention, arXiv
//! 2507.19823, §3).

use kvlar_reference::testing::Rng;
use kvlar_reference::{AttendInput, Forced, Resolve, ToppInput, attend, merge, topp};

const DIM: usize = 8;
const CASES: u64 = 40;

/// Keys, values, and a query that sees all of them.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Head {
    fn random(rng: &mut Rng, rows: usize) -> Self {
        Self { q: rng.normals(DIM, 2.0), k: rng.normals(rows * DIM, 1.0), v: rng.normals(rows * DIM, 1.0) }
    }

    fn rows(&self) -> usize {
        self.k.len() / DIM
    }

    fn logits(&self) -> Vec<f32> {
        let dot = |key: &[f32]| key.iter().zip(&self.q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        self.k.chunks(DIM).map(|key| (dot(key) / (DIM as f64).sqrt()) as f32).collect()
    }

    /// Output and lse over some rows.
    fn attend(&self, rows: &[usize]) -> (Vec<f32>, f32) {
        let of = |x: &[f32]| rows.iter().flat_map(|&row| x[row * DIM..][..DIM].to_vec()).collect::<Vec<f32>>();
        let (k, v) = (of(&self.k), of(&self.v));
        let a = attend(&AttendInput {
            seqs: 1,
            q_heads: 1,
            kv_heads: 1,
            query_rows: 1,
            rows: rows.len(),
            head_dim: DIM,
            value_dim: DIM,
            q: &self.q,
            k: &k,
            v: &v,
            lengths: None,
            positions: None,
            q_positions: Some(&[1000]),
            sink_logits: None,
            scale: None,
            softcap: 0.0,
            window: 0,
        })
        .unwrap();
        (a.out, a.lse[0])
    }

    /// Rows that hold a share of the softmax mass, and that share.
    fn kept(&self, top_p: f64) -> (Vec<usize>, f64) {
        let logits = self.logits();
        let kept = topp(&ToppInput {
            batch: 1,
            rows: self.rows(),
            logits: &logits,
            lengths: None,
            top_p,
            k_min: 1,
            k_max: self.rows(),
            forced: Forced::default(),
            resolve: Resolve::Exact,
        })
        .unwrap();
        ((0..self.rows()).filter(|&row| kept.mask[row] == 1).collect(), f64::from(kept.mass[0]))
    }
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// What is left out can move the output by twice its mass times the longest value; by once, where weights stay those of all
/// rows. The whole mass leaves nothing out.
#[test]
fn an_output_moves_by_no_more_than_the_mass_left_out() {
    let mut closest: f64 = 0.0;
    for seed in 0..CASES {
        let mut rng = Rng::new(seed);
        let head = Head::random(&mut rng, 1 + (seed as usize * 7) % 90);
        let all: Vec<usize> = (0..head.rows()).collect();
        let (whole, whole_lse) = head.attend(&all);
        let longest = head.v.chunks(DIM).map(|v| norm(v.iter().map(|&x| f64::from(x)))).fold(0.0, f64::max);
        for top_p in [0.3, 0.6, 0.9, 0.999, 1.0] {
            let (rows, mass) = head.kept(top_p);
            let (out, lse) = head.attend(&rows);
            assert!((f64::from(lse - whole_lse).exp() - mass).abs() < 1e-5, "the mass kept is what lse says");
            let away = |by: f64| norm(whole.iter().zip(&out).map(|(a, b)| f64::from(*a) - by * f64::from(*b)));
            let (renormalized, as_they_were) = (away(1.0), away(mass));
            assert!(renormalized <= 2.0 * (1.0 - mass) * longest + 1e-5, "seed {seed}, {top_p}: {renormalized}");
            assert!(as_they_were <= (1.0 - mass) * longest + 1e-5, "seed {seed}, {top_p}: {as_they_were}");
            if mass < 0.99 {
                closest = closest.max(as_they_were / ((1.0 - mass) * longest));
            }
            if top_p == 1.0 {
                assert_eq!((rows, out), (all.clone(), whole.clone()));
            }
        }
    }
    assert!(closest > 0.3, "bounds that nothing comes near: {closest}");
}

/// However rows are shared out between two places, their results merge to that of all.
#[test]
fn any_division_of_rows_gives_the_same() {
    for seed in 0..CASES {
        let mut rng = Rng::new(100 + seed);
        let rows = 1 + rng.below(70);
        let head = Head::random(&mut rng, rows);
        let share = [0, 1, 3, 10][seed as usize % 4];
        let (hot, cold): (Vec<usize>, Vec<usize>) = (0..head.rows()).partition(|_| rng.below(10) < share);
        let (a, b) = (head.attend(&hot), head.attend(&cold));
        let (out, lse) = merge(&[a.0, b.0].concat(), &[a.1, b.1], 2, 1, DIM).unwrap();
        let (whole, whole_lse) = head.attend(&(0..head.rows()).collect::<Vec<_>>());
        assert!((lse[0] - whole_lse).abs() < 1e-5);
        for (a, b) in out.iter().zip(&whole) {
            assert!((a - b).abs() < 1e-5, "seed {seed}: {a} instead of {b}");
        }
    }
}
