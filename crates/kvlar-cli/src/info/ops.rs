//! What each op takes, found by asking its launcher: a shape has a plan, or is refused.

use kvlar::{
    AppendGroupsShape, AppendLowrankShape, AppendShape, AttendCutShape, AttendShape, BudgetHeadsShape, BudgetLayersShape, Codec,
    CompactOrder, CompactShape, Device, Dtype, EncodeShape, Format, KeyMethod, Latents, LayerBudget, LowrankShape, LowrankValues,
    MAX_SEGMENTS, MergeShape, ProjectShape, ProtectShape, RANK_MULTIPLE, ReduceShape, Reduction, ScanSelectShape, ScanShape,
    ScoreGateShape, ScoreKeysShape, ScoreShape, SegmentShape, SetsShape, SideShape, Stored, TopkShape, ToppShape,
};
use std::fmt::Debug;

/// An op, and what a device has kernels for.
pub struct Op {
    /// As in the names of entry points.
    pub name: &'static str,
    /// Types of its activations.
    pub types: String,
    /// How its cached rows are stored; empty where it has none.
    pub stored: String,
    /// Sizes.
    pub limits: String,
}

const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];
const LATENTS: [Latents; 4] = [Latents::Dtype, Latents::Int8, Latents::Int8Basis, Latents::Int4];
/// Head dimension where another size is asked for.
const DIM: usize = 128;

/// Those that are planned.
fn names<T: Copy + Debug>(all: &[T], planned: impl Fn(T) -> bool) -> String {
    let found = all.iter().filter(|x| planned(**x)).map(|x| format!("{x:?}").to_lowercase());
    found.collect::<Vec<_>>().join(", ")
}

/// Codecs that are planned, whichever type activations have.
fn codecs(planned: impl Fn(Dtype, Codec) -> bool) -> String {
    let found = Codec::ALL.into_iter().filter(|&c| DTYPES.into_iter().any(|t| planned(t, c)));
    found.map(|c| c.reference().to_string()).collect::<Vec<_>>().join(", ")
}

/// The largest multiple of `step` up to `end` that is planned.
fn most(step: usize, end: usize, planned: impl Fn(usize) -> bool) -> usize {
    (1..=end / step).map(|i| i * step).filter(|&n| planned(n)).max().unwrap_or(0)
}

fn head_dims(planned: impl Fn(usize) -> bool) -> String {
    format!("head dimension to {}", most(8, 1024, planned))
}

fn append(device: &Device) -> Op {
    let planned = |dtype, codec, dim| {
        let (seqs, kv_heads, new_rows) = (1, 1, 1);
        let format = Format::from(codec);
        AppendShape { dtype, key_format: format, value_format: format, seqs, kv_heads, new_rows, head_dim: dim, value_dim: dim }
            .plan(device)
            .is_ok()
    };
    Op {
        name: "append",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM)),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d)),
    }
}

fn append_groups(device: &Device) -> Op {
    let planned = |dtype, codec: Codec, dim| {
        let Some(native) = Option::<Codec>::from(dtype) else { return false };
        let (seqs, kv_heads, new_rows, own) = (1, 1, 1, Format::from(native));
        let append =
            AppendShape { dtype, key_format: own, value_format: own, seqs, kv_heads, new_rows, head_dim: dim, value_dim: dim };
        let format = Format::from(codec);
        AppendGroupsShape { append, key_format: format, value_format: format, pack_rows: 32, max_packs: 1 }.plan(device).is_ok()
    };
    Op {
        name: "append_groups",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM)),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d)),
    }
}

fn append_lowrank(device: &Device) -> Op {
    let planned = |dtype, codec, head_dim, rank| {
        let keys = SideShape::Project { kv_heads: 64, head_dim, groups: 1, size: 64, rank, codec };
        AppendLowrankShape { dtype, seqs: 1, new_rows: 1, keys, values: SideShape::None }.plan(device).is_ok()
    };
    let rank = most(RANK_MULTIPLE, 1 << 14, |r| planned(Dtype::Bf16, Codec::Int8, DIM, r));
    Op {
        name: "append_lowrank",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM, 32)),
        stored: codecs(|t, c| planned(t, c, DIM, 32)),
        limits: format!("{}, rank to {rank}", head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d, 32))),
    }
}

