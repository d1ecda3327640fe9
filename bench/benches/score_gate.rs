//! score_gate: the gates of Fast KVzip, over a chunk of a prefill and over buffers of decoded tokens.

use kvlar::{Buffer, Dtype, Gate, GateWeights, Result, ScoreGateArgs, ScoreGatePlan, Stream, Workspace};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "score_gate", cases };

const GATE_DIM: usize = 16;
const SINKS: usize = 16;

#[derive(Clone, Copy)]
struct ScoreGate {
    seqs: usize,
    rows: usize,
    hidden_dim: usize,
    kv_heads: usize,
    group: usize,
}

impl ScoreGate {
    fn weights(&self, rig: &Rig) -> Result<GateWeights> {
        let Self { hidden_dim, kv_heads, group, .. } = *self;
        let (queries, scale) = (kv_heads * group * GATE_DIM, 1.0 / (hidden_dim as f32).sqrt());
        let normals = |count: usize, scale: f32| rig.with_rng(|rng| rng.normals(count, scale));
        let gate = Gate {
            hidden_dim,
            kv_heads,
            group,
            gate_dim: GATE_DIM,
            sinks: SINKS,
            q_proj: &normals(queries * hidden_dim, scale),
            q_bias: &normals(queries, scale),
            k_proj: &normals(kv_heads * GATE_DIM * hidden_dim, scale),
            q_norm: &[1.0; GATE_DIM],
            k_norm: &[1.0; GATE_DIM],
            k_base: &normals(kv_heads * SINKS * GATE_DIM, 0.5),
            b: &normals(kv_heads * group, 0.1),
        };
        GateWeights::new(&rig.device, &rig.stream, &gate, Dtype::Bf16)
    }
}

impl Case for ScoreGate {
    fn name(&self) -> String {
        format!("b{}/t{}/d{}/h{}x{}", self.seqs, self.rows, self.hidden_dim, self.kv_heads, self.group)
    }

    fn parameters(&self) -> Value {
        let flop = 2 * self.seqs * self.rows * self.hidden_dim * GATE_DIM * self.kv_heads * (self.group + 1);
        json!({
            "batch": self.seqs,
            "rows": self.rows,
            "hidden_dim": self.hidden_dim,
            "kv_heads": self.kv_heads,
            "group": self.group,
            "flop": flop,
        })
    }

    fn bytes(&self) -> usize {
        let weights = 2 * self.hidden_dim * GATE_DIM * self.kv_heads * (self.group + 1);
        self.seqs * self.rows * (2 * self.hidden_dim + 4 * self.kv_heads) + weights
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let weights = (0..sets).map(|_| self.weights(rig)).collect::<Result<Vec<_>>>()?;
        let plan = weights[0].shape(self.seqs, self.rows, self.rows).plan(&rig.device)?;
        let hidden = |_| rig.normals(Dtype::Bf16, self.seqs * self.rows * self.hidden_dim);
        Ok(Box::new(Buffers {
            plan,
            weights,
            hidden: (0..sets).map(hidden).collect::<Result<_>>()?,
            scores: rig.poisoned(4 * self.seqs * self.kv_heads * self.rows)?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

struct Buffers {
    plan: ScoreGatePlan,
    /// A layer's each.
    weights: Vec<GateWeights>,
    hidden: Vec<Buffer>,
    scores: Buffer,
    workspace: Workspace,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = ScoreGateArgs {
            hidden: self.hidden[set].view(),
            hidden_strides: None,
            weights: &self.weights[set],
            scores: self.scores.view_mut(),
            score_strides: None,
            first_columns: None,
            counts: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("score_gate", &self.scores);
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let case = |seqs, rows, (hidden_dim, kv_heads, group)| ScoreGate { seqs, rows, hidden_dim, kv_heads, group };
    let all = if rig.wants_tiny_shapes() {
        vec![case(1, 200, (64, 2, 4)), case(3, 1, (512, 2, 7))]
    } else {
        // Qwen3-8B, Qwen2.5-7B-1M, Qwen3-14B.
        let models = [(4096, 8, 4), (3584, 4, 7), (5120, 8, 5)];
        let chunks = models.into_iter().flat_map(|m| [case(1, 16_000, m), case(1, 2048, m), case(1, 128, m)]);
        chunks.chain([case(1, 1, models[0]), case(16, 1, models[0]), case(64, 1, models[0])]).collect()
    };
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
