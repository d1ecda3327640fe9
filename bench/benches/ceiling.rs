//! ceiling: what the machine itself can do, which the floors of other ops are counted by: bytes read from memory, in one piece or
//! in scattered rows, from the L2, and over the link to the host; products of the tensor cores.

use kvlar::abi::KvlarConformance;
use kvlar::{Buffer, Result, Stream};
use kvlar_bench::{Case, Launches, Op, Rig};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "ceiling", cases };

/// First part of the names of what goes over the link to the host.
const HOST: &str = "host";
/// Bytes of a bulk copy.
const STAGE: usize = 8 << 10;
/// Of the block that a buffer repeats.
const BLOCK: usize = 64 << 10;

/// How kernels read.
#[derive(Clone, Copy)]
enum By {
    Loads,
    BulkCopies,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            Self::Loads => "loads",
            Self::BulkCopies => "bulk",
        }
    }

    /// Threads of a CTA.
    fn block(self) -> u32 {
        match self {
            Self::Loads => 512,
            Self::BulkCopies => 256,
        }
    }

    /// CTAs that fill an SM.
    fn ctas(self) -> u32 {
        match self {
            Self::Loads => 2,
            Self::BulkCopies => 4,
        }
    }
}

/// In which order.
#[derive(Clone, Copy)]
enum Order {
    /// From end to end, so many times.
    Rounds(u32),
    /// Once, in rows of so many bytes, each far from the one before.
    Rows(usize),
}

/// Reading `bytes` of the device's memory, or of the host's.
#[derive(Clone, Copy)]
struct Read {
    /// Where they are.
    from: &'static str,
    by: By,
    order: Order,
    ctas: u32,
    bytes: usize,
}

impl Read {
    fn rounds(&self) -> u32 {
        match self.order {
            Order::Rounds(n) => n,
            Order::Rows(_) => 1,
        }
    }

    fn is_of_host(&self) -> bool {
        self.from == HOST
    }

    fn entry(&self) -> &'static str {
        match (self.by, self.order) {
            (By::Loads, Order::Rounds(_)) => "kvlar_ceiling_loads",
            (By::Loads, Order::Rows(_)) => "kvlar_ceiling_row_loads",
            (By::BulkCopies, Order::Rounds(_)) => "kvlar_ceiling_bulk_copies",
            (By::BulkCopies, Order::Rows(_)) => "kvlar_ceiling_row_copies",
        }
    }
}

impl Case for Read {
    fn name(&self) -> String {
        let (from, by, ctas) = (self.from, self.by.name(), self.ctas);
        match self.order {
            Order::Rounds(_) => format!("{from}/{by}/{ctas}"),
            Order::Rows(bytes) => format!("{from}_rows/{by}/{bytes}B/{ctas}"),
        }
    }

    fn parameters(&self) -> Value {
        let mut all = json!({ "ctas": self.ctas, "threads": self.by.block(), "bytes": self.bytes });
        match self.order {
            Order::Rounds(n) => all["rounds"] = json!(n),
            Order::Rows(bytes) => all["row_bytes"] = json!(bytes),
        }
        all
    }

    fn bytes(&self) -> usize {
        self.bytes * self.rounds() as usize
    }

    fn set_bytes(&self) -> usize {
        self.bytes
    }

