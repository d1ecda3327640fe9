//! The main loop of a kernel, and the instructions of it that a common tile executes.
//!
//! Beside the work that every tile needs, the loop of an attend kernel holds what few tiles need: copies of a tile that
//! ends early, soft-capped logits, masks, a new maximum, stored positions. Branches lead around each. Which side of a
//! branch is the common one can't be read off the instruction, so the rule asks for the work instead:
//!
//! > The fast path is the shortest way through the loop, from its head back to its head, that executes exactly the
//! > tensor-core multiplications of one tile, the copies of one whole tile, and the page lookups of one tile.
//!
//! All three are needed. Multiplications keep it on the side of one kind of tile (kernels for int8 rows hold two).
//! Copies and lookups keep it in the middle of a long run of rows: at its end there is nothing left to copy. Copies of
//! a whole tile ask the L2 cache for whole lines (`LTC128B`), those of a tile that ends early don't; integer tiles also
//! copy a 4-byte (scale, zero) for each row, dense tiles none. Everything beyond that is optional by construction,
//! and a shortest path leaves it out. What remains is one tile of one segment, without mask, cap or new maximum.
//!
//! Found by Dijkstra's algorithm over (basic block, work done so far). A path never goes through a call. A guarded
//! instruction takes its issue slot whether or not its predicate holds, and counts.

use crate::sass::{Flow, Instruction, stray_sync};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

/// What a path executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Work {
    /// Tensor-core multiplications.
    pub mma: u32,
    /// 16-byte copies of a whole tile.
    pub row_copies: u32,
    /// 4-byte copies.
    pub word_copies: u32,
    /// Loads from global memory to registers: page numbers.
    pub lookups: u32,
}

impl Work {
    fn of(i: &Instruction) -> Work {
        let copy = i.name() == "LDGSTS";
        Work {
            mma: i.is_mma().into(),
            row_copies: (copy && i.has("LTC128B") && i.has("128")).into(),
            word_copies: (copy && !i.has("128") && !i.has("64")).into(),
            lookups: (i.name() == "LDG").into(),
        }
    }

    fn plus(self, other: Work) -> Work {
        Work {
            mma: self.mma + other.mma,
            row_copies: self.row_copies + other.row_copies,
            word_copies: self.word_copies + other.word_copies,
            lookups: self.lookups + other.lookups,
        }
    }

    /// The state of a path that wants `need`, or none if it has done too much. Lookups may be more: a guarded one
    /// that doesn't take effect is still in the way.
    fn towards(self, need: Work) -> Option<Work> {
        let fits = self.mma <= need.mma && self.row_copies <= need.row_copies && self.word_copies <= need.word_copies;
        fits.then(|| Work { lookups: self.lookups.min(need.lookups), ..self })
    }
}

/// Instructions that are only ever executed together.
#[derive(Debug)]
struct Block {
    /// Indices of instructions.
    start: usize,
    end: usize,
    next: Vec<usize>,
    work: Work,
    /// Whether it calls a function, in any case.
    calls: bool,
}

/// Blocks that jump back to `head`, and all between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    head: usize,
    blocks: BTreeSet<usize>,
}

/// A path up to and with a block: where it is, and what it has done.
type State = (usize, Work);
/// The shortest path to each state: its instructions, and the state before.
type Best = HashMap<State, (u32, Option<State>)>;

/// The control flow of one function.
#[derive(Debug)]
pub struct Graph {
    body: Vec<Instruction>,
    blocks: Vec<Block>,
}