fn attend(device: &Device) -> Op {
    // Channel-wise codecs are for keys.
    let planned = |dtype, codec: Codec, dim| {
        let values = if codec.is_channel_wise() { Codec::Int4 } else { codec };
        let rows = SegmentShape { keys: codec.into(), values: values.into(), max_rows: 64 };
        AttendShape::new(dtype, 1, (1, 1), 1, dim, rows).plan(device).is_ok()
    };
    Op {
        name: "attend",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM)),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: format!("{}, 1 to {MAX_SEGMENTS} segments", head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d))),
    }
}

fn attend_cut(device: &Device) -> Op {
    let planned = |dtype, codec: Codec, dim| {
        let attend = AttendShape::new(dtype, 1, (1, 1), 1, dim, SegmentShape::new(codec, 64));
        AttendCutShape::new(attend).plan(device).is_ok()
    };
    Op {
        name: "attend_cut",
        types: names(&DTYPES, |t| Option::<Codec>::from(t).is_some_and(|native| planned(t, native, DIM))),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: format!("{}, as attend, over the rows at or above a cut", head_dims(|d| planned(Dtype::Bf16, Codec::Bf16, d))),
    }
}

fn attend_lowrank(device: &Device) -> Op {
    // Groups of two kv heads.
    let sets = SetsShape { count: 1, largest: 2, kv_heads: 2, key_groups: 1, value_groups: 1, sizes_hash: 0 };
    let planned = |dtype, latents: Latents, dim, query_rows, (key, value)| {
        let native = Option::<Codec>::from(dtype).unwrap_or(Codec::Bf16);
        let exact = SegmentShape::new(native, 64);
        let attend = AttendShape::new(dtype, 1, (2, 2), query_rows, dim, exact);
        let values = LowrankValues::Latent { rank: value, codec: latents.codec(native) };
        LowrankShape::new(attend, 64, key, latents, values, sets).plan(device).is_ok()
    };
    let (bf16, small) = (Dtype::Bf16, (32, 32));
    let rank = |of: fn(usize) -> (usize, usize)| most(RANK_MULTIPLE, 1 << 14, |r| planned(bf16, Latents::Dtype, DIM, 1, of(r)));
    let rows = most(1, 64, |n| planned(bf16, Latents::Dtype, DIM, n, small));
    let limits = [
        head_dims(|d| planned(bf16, Latents::Dtype, d, 1, small)),
        format!("ranks in steps of {RANK_MULTIPLE} (keys to {}, values to {} at {DIM})", rank(|r| (r, 32)), rank(|r| (32, r))),
        if rows < 64 { format!("query rows to {rows}") } else { "any query rows".to_string() },
        format!("1 to {MAX_SEGMENTS} segments"),
    ];
    Op {
        name: "attend_lowrank",
        types: names(&DTYPES, |t| planned(t, Latents::Dtype, DIM, 1, small)),
        stored: format!("latents {}", names(&LATENTS, |l| planned(bf16, l, DIM, 1, small))),
        limits: limits.join(", "),
    }
}

fn compact(device: &Device) -> Op {
    let planned = |keys: Stored, order| {
        CompactShape { seqs: 1, owners: 1, owners_a_layer: 1, keys, values: None, max_rows: 64, order }.plan(device).is_ok()
    };
    let of = |codec: Codec| planned(Format::from(codec).stored(DIM), CompactOrder::Any);
    let stored = codecs(|_, codec| of(codec));
    Op {
        name: "compact",
        types: "any".to_string(),
        limits: format!(
            "rows to {} bytes, keys and values together",
            most(16, 1 << 17, |n| planned(Stored::row_wise(n, 0), CompactOrder::Keep))
        ),
        stored,
    }
}