    fn max_sets(&self) -> usize {
        match (self.rounds(), self.is_of_host()) {
            (2.., _) => 1,
            (_, true) => 2, // page-locking is slow
            (_, false) => 4,
        }
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let block: Vec<u32> = rig.with_rng(|rng| (0..BLOCK / 4).map(|_| rng.bits() as u32).collect());
        let of_block = block.iter().copied().fold(0, u32::wrapping_add);
        let set = |_| {
            let filled = rig.repeated(bytemuck::cast_slice(&block), self.bytes)?;
            if self.is_of_host() { rig.on_host(&filled) } else { Ok(filled) }
        };
        Ok(Box::new(Sums {
            read: *self,
            inputs: (0..sets).map(set).collect::<Result<_>>()?,
            out: rig.poisoned(4 * self.ctas as usize)?,
            expected: of_block.wrapping_mul((self.bytes / BLOCK) as u32).wrapping_mul(self.rounds()),
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
        let (count, arg) = match read.order {
            Order::Rounds(n) => (read.bytes / 16, n),
            Order::Rows(bytes) => (read.bytes / bytes, (bytes / 16) as u32),
        };
        let params = KvlarConformance { in_: from, out: self.out.address(), count: count as u32, arg };
        // SAFETY: the buffer holds the chunks, and the output a word a CTA.
        unsafe { stream.enqueue_entry(read.entry(), read.ctas, read.by.block(), &params) }
    }

    fn check(&self, rig: &Rig) {
        let mut sums = vec![0u32; self.out.len() / 4];
        rig.stream.download(&self.out, 0, bytemuck::cast_slice_mut(&mut sums)).expect("sums");
        let sum = sums.into_iter().fold(0, u32::wrapping_add);
        assert_eq!(sum, self.expected, "{}: not all was read", self.read.entry());
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

/// The copy engine's way over the link.
#[derive(Clone, Copy)]
struct LinkCopy {
    to_host: bool,
    bytes: usize,
}

impl Case for LinkCopy {
    fn name(&self) -> String {
        format!("{HOST}/copy_{}", if self.to_host { "to" } else { "from" })
    }

    fn parameters(&self) -> Value {
        json!({ "bytes": self.bytes })
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn set_bytes(&self) -> usize {
        2 * self.bytes
    }

    fn max_sets(&self) -> usize {
        2
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let block: Vec<u32> = rig.with_rng(|rng| (0..BLOCK / 4).map(|_| rng.bits() as u32).collect());
        let pair = |_| {
            let content = rig.repeated(bytemuck::cast_slice(&block), self.bytes)?;
            let other = rig.poisoned(self.bytes)?;
            Ok(if self.to_host { (content, rig.on_host(&other)?) } else { (rig.on_host(&content)?, other) })
        };
        Ok(Box::new(Copies { pairs: (0..sets).map(pair).collect::<Result<_>>()? }))
    }
}

struct Copies {
    pairs: Vec<(Buffer, Buffer)>,
}

impl Launches for Copies {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let (from, to) = &mut self.pairs[set];
        stream.copy(from, 0..from.len(), to, 0)
    }

    fn check(&self, rig: &Rig) {
        let content = |buffer: &Buffer| {
            let mut bytes = vec![0u8; buffer.len()];
            rig.stream.download(buffer, 0, &mut bytes).expect("a download");
            bytes
        };
        assert!(self.pairs.iter().all(|(from, to)| content(from) == content(to)), "a copy is not what was copied");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let (tiny, info) = (rig.wants_tiny_shapes(), rig.device.info());
    let sms = if tiny { 2 } else { info.sm_count };
    let [memory, cached, link] = if tiny { [2 * BLOCK, BLOCK, BLOCK] } else { [1 << 30, 16 << 20, 128 << 20] };
    let rounds = if tiny { 2 } else { 16 };
    let has_bulk_copies = info.compute_capability.is_none_or(|c| c.0 >= 9);
    let mut reads = Vec::new();
    for by in [By::Loads, By::BulkCopies].into_iter().filter(|by| has_bulk_copies || matches!(by, By::Loads)) {
        let read = |from, order, ctas, bytes| Read { from, by, order, ctas, bytes };
        reads.extend([2, 4].map(|n| read("read", Order::Rounds(1), n * sms, memory)));
        reads.push(read("l2", Order::Rounds(rounds), by.ctas() * sms, cached));
        // What a gather of selected rows meets: 128 numbers of 4 bits, 16 bits, or of several heads.
        reads.extend([64, 256, 1024].map(|row| read("memory", Order::Rows(row), by.ctas() * sms, memory)));
        // A few CTAs already have as much under way as the link takes.
        reads.extend([2, 8, 32].map(|ctas| read(HOST, Order::Rounds(1), ctas, link)));
        reads.extend([256, 1024].map(|row| read(HOST, Order::Rows(row), 8, link)));
    }
    assert!(reads.iter().all(|r| r.bytes.is_multiple_of(STAGE.max(BLOCK))), "whole blocks");
    // A multiply and an add for each of m, n and k.
    let products =
        [("bf16", 0, 2 * 16 * 8 * 16), ("f16", 1, 2 * 16 * 8 * 16), ("s8", 2, 2 * 16 * 8 * 32)].map(|(name, arg, operations)| {
            let rounds = if tiny { 3 } else { 4096 };
            Products { name, arg, operations, ctas: 2 * sms, rounds }
        });
    let copies = [false, true].map(|to_host| LinkCopy { to_host, bytes: link });
    let reads = reads.into_iter().map(|case| Box::new(case) as Box<dyn Case>);
    let copies = copies.into_iter().map(|case| Box::new(case) as Box<dyn Case>);
    reads.chain(copies).chain(products.map(|case| Box::new(case) as Box<dyn Case>)).collect()
}
