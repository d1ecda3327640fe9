use super::{Division, variant};
use crate::{AppendLowrankShape, Codec, Device, Dtype, ProjectShape, SideShape};

#[test]
fn every_kernel_of_the_build_is_reachable_and_exists() {
    let mut built: Vec<_> = kvlar_kernels::ENTRIES.iter().filter(|e| e.family == "project").map(|e| e.name).collect();
    let mut reached = Vec::new();
    let device = Device::reference();
    for (dtype, codec) in [(Dtype::Bf16, Codec::Bf16), (Dtype::F16, Codec::F16)] {
        for rows in [1, 1000] {
            let (kv_heads, head_dim, groups, size, rank) = (4, 64, 2, 2, 32);
            let shape = ProjectShape { dtype, out_dtype: Dtype::F32, seqs: 1, kv_heads, rows, head_dim, groups, size, rank };
            reached.push(shape.plan(&device).expect("a plan").entry());
            let keys = SideShape::Project { kv_heads, head_dim, groups, size, rank, codec };
            let shape = AppendLowrankShape { dtype, seqs: 1, new_rows: rows, keys, values: SideShape::None };
            reached.push(shape.plan(&device).expect("a plan").entry());
        }
    }
    built.sort_unstable();
    reached.sort_unstable();
    assert_eq!(built, reached);
}

#[test]
fn warps_and_ctas_cover_all_tokens_and_ranks_within_a_cta() {
    for tokens in [0, 1, 16, 17, 200, 256, 257, 5000] {
        for width in [8, 64, 120, 256, 512, 2048, 8192] {
            for rank in [1, 31, 32, 33, 100, 128, 512, 4096] {
                for whole_rows in [false, true] {
                    let d = Division::new(tokens, 3, width, rank, whole_rows);
                    let used = d.rank_warps * d.sum_warps;
                    assert!(used.is_power_of_two() && used <= 8, "{d:?}");
                    let rows = if Division::few(tokens) { 16 } else { 64 } * (8 / used);
                    assert_eq!(d.row_blocks, tokens.div_ceil(rows), "{d:?}");
                    let whole = whole_rows && !Division::few(tokens);
                    assert_eq!(d.parts, if whole { 1 } else { rank.div_ceil(32 * d.rank_warps) }, "{d:?}");
                    assert!(Division::few(tokens) || d.sum_warps == 1, "wide kernels add no sums up: {d:?}");
                    // Scratch has 16 rows a CTA.
                    assert!(d.scratch().0 == 0 || rows == 16, "{d:?}");
                    assert_eq!(d.ctas(), 3 * d.row_blocks * d.parts);
                }
            }
        }
    }
}

#[test]
fn types_without_a_kernel_are_unsupported() {
    let e = variant("project", Dtype::F32, 1, [["", ""], ["", ""]]).expect_err("no kernel");
    assert!(e.to_string().contains("f32"), "{e}");
}