fn encode(device: &Device) -> Op {
    let planned = |dtype, codec, dim| {
        EncodeShape { format: Format::from(codec), dtype, seqs: 1, heads: 1, rows: 1, dim }.plan(device).is_ok()
    };
    Op {
        name: "encode",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM)),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: format!("{}; and decode", head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d))),
    }
}

fn merge(device: &Device) -> Op {
    let planned = MergeShape { parts: 2, rows: 1, dim: DIM }.plan(device).is_ok();
    Op {
        name: "merge",
        types: if planned { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: "partial results".to_string(),
    }
}

fn project(device: &Device) -> Op {
    let planned = |dtype, out_dtype, head_dim, rank| {
        let (seqs, kv_heads, rows, groups, size) = (1, 64, 1, 1, 64);
        ProjectShape { dtype, out_dtype, seqs, kv_heads, rows, head_dim, groups, size, rank }.plan(device).is_ok()
    };
    let bf16 = Dtype::Bf16;
    let rank = most(RANK_MULTIPLE, 1 << 14, |r| planned(bf16, bf16, DIM, r));
    let out = names(&DTYPES, |t| planned(bf16, t, DIM, 32));
    Op {
        name: "project",
        types: names(&DTYPES, |t| planned(t, t, DIM, 32)),
        stored: String::new(),
        limits: format!("{}, rank to {rank}, bf16 rows to {out}", head_dims(|d| planned(bf16, bf16, d, 32))),
    }
}

fn protect(device: &Device) -> Op {
    let shape = ProtectShape { seqs: 1, owners: 1, rows: 1, sink_positions: 4, value: f32::INFINITY, fill: true };
    Op {
        name: "protect",
        types: if shape.plan(device).is_ok() { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: "scores of rows at any positions".to_string(),
    }
}

fn reduce(device: &Device) -> Op {
    let planned = |method| {
        ReduceShape { seqs: 1, q_heads: 2, kv_heads: 1, rows: 1, method, histogram: true, fill: true }.plan(device).is_ok()
    };
    Op {
        name: "reduce",
        types: if planned(Reduction::MaxProb) { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: "logits; any number of query heads a kv head".to_string(),
    }
}

fn scan(device: &Device) -> Op {
    let planned = |dtype, codec, dim| ScanShape::new(dtype, 1, (1, 1), dim, codec, 64).plan(device).is_ok();
    Op {
        name: "scan",
        types: names(&DTYPES, |t| planned(t, Codec::Int8, DIM)),
        stored: codecs(|t, c| planned(t, c, DIM)),
        limits: head_dims(|d| planned(Dtype::Bf16, Codec::Int8, d)),
    }
}

fn score(device: &Device) -> Op {
    let heads = (1, 1);
    let planned = |dtype, dim| ScoreShape::window(dtype, 1, heads, 32, 64, dim).plan(device).is_ok();
    let column = ScoreShape::column(Dtype::Bf16, 1, heads, 64, DIM).plan(device).is_ok();
    let repeat = ScoreShape::repeat(Dtype::Bf16, 1, heads, 8, 8, 64, DIM).plan(device).is_ok();
    let ways = [("windows", planned(Dtype::Bf16, DIM)), ("columns", column), ("repeated chunks", repeat)];
    Op {
        name: "score",
        types: names(&DTYPES, |t| planned(t, DIM)),
        stored: names(&DTYPES, |t| planned(t, DIM)),
        limits: [
            head_dims(|d| planned(Dtype::Bf16, d)),
            ways.into_iter().filter(|w| w.1).map(|w| w.0).collect::<Vec<_>>().join(", "),
        ]
        .join(", "),
    }
}

fn score_gate(device: &Device) -> Op {
    let planned = |dtype| {
        let (seqs, rows, columns, hidden_dim) = (1, 1 << 14, 1 << 14, 4096);
        ScoreGateShape { dtype, seqs, rows, columns, hidden_dim, kv_heads: 8, group: 4, sinks: 16 }.plan(device).is_ok()
    };
    Op {
        name: "score_gate",
        types: names(&DTYPES, planned),
        stored: String::new(),
        limits: "hidden states; gate dimension 16, any number of sinks and query heads a kv head".to_string(),
    }
}

fn score_keys(device: &Device) -> Op {
    let planned = |dtype, method, dim| {
        let (seqs, kv_heads, max_rows, fill) = (1, 1, 1 << 17, true);
        ScoreKeysShape { dtype, method, seqs, kv_heads, max_rows, head_dim: dim, value_dim: dim, fill }.plan(device).is_ok()
    };
    let methods = [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::LagKv, KeyMethod::ValueKeyRatio];
    let types = names(&DTYPES, |t| methods.into_iter().all(|m| planned(t, m, DIM)));
    Op {
        name: "score_keys",
        stored: types.clone(),
        types,
        limits: head_dims(|d| methods.into_iter().all(|m| planned(Dtype::Bf16, m, d))),
    }
}

fn scan_select(device: &Device) -> Op {
    let fused = |rows, codec| {
        let scan = ScanShape::new(Dtype::Bf16, 1, (1, 1), DIM, codec, rows);
        ScanSelectShape::new(scan, 1).plan(device).is_ok_and(|plan| plan.is_one_launch())
    };
    let most = (0..21).map(|log| 1 << log).filter(|&rows| fused(rows, Codec::Int8)).max().unwrap_or(0);
    Op {
        name: "scan_select",
        types: names(&DTYPES, |t| ScanShape::new(t, 1, (1, 1), DIM, Codec::Int8, 64).plan(device).is_ok()),
        stored: codecs(|t, c| ScanShape::new(t, 1, (1, 1), DIM, c, 64).plan(device).is_ok()),
        limits: format!("as scan; one launch to {most} rows"),
    }
}

fn topk(device: &Device) -> Op {
    let sets = TopkShape { members: 64, strict: true, ..TopkShape::new(1, 1 << 20, 1) };
    let floors = TopkShape { members: 64, floor: 4, ..TopkShape::new(1, 1 << 20, 256) };
    let planned = [TopkShape::new(1, 1, 1), sets, floors].iter().all(|s| s.plan(device).is_ok());
    Op {
        name: "topk",
        types: if planned { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: "scores; rows alone, or layers and heads together".to_string(),
    }
}

fn topp(device: &Device) -> Op {
    let planned = |rows| ToppShape::new(1, rows).plan(device).is_ok();
    let most = (0..31).map(|log| 1 << log).filter(|&rows| planned(rows)).max().unwrap_or(0);
    Op {
        name: "topp",
        types: if planned(1) { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: format!("logits; to {most} a row, row by row or in steps"),
    }
}

fn budget(device: &Device) -> Op {
    let methods = [LayerBudget::DynamicKv, LayerBudget::Pyramid, LayerBudget::Uniform];
    let layers = |method, layers| BudgetLayersShape::new(method, [1, layers, 1], 1, 1).plan(device).is_ok();
    let heads = BudgetHeadsShape::new([1, 1, 1], 1, 1).plan(device).is_ok();
    let most = most(1, 4096, |n| layers(LayerBudget::DynamicKv, n));
    Op {
        name: "budget",
        types: if heads { "f32".to_string() } else { String::new() },
        stored: String::new(),
        limits: format!("scores; of layers ({}; to {most}), of heads (adakv)", names(&methods, |m| layers(m, 1))),
    }
}

/// Every op that has kernels, in the order of their names.
pub fn ops(device: &Device) -> Vec<Op> {
    [
        append,
        append_groups,
        append_lowrank,
        attend,
        attend_cut,
        attend_lowrank,
        budget,
        compact,
        encode,
        merge,
        project,
        protect,
        reduce,
        scan,
        scan_select,
        score,
        score_gate,
        score_keys,
        topk,
        topp,
    ]
    .map(|op| op(device))
    .into()
}
