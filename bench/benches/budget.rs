//! budget: rows of each layer or head, from scores: all rounds of DynamicKV, and AdaKV.

use kvlar::{
    BudgetHeadsArgs, BudgetHeadsPlan, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersPlan, BudgetLayersShape, Buffer, Dtype,
    LayerBudget, Result, Stream, Workspace,
};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "budget", cases };

#[derive(Clone, Copy)]
struct Layers(BudgetLayersShape);

#[derive(Clone, Copy)]
struct Heads(BudgetHeadsShape);

impl Case for Layers {
    fn name(&self) -> String {
        let s = &self.0;
        format!("dynamickv/l{}/h{}/p{}/base{}", s.layers, s.heads, s.rows, s.base)
    }

    fn parameters(&self) -> Value {
        let s = &self.0;
        json!({ "method": "dynamickv", "layers": s.layers, "heads": s.heads, "rows": s.rows, "base": s.base, "interval": s.interval })
    }

    /// Scores once: what is read again comes from L2 or does not.
    fn bytes(&self) -> usize {
        4 * self.0.layers * (self.0.heads * self.0.rows + 1)
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let s = &self.0;
        let plan = s.plan(&rig.device)?;
        let scores = |_| rig.normals(Dtype::F32, s.layers * s.heads * s.rows);
        Ok(Box::new(LayersBuffers {
            plan,
            scores: (0..sets).map(scores).collect::<Result<_>>()?,
            budgets: rig.poisoned(4 * s.layers)?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

impl Case for Heads {
    fn name(&self) -> String {
        format!("adakv/l{}/h{}/p{}/base{}", self.0.layers, self.0.heads, self.0.rows, self.0.base)
    }

    fn parameters(&self) -> Value {
        json!({ "method": "adakv", "layers": self.0.layers, "heads": self.0.heads, "rows": self.0.rows, "base": self.0.base })
    }

    fn bytes(&self) -> usize {
        4 * self.0.layers * self.0.heads * (self.0.rows + 1)
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let s = &self.0;
        let (plan, all) = (s.plan(&rig.device)?, s.layers * s.heads);
        let scores = |_| rig.normals(Dtype::F32, all * s.rows);
        Ok(Box::new(HeadsBuffers {
            plan,
            scores: (0..sets).map(scores).collect::<Result<_>>()?,
            budgets: rig.poisoned(4 * all)?,
            workspace: Workspace::new(&rig.device, plan.workspace())?,
        }))
    }
}

struct LayersBuffers {
    plan: BudgetLayersPlan,
    scores: Vec<Buffer>,
    budgets: Buffer,
    workspace: Workspace,
}

struct HeadsBuffers {
    plan: BudgetHeadsPlan,
    scores: Vec<Buffer>,
    budgets: Buffer,
    workspace: Workspace,
}

/// Budgets are written, and none is negative.
fn expect_budgets(rig: &Rig, budgets: &Buffer) {
    let mut found = vec![-1i32; budgets.len() / 4];
    rig.stream.download(budgets, 0, bytemuck::cast_slice_mut(&mut found)).expect("budgets");
    assert!(found.iter().all(|&rows| rows >= 0), "budget: {found:?}");
}

impl Launches for LayersBuffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = BudgetLayersArgs {
            scores: Some(self.scores[set].view()),
            score_stride: None,
            lengths: None,
            histogram: None,
            budgets: self.budgets.view_mut(),
            ks: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        expect_budgets(rig, &self.budgets);
    }
}

impl Launches for HeadsBuffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = BudgetHeadsArgs {
            scores: self.scores[set].view(),
            score_stride: None,
            lengths: None,
            histogram: None,
            budgets: self.budgets.view_mut(),
            ks: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        expect_budgets(rig, &self.budgets);
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let layers = |dims, rows, base| Box::new(Layers(BudgetLayersShape::new(LayerBudget::DynamicKv, dims, rows, base)));
    let heads = |dims, rows, base| Box::new(Heads(BudgetHeadsShape::new(dims, rows, base)));
    if rig.wants_tiny_shapes() {
        return vec![layers([1, 5, 2], 300, 20), heads([1, 2, 2], 300, 20)];
    }
    // Llama-3.1-8B: 32 layers of 8 kv heads.
    vec![layers([1, 32, 8], 8 << 10, 512), layers([1, 32, 8], 32 << 10, 2048), heads([1, 32, 8], 32 << 10, 2048)]
}
