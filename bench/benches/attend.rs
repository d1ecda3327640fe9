//! attend: one query row a sequence over paged caches, the decode step of Llama-3.1-8B's heads.

use kvlar::Codec;
use kvlar_bench::{Attend, Case, Op, Part, Rig};

pub const OP: Op = Op { name: "attend", cases };

/// Lengths between an eighth of `longest` and `longest`.
fn ragged(rig: &Rig, batch: usize, longest: usize) -> Vec<usize> {
    let mut lengths = rig.with_rng(|rng| (0..batch).map(|_| longest / 8 + rng.below(longest - longest / 8)).collect::<Vec<_>>());
    lengths[0] = longest;
    lengths
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let codecs = [Codec::Bf16, Codec::F16];
    let mut all = Vec::new();
    if rig.wants_tiny_shapes() {
        let tiny = |codec, lengths| Attend { heads: (8, 2), ..Attend::new(codec, lengths) };
        all.extend(codecs.map(|codec| tiny(codec, vec![192])));
        all.push(tiny(Codec::Bf16, ragged(rig, 3, 160)));
        all.push(Attend { contiguous: true, ..tiny(Codec::Bf16, vec![128; 2]) });
        all.push(Attend { part: Part::Schedule, ..tiny(Codec::Bf16, vec![128; 2]) });
    } else {
        for codec in codecs {
            for batch in [1, 32] {
                all.extend([4, 32, 128].map(|k| Attend::new(codec, vec![k << 10; batch])));
            }
            all.push(Attend::new(codec, ragged(rig, 32, 32 << 10)));
        }
        // Nothing between the kernel and memory: what reading can reach.
        all.push(Attend { contiguous: true, ..Attend::new(Codec::Bf16, vec![32 << 10; 32]) });
        let schedule = |batch| Attend { part: Part::Schedule, ..Attend::new(Codec::Bf16, vec![32 << 10; batch]) };
        all.extend([schedule(1), schedule(32)]);
    }
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
