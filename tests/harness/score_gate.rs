//! Cases of score_gate.

use crate::{Lab, reference_dtype};
use kvlar::{Buffer, Dtype, Gate, GateWeights, ScoreGateArgs, ScoreGatePlan, Workspace};
use kvlar_reference::score_gate;
use kvlar_reference::testing::Rng;

/// A gate of one layer, with 16 dimensions.
#[derive(Clone, Debug)]
pub struct GateTensors {
    pub hidden_dim: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub sinks: usize,
    pub q_proj: Vec<f32>,
    pub q_bias: Vec<f32>,
    pub k_proj: Vec<f32>,
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub k_base: Vec<f32>,
    pub b: Vec<f32>,
}

pub const DIM: usize = 16;

impl GateTensors {
    /// Projections of small multiples of 1/8: those of small integers are exact in any order.
    pub fn random(seed: u64, hidden_dim: usize, (kv_heads, group): (usize, usize), sinks: usize) -> Self {
        let mut rng = Rng::new(seed);
        let mut eighths = |count: usize| (0..count).map(|_| (rng.below(9) as f32 - 4.0) / 8.0).collect::<Vec<_>>();
        let queries = kv_heads * group * DIM;
        let (q_proj, q_bias, k_proj) = (eighths(queries * hidden_dim), eighths(queries), eighths(kv_heads * DIM * hidden_dim));
        let mut rng = Rng::new(seed + 1);
        let mut near_one = || (0..DIM).map(|_| 1.0 + 0.2 * rng.normal()).collect::<Vec<_>>();
        let (q_norm, k_norm) = (near_one(), near_one());
        let (k_base, b) = (rng.normals(kv_heads * sinks * DIM, 0.7), rng.normals(kv_heads * group, 0.5));
        Self { hidden_dim, kv_heads, group, sinks, q_proj, q_bias, k_proj, q_norm, k_norm, k_base, b }
    }

    pub fn gate(&self) -> Gate<'_> {
        Gate {
            hidden_dim: self.hidden_dim,
            kv_heads: self.kv_heads,
            group: self.group,
            gate_dim: DIM,
            sinks: self.sinks,
            q_proj: &self.q_proj,
            q_bias: &self.q_bias,
            k_proj: &self.k_proj,
            q_norm: &self.q_norm,
            k_norm: &self.k_norm,
            k_base: &self.k_base,
            b: &self.b,
        }
    }
}

/// Hidden states of a batch and a gate.
#[derive(Clone, Debug)]
pub struct GateCase {
    pub dtype: Dtype,
    pub seqs: usize,
    pub rows: usize,
    pub columns: usize,
    pub tensors: GateTensors,
    /// `[B, rows, D]`, at a stride of `row_gap` more than D.
    pub hidden: Vec<f32>,
    pub row_gap: usize,
    /// Between the heads' scores.
    pub head_gap: usize,
    pub first_columns: Option<Vec<i32>>,
    pub counts: Option<Vec<i32>>,
}

/// What a case gave: scores `[B, Hk, columns + head_gap]` as they lie, NaN where nothing was written.
#[derive(Clone, Debug, PartialEq)]
pub struct GateScores(pub Vec<f32>);

impl GateCase {
    /// Small integers as hidden states.
    pub fn new(dtype: Dtype, (seqs, rows): (usize, usize), tensors: GateTensors) -> Self {
        let mut rng = Rng::new(rows as u64 + 77);
        let hidden = (0..seqs * rows * tensors.hidden_dim).map(|_| rng.below(9) as f32 - 4.0).collect();
        Self { dtype, seqs, rows, columns: rows, tensors, hidden, row_gap: 0, head_gap: 0, first_columns: None, counts: None }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn plan(&self, lab: &Lab) -> ScoreGatePlan {
        let t = &self.tensors;
        let shape = kvlar::ScoreGateShape {
            dtype: self.dtype,
            seqs: self.seqs,
            rows: self.rows,
            columns: self.columns,
            hidden_dim: t.hidden_dim,
            kv_heads: t.kv_heads,
            group: t.group,
            sinks: t.sinks,
        };
        shape.plan(&lab.device).expect("a plan")
    }

    /// By the reference, and whether a column was outside.
    pub fn expected(&self) -> (Vec<f32>, bool) {
        let (t, dtype, d) = (&self.tensors, reference_dtype(self.dtype), self.tensors.hidden_dim);
        let (q_proj, k_proj) = (dtype.round_all(&t.q_proj), dtype.round_all(&t.k_proj));
        let gate = Gate { q_proj: &q_proj, k_proj: &k_proj, ..t.gate() };
        let stride = self.columns + self.head_gap;
        let mut scores = vec![f32::NAN; self.seqs * t.kv_heads * stride];
        let mut outside = false;
        for seq in 0..self.seqs {
            let first = self.first_columns.as_ref().map_or(0, |f| f[seq]);
            let count = self.counts.as_ref().map_or(self.rows, |c| c[seq].clamp(0, self.rows as i32) as usize);
            let hidden = dtype.round_all(&self.hidden[seq * self.rows * d..][..count * d]);
            let all = score_gate(&hidden, &gate, dtype).expect("scores");
            for (i, score) in all.into_iter().enumerate() {
                let (head, column) = (i / count, first + (i % count) as i32);
                if column < 0 || column >= self.columns as i32 {
                    outside = true;
                    continue;
                }
                scores[(seq * t.kv_heads + head) * stride + column as usize] = score;
            }
        }
        (scores, outside)
    }

    /// Runs it.
    pub fn run(&self, lab: &Lab) -> Vec<f32> {
        let mut run = GateRun::new(lab, self);
        run.launch(&lab.stream).expect("score_gate");
        run.scores()
    }

    /// Runs it and compares: to 1e-5, but for one score in fifty, which a value on the boundary of two 16-bit numbers may move.
    pub fn check(&self, lab: &Lab) -> GateScores {
        self.check_to(lab, 1e-5)
    }

    /// Likewise, with another bound of those that are not exceptions.
    pub fn check_to(&self, lab: &Lab, near: f32) -> GateScores {
        let (expected, outside) = self.expected();
        let mut run = GateRun::new(lab, self);
        // Twice: what a launch leaves behind does not matter to the next.
        for _ in 0..2 {
            run.launch(&lab.stream).expect("score_gate");
        }
        let scores = run.scores();
        run.compare(&scores, &expected, near);
        let status = run.workspace.status(&lab.stream).expect("a status");
        assert_eq!(status.bad_slot(), outside);
        assert!(lab.counters(&run.workspace, run.plan.workspace()).iter().all(|&x| x == 0), "counters");
        GateScores(scores)
    }
}

/// A case on a device.
pub struct GateRun<'a> {
    lab: &'a Lab,
    case: GateCase,
    pub plan: ScoreGatePlan,
    weights: GateWeights,
    hidden: Buffer,
    scores: Buffer,
    pub first_columns: Option<Buffer>,
    pub counts: Option<Buffer>,
    pub workspace: Workspace,
}

