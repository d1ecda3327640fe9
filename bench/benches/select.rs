//! topk: the best rows of each row of scores, as a cut; and those that layers and heads choose together.

use kvlar::{Buffer, Dtype, Result, Stream, TopkArgs, TopkPlan, TopkShape, Workspace};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "select", cases };

#[derive(Clone, Copy)]
struct Topk {
    shape: TopkShape,
    /// Whether the rows are listed too.
    listed: bool,
}

impl Case for Topk {
    fn name(&self) -> String {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        let sets = if members > 1 { format!("m{members}/") } else { String::new() };
        format!("b{batch}/{sets}t{rows}/k{k}{}", if self.listed { "/listed" } else { "" })
    }

    fn parameters(&self) -> Value {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        json!({ "batch": batch, "members": members, "rows": rows, "k": k, "listed": self.listed })
    }

    fn bytes(&self) -> usize {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        4 * batch * members * rows + 8 * batch + if self.listed { 4 * batch * k } else { 0 }
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let TopkShape { batch, members, rows, k, .. } = self.shape;
        let plan = self.shape.plan(&rig.device)?;
        let scores = |_| rig.normals(Dtype::F32, batch * members * rows);
        Ok(Box::new(Buffers {
            listed: self.listed,
            plan,
            scores: (0..sets).map(scores).collect::<Result<_>>()?,
            cuts: rig.poisoned(8 * batch)?,
            selected: rig.poisoned(if self.listed { 4 * batch * k } else { 0 })?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

struct Buffers {
    listed: bool,
    plan: TopkPlan,
    /// Of each set: what a scan has just written is warm in an engine, these are not.
    scores: Vec<Buffer>,
    cuts: Buffer,
    selected: Buffer,
    workspace: Workspace,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = TopkArgs {
            scores: self.scores[set].view(),
            score_stride: None,
            lengths: None,
            length_rows: 1,
            histogram: None,
            ks: None,
            cuts: Some(self.cuts.view_mut()),
            counts: None,
            selected: self.listed.then(|| self.selected.view_mut()),
            mask: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        let mut cuts = vec![u64::MAX; self.cuts.len() / 8];
        rig.stream.download(&self.cuts, 0, bytemuck::cast_slice_mut(&mut cuts)).expect("cuts");
        assert!(cuts.iter().all(|&cut| cut != u64::MAX), "topk: no cut");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let rows = |batch, rows, k, listed| Topk { shape: TopkShape::new(batch, rows, k), listed };
    let sets = |members, rows, k| Topk { shape: TopkShape { members, ..TopkShape::new(1, rows, k) }, listed: false };
    let all = if rig.wants_tiny_shapes() {
        vec![rows(2, 600, 50, true), rows(1, 33_000, 50, false), sets(3, 300, 100)]
    } else {
        let mut all = Vec::new();
        for t in [4 << 10, 16 << 10, 32 << 10, 128 << 10, 1 << 20] {
            all.extend([rows(8, t, 2048, false), rows(8, t, 2048, true)]);
        }
        // A chunk of Fast KVzip on Qwen3-8B, and a round of DynamicKV on Llama-3.1-8B: 36 layers by 8 heads, 4 by 8.
        all.extend([sets(36 * 8, 16_000, 36 * 8 * 4_800), sets(4 * 8, 128 << 10, 4 * 8 * 2048)]);
        all
    };
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