impl Graph {
    /// Errors: a branch whose target the text doesn't say.
    pub fn new(body: Vec<Instruction>) -> Result<Graph, String> {
        if let Some(at) = stray_sync(&body) {
            return Err(format!("the BSYNC at {at:#x} continues elsewhere than its BSSY says"));
        }
        let index: BTreeMap<u64, usize> = body.iter().enumerate().map(|(n, i)| (i.address, n)).collect();
        let mut starts = BTreeSet::from([0]);
        for (n, i) in body.iter().enumerate() {
            match i.flow() {
                Flow::Next => continue,
                Flow::Unknown => {
                    return Err(format!("{:#x}: {} {} is a branch that can't be followed", i.address, i.opcode, i.operands));
                }
                Flow::Leave { .. } => {}
                Flow::Jump { target, .. } => {
                    let to = index
                        .get(&target)
                        .ok_or_else(|| format!("{:#x} jumps out of the function, to {target:#x}", i.address))?;
                    starts.insert(*to);
                }
            }
            starts.insert(n + 1);
        }
        starts.insert(body.len());
        let starts: Vec<usize> = starts.into_iter().filter(|&s| s <= body.len()).collect();
        let block_at = |n: usize| starts.binary_search(&n).ok().filter(|&b| b + 1 < starts.len());
        let blocks = starts.windows(2).map(|w| {
            let (start, end) = (w[0], w[1]);
            let mut next = Vec::new();
            let goes_on = match body[end - 1].flow() {
                Flow::Next | Flow::Unknown => true,
                Flow::Leave { or_next } => or_next,
                Flow::Jump { target, or_next } => {
                    next.extend(block_at(index[&target]));
                    or_next
                }
            };
            if goes_on {
                next.extend(block_at(end));
            }
            let work = body[start..end].iter().map(Work::of).fold(Work::default(), Work::plus);
            Block { start, end, next, work, calls: body[start..end].iter().any(|i| i.name() == "CALL" && !i.guarded) }
        });
        Ok(Graph { blocks: blocks.collect(), body })
    }

    /// The innermost loops that multiply on tensor cores, by address.
    pub fn main_loops(&self) -> Vec<Loop> {
        let loops = self.loops();
        let innermost = |l: &&BTreeSet<usize>| !loops.values().any(|other| other.len() < l.len() && other.is_subset(l));
        let found = loops.iter().filter(|(_, l)| innermost(l));
        found.map(|(&head, blocks)| Loop { head, blocks: blocks.clone() }).collect()
    }

    /// All loops that multiply on tensor cores, by the block that they jump back to.
    fn loops(&self) -> BTreeMap<usize, BTreeSet<usize>> {
        let mut before = vec![Vec::new(); self.blocks.len()];
        for (b, block) in self.blocks.iter().enumerate() {
            for &n in &block.next {
                before[n].push(b);
            }
        }
        let mut loops = BTreeMap::<usize, BTreeSet<usize>>::new();
        for (latch, block) in self.blocks.iter().enumerate() {
            for &head in block.next.iter().filter(|&&h| h <= latch) {
                let mut members = BTreeSet::from([head]);
                let mut open = vec![latch];
                while let Some(b) = open.pop() {
                    if members.insert(b) {
                        open.extend(&before[b]);
                    }
                }
                // A jump back into the middle of something reaches the function's start without passing its target.
                if head == 0 || !members.contains(&0) {
                    loops.entry(head).or_default().extend(members);
                }
            }
        }
        loops.retain(|_, blocks| blocks.iter().any(|&b| self.blocks[b].work.mma > 0));
        loops
    }

    /// The smallest loops around the main loops: where those take a part of a tile, these take tiles.
    pub fn tile_loops(&self) -> Vec<Loop> {
        let main = self.main_loops();
        let all = self.loops();
        let around = |inner: &Loop| {
            let outer = all.iter().filter(|(_, l)| l.len() > inner.blocks.len() && inner.blocks.is_subset(l));
            outer.min_by_key(|(_, l)| l.len()).map(|(&head, blocks)| Loop { head, blocks: blocks.clone() })
        };
        let mut found: Vec<Loop> = main.iter().filter_map(around).collect();
        found.dedup();
        found
    }

    /// Static instructions of a loop.
    pub fn size(&self, of: &Loop) -> u32 {
        of.blocks.iter().map(|&b| self.length(b)).sum()
    }

    fn length(&self, block: usize) -> u32 {
        (self.blocks[block].end - self.blocks[block].start) as u32
    }

