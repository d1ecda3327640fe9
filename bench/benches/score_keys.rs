//! score_keys: what eviction by keys and values alone reads, 8 heads of 128 dimensions, contiguous.

use kvlar::{
    Buffer, Dtype, KeyMethod, KeySums, Pool, Result, Rows, ScoreKeysArgs, ScoreKeysPlan, ScoreKeysShape, Stream, Workspace,
};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "score_keys", cases };

const HEADS: usize = 8;
const DIM: usize = 128;

#[derive(Clone, Copy)]
struct ScoreKeys {
    method: KeyMethod,
    seqs: usize,
    rows: usize,
}

impl ScoreKeys {
    fn method_name(&self) -> &'static str {
        match self.method {
            KeyMethod::L2Norm => "l2norm",
            KeyMethod::KeyDiff => "keydiff",
            KeyMethod::LagKv => "lagkv",
            KeyMethod::ValueKeyRatio => "value_key_ratio",
        }
    }

    fn pool_bytes(&self) -> usize {
        2 * self.seqs * HEADS * self.rows * DIM
    }
}

impl Case for ScoreKeys {
    fn name(&self) -> String {
        format!("{}/b{}/t{}", self.method_name(), self.seqs, self.rows)
    }

    fn parameters(&self) -> Value {
        json!({ "method": self.method_name(), "batch": self.seqs, "rows": self.rows, "kv_heads": HEADS, "head_dim": DIM })
    }

    fn bytes(&self) -> usize {
        let pools = if self.method.needs_values() { 2 } else { 1 };
        pools * self.pool_bytes() + 4 * self.seqs * HEADS * self.rows
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (method, seqs, kv_heads, max_rows) = (self.method, self.seqs, HEADS, self.rows);
        let (dtype, head_dim, value_dim, fill) = (Dtype::Bf16, DIM, DIM, false);
        let plan = ScoreKeysShape { dtype, method, seqs, kv_heads, max_rows, head_dim, value_dim, fill }.plan(&rig.device)?;
        let pools = |used: bool| -> Result<Vec<Buffer>> {
            (0..sets).map(|_| rig.normals(Dtype::Bf16, if used { self.pool_bytes() / 2 } else { 0 })).collect()
        };
        Ok(Box::new(Buffers {
            plan,
            keys: pools(true)?,
            values: pools(self.method.needs_values())?,
            scores: rig.poisoned(4 * self.seqs * HEADS * self.rows)?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

struct Buffers {
    plan: ScoreKeysPlan,
    keys: Vec<Buffer>,
    values: Vec<Buffer>,
    scores: Buffer,
    workspace: Workspace,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let rows = self.plan.shape().max_rows;
        let needs_values = self.plan.shape().method.needs_values();
        let mut args = ScoreKeysArgs {
            rows: Rows::contiguous(None, rows),
            keys: Pool::contiguous(self.keys[set].view(), HEADS, rows, 2 * DIM),
            values: needs_values.then(|| Pool::contiguous(self.values[set].view(), HEADS, rows, 2 * DIM)),
            scores: self.scores.view_mut(),
            score_strides: None,
            sums: KeySums::Own,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("score_keys", &self.scores);
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let methods = [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::LagKv, KeyMethod::ValueKeyRatio];
    let shapes = if rig.wants_tiny_shapes() { vec![(1, 400)] } else { vec![(1, 16 << 10), (1, 128 << 10), (16, 16 << 10)] };
    let all = methods.into_iter().flat_map(|method| shapes.clone().into_iter().map(move |(seqs, rows)| (method, seqs, rows)));
    all.map(|(method, seqs, rows)| Box::new(ScoreKeys { method, seqs, rows }) as Box<dyn Case>).collect()
}
