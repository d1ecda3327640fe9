//! merge: partial results of attention into one, rows = sequences × query heads.

use kvlar::{Buffer, Dtype, MergePlan, MergeShape, Result, Stream};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "merge", cases };

#[derive(Clone, Copy)]
struct Merge(MergeShape);

impl Case for Merge {
    fn name(&self) -> String {
        format!("n{}/rows{}", self.0.parts, self.0.rows)
    }

    fn parameters(&self) -> Value {
        json!({ "parts": self.0.parts, "rows": self.0.rows, "dim": self.0.dim })
    }

    fn bytes(&self) -> usize {
        let MergeShape { parts, rows, dim } = self.0;
        4 * (parts + 1) * rows * (dim + 1)
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let MergeShape { parts, rows, dim } = self.0;
        let set = |_| {
            Ok(Set {
                parts: rig.normals(Dtype::F32, parts * rows * dim)?,
                part_lse: rig.normals(Dtype::F32, parts * rows)?,
                out: rig.poisoned(4 * rows * dim)?,
                lse: rig.poisoned(4 * rows)?,
            })
        };
        Ok(Box::new(Buffers { plan: self.0.plan(&rig.device)?, sets: (0..sets).map(set).collect::<Result<_>>()? }))
    }
}

struct Set {
    parts: Buffer,
    part_lse: Buffer,
    out: Buffer,
    lse: Buffer,
}

struct Buffers {
    plan: MergePlan,
    sets: Vec<Set>,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let s = &mut self.sets[set];
        self.plan.launch(stream, s.parts.view(), s.part_lse.view(), &mut s.out.view_mut(), &mut s.lse.view_mut())
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("merge out", &self.sets[0].out);
        rig.expect_finite("merge lse", &self.sets[0].lse);
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let shapes: &[(usize, usize)] = if rig.wants_tiny_shapes() {
        &[(2, 8), (5, 3)]
    } else {
        &[(2, 32), (8, 32), (2, 1024), (8, 1024), (32, 1024), (8, 32768)]
    };
    let case = |&(parts, rows): &(usize, usize)| Box::new(Merge(MergeShape { parts, rows, dim: 128 })) as Box<dyn Case>;
    shapes.iter().map(case).collect()
}
