//! Kernels of single instructions, and of what benches measure machines by: words in, words out.

use crate::Lab;
use kvlar::abi::KvlarConformance;

/// Launches `grid` CTAs of `block` threads with `count` and `arg`; gives `out` (poisoned before). `None` on the reference
/// backend, which has no instructions.
pub fn launch(
    lab: &Lab,
    name: &'static str,
    [grid, block]: [u32; 2],
    input: &[u32],
    out_words: usize,
    [count, arg]: [u32; 2],
) -> Option<Vec<u32>> {
    if !lab.runs_kernels() {
        return None;
    }
    let (from, out) = (lab.upload(input), lab.poisoned(4 * out_words));
    let params = KvlarConformance { in_: from.address(), out: out.address(), count, arg };
    // SAFETY: the kernels touch what their headers say, which is what the buffers hold.
    unsafe { lab.stream.enqueue_entry(name, grid, block, &params) }.expect(name);
    Some(lab.download(&out))
}
