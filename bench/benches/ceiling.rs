//! ceiling: what the machine itself can do, which the floors of other ops are counted by: bytes read from memory or from the L2,
//! and products of the tensor cores.

use kvlar::abi::KvlarConformance;
use kvlar::{Buffer, Result, Stream};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "ceiling", cases };

/// Bytes of a bulk copy.
const STAGE: usize = 8 << 10;
/// Of the block that a buffer repeats.
const BLOCK: usize = 64 << 10;

/// Reading `bytes`, `rounds` times.
#[derive(Clone, Copy)]
struct Read {
    name: &'static str,
    entry: &'static str,
    block: u32,
    ctas: u32,
    bytes: usize,
    rounds: u32,
}

impl Case for Read {
    fn name(&self) -> String {
        format!("{}/{}", self.name, self.ctas)
    }

    fn parameters(&self) -> Value {
        json!({ "ctas": self.ctas, "threads": self.block, "bytes": self.bytes, "rounds": self.rounds })
    }

    fn bytes(&self) -> usize {
        self.bytes * self.rounds as usize
    }

    fn set_bytes(&self) -> usize {
        self.bytes
    }

    fn max_sets(&self) -> usize {
        if self.rounds > 1 { 1 } else { 4 }
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let block: Vec<u32> = rig.with_rng(|rng| (0..BLOCK / 4).map(|_| rng.bits() as u32).collect());
        let of_block = block.iter().copied().fold(0, u32::wrapping_add);
        let set = |_| rig.repeated(bytemuck::cast_slice(&block), self.bytes);
        Ok(Box::new(Sums {
            read: *self,
            inputs: (0..sets).map(set).collect::<Result<_>>()?,
            out: rig.poisoned(4 * self.ctas as usize)?,
            expected: of_block.wrapping_mul((self.bytes / BLOCK) as u32).wrapping_mul(self.rounds),
        }))
    }
}

struct Sums {
    read: Read,
    inputs: Vec<Buffer>,
    out: Buffer,
    expected: u32,
}

impl Launches for Sums {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let (read, from) = (&self.read, self.inputs[set].address());
        let params = KvlarConformance { in_: from, out: self.out.address(), count: (read.bytes / 16) as u32, arg: read.rounds };
        // SAFETY: the buffer holds the chunks, and the output a word a CTA.
        unsafe { stream.enqueue_entry(read.entry, read.ctas, read.block, &params) }
    }

    fn check(&self, rig: &Rig) {
        let mut sums = vec![0u32; self.out.len() / 4];
        rig.stream.download(&self.out, 0, bytemuck::cast_slice_mut(&mut sums)).expect("sums");
        let sum = sums.into_iter().fold(0, u32::wrapping_add);
        assert_eq!(sum, self.expected, "{}: not all was read", self.read.entry);
    }
}

/// Products of a type by mma.sync.
#[derive(Clone, Copy)]
struct Products {
    name: &'static str,
    arg: u32,
    /// Of a product.
    operations: usize,
    ctas: u32,
    rounds: u32,
}

/// That a round of a CTA takes: 8 warps, 8 sums each.
const PRODUCTS: usize = 64;

impl Case for Products {
    fn name(&self) -> String {
        format!("mma/{}", self.name)
    }

    fn parameters(&self) -> Value {
        json!({ "ctas": self.ctas, "rounds": self.rounds, "operations": self.operations() })
    }

    fn bytes(&self) -> usize {
        0
    }

    fn operations(&self) -> usize {
        self.operations * PRODUCTS * self.rounds as usize * self.ctas as usize
    }

    fn max_sets(&self) -> usize {
        1
    }

    fn prepare(&self, rig: &Rig, _: usize) -> Result<Box<dyn Launches>> {
        // Numbers about 1, whatever they are read as: power and clocks depend on them.
        let input = rig.normals(if self.arg == 1 { kvlar::Dtype::F16 } else { kvlar::Dtype::Bf16 }, 2 * 6 * 32)?;
        Ok(Box::new(Multiply { of: *self, input, out: rig.poisoned(4 * 32 * self.ctas as usize)? }))
    }
}

struct Multiply {
    of: Products,
    input: Buffer,
    out: Buffer,
}

impl Launches for Multiply {
    fn launch(&mut self, stream: &Stream, _: usize) -> Result<()> {
        let (of, out) = (&self.of, self.out.address());
        let params = KvlarConformance { in_: self.input.address(), out, count: of.rounds, arg: of.arg };
        // SAFETY: the buffers hold the fragments of a warp, and 32 sums a CTA.
        unsafe { stream.enqueue_entry("kvlar_ceiling_products", of.ctas, 256, &params) }
    }

    fn check(&self, rig: &Rig) {
        rig.expect_finite("ceiling products", &self.out);
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let (tiny, info) = (rig.wants_tiny_shapes(), rig.device.info());
    let sms = if tiny { 2 } else { info.sm_count };
    let (memory, cached, rounds) = if tiny { (2 * BLOCK, BLOCK, 2) } else { (1 << 30, 16 << 20, 16) };
    let loads = |name, ctas, bytes, rounds| Read { name, entry: "kvlar_ceiling_loads", block: 512, ctas, bytes, rounds };
    let bulk = |name, ctas, bytes, rounds| Read { name, entry: "kvlar_ceiling_bulk_copies", block: 256, ctas, bytes, rounds };
    let mut reads = vec![
        loads("read/loads", 2 * sms, memory, 1),
        loads("read/loads", 4 * sms, memory, 1),
        loads("l2/loads", 2 * sms, cached, rounds),
    ];
    if info.compute_capability.is_none_or(|c| c.0 >= 9) {
        reads.extend([
            bulk("read/bulk", 2 * sms, memory, 1),
            bulk("read/bulk", 4 * sms, memory, 1),
            bulk("l2/bulk", 4 * sms, cached, rounds),
        ]);
    }
    assert!(reads.iter().all(|r| r.bytes.is_multiple_of(STAGE.max(BLOCK))), "whole blocks");
    // A multiply and an add for each of m, n and k.
    let products =
        [("bf16", 0, 2 * 16 * 8 * 16), ("f16", 1, 2 * 16 * 8 * 16), ("s8", 2, 2 * 16 * 8 * 32)].map(|(name, arg, operations)| {
            let rounds = if tiny { 3 } else { 4096 };
            Products { name, arg, operations, ctas: 2 * sms, rounds }
        });
    let reads = reads.into_iter().map(|case| Box::new(case) as Box<dyn Case>);
    reads.chain(products.map(|case| Box::new(case) as Box<dyn Case>)).collect()
}