impl<'a> GateRun<'a> {
    pub fn new(lab: &'a Lab, case: &GateCase) -> Self {
        let plan = case.plan(lab);
        let weights = GateWeights::new(&lab.device, &lab.stream, &case.tensors.gate(), case.dtype).expect("weights");
        assert_eq!(&weights.shape(case.seqs, case.rows, case.columns), plan.shape());
        let d = case.tensors.hidden_dim;
        // NaN between rows, nothing behind the last.
        let mut hidden = Vec::new();
        for row in case.hidden.chunks(d) {
            hidden.resize(hidden.len().next_multiple_of(d + case.row_gap), f32::NAN);
            hidden.extend_from_slice(row);
        }
        let scores = case.seqs * case.tensors.kv_heads * (case.columns + case.head_gap);
        let ints = |x: &Option<Vec<i32>>| x.as_ref().map(|x| lab.upload(x));
        Self {
            lab,
            plan,
            weights,
            hidden: lab.upload_as(&hidden, case.dtype),
            scores: lab.poisoned(4 * scores),
            first_columns: ints(&case.first_columns),
            counts: ints(&case.counts),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            case: case.clone(),
        }
    }

    pub fn launch(&mut self, stream: &kvlar::Stream) -> kvlar::Result<()> {
        let (c, heads) = (&self.case, self.case.tensors.kv_heads);
        let (row, head) = (c.tensors.hidden_dim + c.row_gap, c.columns + c.head_gap);
        let mut args = ScoreGateArgs {
            hidden: self.hidden.view(),
            hidden_strides: (c.row_gap > 0).then_some([c.rows * row, row]),
            weights: &self.weights,
            scores: self.scores.view_mut(),
            score_strides: (c.head_gap > 0).then_some([heads * head, head]),
            first_columns: self.first_columns.as_ref().map(Buffer::view),
            counts: self.counts.as_ref().map(Buffer::view),
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    pub fn scores(&self) -> Vec<f32> {
        self.lab.download(&self.scores)
    }

    pub fn poison(&mut self) {
        let end = self.scores.len();
        self.lab.stream.fill(&mut self.scores, 0..end, 0xff).expect("poison");
    }

    pub fn compare(&self, actual: &[f32], expected: &[f32], near: f32) {
        let far = if self.case.dtype == Dtype::F16 { 1e-3 } else { 8e-3 };
        let mut exceptions = 0;
        for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
            assert_eq!(a.is_nan(), e.is_nan(), "score {i}: {a}, not {e}: {:?}", self.plan);
            if e.is_nan() {
                continue;
            }
            assert!((a - e).abs() <= far, "score {i}: {a}, not {e}: {:?}", self.plan);
            assert_eq!(a == 0.0, e == 0.0, "score {i}: {a}, not {e}");
            exceptions += usize::from((a - e).abs() > near);
        }
        let scores = expected.iter().filter(|x| !x.is_nan()).count();
        // Numbers of f16 are eight times as close, and so are values to their boundaries.
        let allowed = scores / 50 + usize::from(self.case.dtype == Dtype::F16 && scores >= 10);
        assert!(exceptions <= allowed, "{exceptions} of {scores} scores are off: {:?}", self.plan);
    }
}
