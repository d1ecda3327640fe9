//! topp: the fewest rows of nine tenths of the softmax mass, row by row and in steps.

use kvlar::{Buffer, Dtype, Resolve, Result, Stream, ToppArgs, ToppPlan, ToppShape};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "topp", cases };

#[derive(Clone, Copy)]
struct Topp(ToppShape);

impl Case for Topp {
    fn name(&self) -> String {
        let resolve = if self.0.resolve == Resolve::Bin { "bin" } else { "exact" };
        format!("r{}/t{}/{resolve}", self.0.batch, self.0.rows)
    }

    fn parameters(&self) -> Value {
        let ToppShape { batch, rows, top_p, resolve, .. } = self.0;
        json!({ "batch": batch, "rows": rows, "top_p": top_p, "bins": resolve == Resolve::Bin })
    }

    fn bytes(&self) -> usize {
        self.0.batch * (4 * self.0.rows + 8)
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let ToppShape { batch, rows, .. } = self.0;
        let logits = |_| rig.normals(Dtype::F32, batch * rows);
        Ok(Box::new(Buffers {
            plan: self.0.plan(&rig.device)?,
            logits: (0..sets).map(logits).collect::<Result<_>>()?,
            cuts: rig.poisoned(8 * batch)?,
        }))
    }
}

struct Buffers {
    plan: ToppPlan,
    logits: Vec<Buffer>,
    cuts: Buffer,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let mut args = ToppArgs { cuts: Some(self.cuts.view_mut()), ..ToppArgs::new(self.logits[set].view()) };
        self.plan.launch(stream, &mut args)
    }

    fn check(&self, rig: &Rig) {
        let mut cuts = vec![u64::MAX; self.cuts.len() / 8];
        rig.stream.download(&self.cuts, 0, bytemuck::cast_slice_mut(&mut cuts)).expect("cuts");
        assert!(cuts.iter().all(|&cut| cut != u64::MAX), "topp: no cut");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let sizes = if rig.wants_tiny_shapes() { vec![(2, 600)] } else { vec![(32, 4 << 10), (32, 32 << 10), (32, 128 << 10)] };
    let both = |(batch, rows)| [Resolve::Exact, Resolve::Bin].map(|resolve| ToppShape { resolve, ..ToppShape::new(batch, rows) });
    sizes.into_iter().flat_map(both).map(|shape| Box::new(Topp(shape)) as Box<dyn Case>).collect()
}