    /// The fast path through a loop (see the module), if there is any.
    pub fn fast_path(&self, of: &Loop, need: Work) -> Option<Vec<&Instruction>> {
        let enter = |b: usize, so_far: Work| -> Option<State> {
            if self.blocks[b].calls { None } else { Some((b, so_far.plus(self.blocks[b].work).towards(need)?)) }
        };
        let first = enter(of.head, Work::default())?;
        let mut best = Best::from([(first, (self.length(of.head), None))]);
        let mut open = BinaryHeap::from([Reverse((self.length(of.head), first))]);
        while let Some(Reverse((length, state))) = open.pop() {
            if best[&state].0 < length {
                continue;
            }
            let (block, work) = state;
            for &n in &self.blocks[block].next {
                if n == of.head && work == need {
                    return Some(self.unwind(state, &best));
                }
                let Some(next) = Some(n).filter(|n| *n != of.head && of.blocks.contains(n)).and_then(|n| enter(n, work)) else {
                    continue;
                };
                let total = length + self.length(n);
                if best.get(&next).is_none_or(|b| total < b.0) {
                    best.insert(next, (total, Some(state)));
                    open.push(Reverse((total, next)));
                }
            }
        }
        None
    }

    fn unwind(&self, last: State, best: &Best) -> Vec<&Instruction> {
        let mut path = vec![last.0];
        let mut at = last;
        while let Some(previous) = best[&at].1 {
            path.push(previous.0);
            at = previous;
        }
        path.iter().rev().flat_map(|&b| &self.body[self.blocks[b].start..self.blocks[b].end]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sass::functions;

    fn graph(lines: &[&str]) -> Graph {
        let text: String = lines.iter().enumerate().map(|(n, l)| format!("/*{:04x}*/ {l} ;\n", 16 * n)).collect();
        Graph::new(functions(&format!("Function : f\n{text}")).remove("f").unwrap()).unwrap()
    }

    const COPY: &str = "LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR8][R2.64]";
    const GUARDED_COPY: &str = "LDGSTS.E.BYPASS.128 [R1], desc[UR8][R2.64], P2";
    const LOOKUP: &str = "LDG.E.CONSTANT R8, desc[UR8][R2.64]";
    const MMA: &str = "HMMA.16816.F32.BF16 R4, R8, R12, R4";

    /// An outer loop around a main loop with the end of the rows, two ways to copy, a mask and a rescale.
    fn dense() -> Graph {
        graph(&[
            "MOV R1, c[0x0][0x28]",
            "ISETP.GE.AND P3, PT, R0, R1, PT", // 0x10: the outer loop
            "@P0 BRA 0xd0",                    // 0x20: the main loop; nothing left to copy
            "@P1 BRA 0x80",                    // a whole tile?
            GUARDED_COPY,                      // 0x40
            "IADD3 R1, R1, R2, RZ",
            GUARDED_COPY,
            "BRA 0xa0",
            COPY, // 0x80
            COPY,
            "@P2 BRA 0xc0", // 0xa0: no table?
            LOOKUP,
            "NOP", // 0xc0
            MMA,   // 0xd0
            "@P4 BRA 0x120",
            "FSEL R4, R4, -INF, P5", // 0xf0: a mask
            "FSEL R5, R5, -INF, P5",
            "FSEL R6, R6, -INF, P5",
            "VOTEU.ANY UP0, P6", // 0x120
            "BRA.U !UP0, 0x170",
            "CALL.REL.NOINC 0x1b0", // 0x140: a rescale
            "FMUL R4, R4, R7",
            "BRA 0x170",
            MMA, // 0x170
            "@!P3 BRA 0x20",
            "@P3 BRA 0x10",
            "EXIT",
            "RET.REL.NODEC R20 0x0", // 0x1b0
        ])
    }

    const NEED: Work = Work { mma: 2, row_copies: 2, word_copies: 0, lookups: 1 };

    #[test]
    fn the_inner_loop_is_the_main_loop() {
        let g = dense();
        let loops = g.main_loops();
        assert_eq!(loops.len(), 1);
        assert_eq!(g.body[g.blocks[loops[0].head].start].address, 0x20);
        assert_eq!(g.size(&loops[0]), 23, "0x20 to 0x180");
    }

    #[test]
    fn the_fast_path_does_a_tiles_work_and_no_more() {
        let g = dense();
        let main = &g.main_loops()[0];
        let path: Vec<u64> = g.fast_path(main, NEED).unwrap().iter().map(|i| i.address / 16).collect();
        assert_eq!(path, [2, 3, 8, 9, 10, 11, 12, 13, 14, 18, 19, 23, 24]);
        // Without the demand for copies and lookups it would be the path of a run's last tile.
        let last = g.fast_path(main, Work { row_copies: 0, lookups: 0, ..NEED }).unwrap();
        assert_eq!(last.len(), 7);
        let without_table = g.fast_path(main, Work { lookups: 0, ..NEED }).unwrap();
        assert_eq!(without_table.len(), 12);
    }

    #[test]
    fn a_path_that_is_not_there_is_not_found() {
        let g = dense();
        let main = &g.main_loops()[0];
        for need in [Work { mma: 4, ..NEED }, Work { row_copies: 1, ..NEED }, Work { word_copies: 1, ..NEED }] {
            assert!(g.fast_path(main, need).is_none(), "{need:?}");
        }
    }

    #[test]
    fn two_kinds_of_tile_have_a_path_each() {
        let word = "LDGSTS.E [R1], desc[UR8][R2.64]";
        let g = graph(&[
            "NOP",          // the main loop: dense or int8 copies
            "@P0 BRA 0x40", //
            COPY,
            "BRA 0x60",
            COPY, // 0x40
            word,
            LOOKUP,         // 0x60
            "@P1 BRA 0xa0", // dense or int8 tile
            MMA,
            "BRA 0xd0",
            MMA, // 0xa0
            "PRMT R1, R2, R3, R4",
            MMA,
            "@P2 BRA 0x0", // 0xd0
            "EXIT",
        ]);
        let main = &g.main_loops()[0];
        assert_eq!(g.size(main), 14);
        let count = |mma, word_copies| g.fast_path(main, Work { mma, row_copies: 1, word_copies, lookups: 1 }).map(|p| p.len());
        assert_eq!((count(1, 0), count(2, 1)), (Some(9), Some(10)));
        assert_eq!((count(1, 1), count(3, 0)), (Some(9), None));
    }

    #[test]
    fn slow_code_may_lie_behind_the_loop() {
        let g = graph(&[
            "NOP", // the loop's head is not the function's start
            MMA,   // 0x10
            "@P0 BRA 0x60",
            MMA, // 0x30
            "@P1 BRA 0x10",
            "EXIT",
            "FMUL R4, R4, R7", // 0x60
            "BRA 0x30",
        ]);
        let loops = g.main_loops();
        assert_eq!(loops.len(), 1, "the jump back from 0x70 closes no loop");
        assert_eq!(g.size(&loops[0]), 6);
        assert_eq!(g.fast_path(&loops[0], Work { mma: 2, ..Work::default() }).unwrap().len(), 4);
    }

    #[test]
    fn a_guarded_call_may_leave_the_loop_but_no_path_takes_a_call() {
        let need = Work { mma: 1, ..Work::default() };
        let left = graph(&["NOP", MMA, "@P1 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT"]);
        let loops = left.main_loops();
        assert_eq!((loops.len(), left.size(&loops[0])), (1, 3));
        assert_eq!(left.fast_path(&loops[0], need).unwrap().len(), 3);
        let calls = graph(&["NOP", MMA, "CALL.REL.NOINC 0x60", "@P1 BRA 0x10", "EXIT", "NOP", "RET.REL.NODEC R6 0x0"]);
        let loops = calls.main_loops();
        assert_eq!((loops.len(), calls.size(&loops[0])), (1, 3));
        assert!(calls.fast_path(&loops[0], need).is_none());
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        let of = |lines: &str| Graph::new(functions(&format!("Function : f\n{lines}")).remove("f").unwrap()).map(|_| ());
        assert!(of("/*00*/ BRX R2 -0x10 ;\n").is_err());
        assert!(of("/*00*/ BRA 0x40 ;\n").is_err());
        assert!(of("/*00*/ BRA 0x0 ;\n").is_ok());
    }
}
