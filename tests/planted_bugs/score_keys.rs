//! Bugs of score_keys.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, KeyMethod, KeySums};
use kvlar_tests::Lab;
use kvlar_tests::pages::Layout;
use kvlar_tests::score_keys::{Appends, CAPACITY, GAP, HEADS, KeysCase, KeysRun, SEQS, rows_to_append};

pub const SUITE: Suite = Suite { name: "score_keys", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const KEYS: &str = "score/keys.cuh";
const LAGS: &str = "score/lags.cuh";
const APPEND: &str = "append/append.cuh";
const NORM: &str = "device/norm.cuh";

const BUGS: &[Bug] = &[
    bug("lengths of head 0", KEYS, " + head * p.rows.length_head_stride", ""),
    bug("a length that is not clamped", KEYS, "length = min(max(held, 0), max_rows);", "length = max(held, 0);"),
    bug("tables of head 0", KEYS, " + head * p.rows.table_head_stride", ""),
    bug("a bad page is not reported", KEYS, "if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));", ""),
    bug("rows of page 0", KEYS, " + page * pool.page_stride +", " +"),
    bug(
        "the last batch left out",
        KEYS,
        "if (start + i * step >= last) break;",
        "if (start + i * step + step >= last && i > 0) break;",
    ),
    bug("a lane too few", KEYS, "while (lanes * kLaneDims < dim)", "while (2 * lanes * kLaneDims < dim)"),
    bug("nothing behind the length", KEYS, "if (!rows.p.fill) return;", "return;"),
    bug("scores of sequence 0", KEYS, "p.scores + seq * p.score_seq_stride + ", "p.scores + "),
    bug("scores of head 0", KEYS, " + head * p.score_head_stride", ""),
    bug("the norm itself", KEYS, "scores[row] = -length;", "scores[row] = length;"),
    bug("keys over values", KEYS, "__fdiv_rn(of_value, of_key)", "__fdiv_rn(of_key, of_value)"),
    bug("0 / 0", KEYS, "of_key == 0.f && of_value == 0.f ? 0.f : ", ""),
    bug("values as wide as keys", KEYS, "const RowLanes at(max(dim, value_dim));", "const RowLanes at(dim);"),
    bug("a zero key has no cosine", KEYS, "both == 0.f ? 0.f : ", ""),
    bug(
        "keys that are not finite have a cosine",
        KEYS,
        "length.finite() ? -cosine : NAN",
        "length.root == length.root ? -cosine : 0.f",
    ),
    bug("the cosine itself", KEYS, "? -cosine", "? cosine"),
    bug(
        "keys instead of directions",
        KEYS,
        "const float factor = there ? length.direction() : 0.f;",
        "const float factor = there && length.finite() ? 1.f : 0.f;",
    ),
    bug("infinite keys in the sum", KEYS, "if (factor != 0.f) sum[i]", "sum[i]"),
    bug(
        "sums of one row of a batch",
        KEYS,
        "for (int step = at.lanes; step < 32; step <<= 1) sum[i] +=",
        "for (int step = 32; step < 32; step <<= 1) sum[i] +=",
    ),
    bug("sums of one warp", KEYS, "for (int w = 0; w < kWarps; ++w) total +=", "for (int w = 0; w < 1; ++w) total +="),
    bug(
        "sums of one CTA",
        KEYS,
        "for (int block = 0; block < used; ++block) total +=",
        "for (int block = 0; block < 1; ++block) total +=",
    ),
    bug("too few CTAs arrive", KEYS, "p.counters + rows.number(), uint32_t(used)", "p.counters + rows.number(), p.sum_blocks"),
    bug("sums in head 0", KEYS, "float* out = p.sums + rows.number() * dim;", "float* out = p.sums;"),
    bug(
        "dropped barrier before warps' sums",
        KEYS,
        "  __syncthreads();\n  const int i = int(threadIdx.x);\n  float total",
        "  const int i = int(threadIdx.x);\n  float total",
    ),
    bug("squares beyond fp32", NORM, "if (far) scale = sum < 1.f ? 0x1p96f : 0x1p-96f;", ""),
    bug("a norm left scaled", NORM, "__fdiv_rn(root, scale)", "root"),
    bug("squares of half the lanes", NORM, "step < lanes; step <<= 1) x +=", "2 * step < lanes; step <<= 1) x +="),
    bug("3 sinks", LAGS, "kSinks = 4", "kSinks = 3"),
    bug("the last lag is ranked", LAGS, "if (start + 2 * kLag > rows.length)", "if (start + kLag > rows.length)"),
    bug("sinks without scores", LAGS, "scores[i] = 1.f;", "{}"),
    bug("the lag's own ranges", LAGS, "start + kLag, start + 2 * kLag, [&]", "start, start + kLag, [&]"),
    bug("ranges of rows that are not finite", LAGS, "if (!finite_row(x, at) || !there) return;", "finite_row(x, at);"),
    bug("a row is judged by a lane", LAGS, "(0xffffffffu >> (32 - at.lanes))", "1u << at.lane"),
    bug("ranges of one warp", LAGS, "for (int w = 0; w < kWarps; ++w) {", "for (int w = 0; w < 1; ++w) {"),
    bug(
        "ranges of one row of a batch",
        LAGS,
        "for (int step = at.lanes; step < 32; step <<= 1) {",
        "for (int step = 32; step < 32; step <<= 1) {",
    ),
    bug("constant channels divide by 0", LAGS, "width > 0.f ? fminf", "true ? fminf"),
    bug("biased deviations", LAGS, "float(dim - 1)", "float(dim)"),
    bug("padding has a deviation", LAGS, "kLaneDims * at.lane < dim ? __fsub_rn(x[i], mean) : 0.f", "__fsub_rn(x[i], mean)"),
    bug("NaN in the softmax's sum", LAGS, "sum += x == x ? weight(x) : 0.f;", "sum += weight(x);"),
    bug(
        "keys alone",
        LAGS,
        "__fadd_rn(softmax_of(lag.spreads[0], row), softmax_of(lag.spreads[1], row))",
        "softmax_of(lag.spreads[0], row)",
    ),
    bug(
        "spreads instead of weights",
        LAGS,
        "__fadd_rn(softmax_of(lag.spreads[0], row), softmax_of(lag.spreads[1], row))",
        "__fadd_rn(lag.spreads[0][row], lag.spreads[1][row])",
    ),
    bug("of equals the lower row stands lower", LAGS, "other > row)", "other < row)"),
    bug("NaN stands with the best", LAGS, "(nan && !own_nan) || ", ""),
    bug(
        "dropped barrier before ranks",
        LAGS,
        "if (i < kLag) lag.both[row] = own;\n  __syncthreads();",
        "if (i < kLag) lag.both[row] = own;",
    ),
    bug(
        "scores of rows in the order they come",
        APPEND,
        "+ head * p.key_score_head_stride + slot]",
        "+ head * p.key_score_head_stride]",
    ),
    bug("appended scores of head 0", APPEND, " + head * p.key_score_head_stride", ""),
    bug("appended scores of sequence 0", APPEND, "p.key_scores[seq * p.key_score_seq_stride + ", "p.key_scores["),
    bug("keys before they are rounded", APPEND, "  round_key(k, p);\n", ""),
    bug(
        "keys rounded to another type",
        APPEND,
        "p.key_format.codec == KVLAR_CODEC_F16 : p.dtype",
        "p.key_format.codec != KVLAR_CODEC_F16 : p.dtype",
    ),
    bug("encoded keys of another type", APPEND, ": p.dtype == KVLAR_DTYPE_F16;", ": p.dtype != KVLAR_DTYPE_F16;"),
    bug("sums start anew", APPEND, "factor, sums[i]);", "factor, 0.f);"),
    bug(
        "sums of head 0",
        APPEND,
        "p.key_sums + (int64_t(seq) * p.kv_heads + head) * p.head_dim",
        "p.key_sums + (int64_t(seq) * p.kv_heads) * p.head_dim",
    ),
    bug("sums of keys that have no direction", APPEND, "!p.key_sums || factor == 0.f || ", "!p.key_sums || "),
];

const SOURCE: &str = "#include \"score/keys.cu\"\n#include \"append/append.cu\"\n";

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let (bf16, f16) = (Dtype::Bf16, Dtype::F16);
    for method in [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::LagKv, KeyMethod::ValueKeyRatio] {
        KeysCase::new(method, bf16, Layout::PerHead(16), (2, 2), &[290, 0, 70, 264], 24).with(|c| c.head_gap = 1).check(lab);
        KeysCase::of_dims(method, f16, Layout::Hnd(16), (2, 1), &[267, 9], (40, 72)).check(lab);
        let odd = KeysCase::new(method, bf16, Layout::Contiguous, (1, 2), &[400], 24).with(|c| {
            for (row, x) in [(3, 0.0), (5, 1e30), (6, -1e-38), (9, f32::INFINITY), (12, f32::NAN), (140, f32::NAN)] {
                let lag = c.method == KeyMethod::LagKv;
                c.key(0, row).iter_mut().for_each(|y| {
                    if !lag || !x.is_finite() {
                        *y = x * y.clamp(0.5, 1.0)
                    }
                });
            }
            c.key(1, 150)[20] = f32::NEG_INFINITY;
            c.value(0, 3).fill(0.0);
            (0..400).for_each(|row| c.value(1, row)[2] = 3.0);
        });
        odd.check(lab);
    }
    KeysCase::new(KeyMethod::KeyDiff, bf16, Layout::Hnd(16), (1, 2), &[2100, 1500], 8).check(lab);
    // Ties.
    let mut equal = KeysCase::new(KeyMethod::LagKv, bf16, Layout::Contiguous, (1, 1), &[270], 16);
    equal.k.fill(1.0);
    equal.v.fill(1.0);
    equal.check(lab);
    // A length beyond the capacity, and pages that are none.
    let case = KeysCase::new(KeyMethod::L2Norm, bf16, Layout::Hnd(16), (2, 1), &[48, 20], 16).with(|c| c.fill = false);
    let mut run = KeysRun::new(lab, &case);
    lab.stream.upload(&mut run.on_device.lengths, 0, bytemuck::cast_slice(&[20i32, 70])).unwrap();
    run.launch(&lab.stream, KeySums::Own).unwrap();
    let status = run.workspace.status(&lab.stream).unwrap();
    assert!(status.bad_length() && status.bad_page());
    assert!(run.scores()[20..48].iter().all(|x| x.is_nan()));
    appends(lab);
}

/// Norms of new keys against those of the rows they became, and sums against the rows' own.
fn appends(lab: &Lab) {
    let (dim, rows) = (24, 6);
    for (dtype, codec) in [(Dtype::Bf16, Codec::Bf16), (Dtype::F16, Codec::F16), (Dtype::F16, Codec::Bf16)] {
        let k = rows_to_append(rows, dim);
        let mut dense = Appends::new(lab, dtype, codec.into(), dim);
        dense.append(&k, &[0, 2, 1, 3, 4, 5, 5, 4, 3, 2, 1, 0], rows, false).unwrap();
        let (there, scored) = (lab.download::<f32>(&dense.l2norm), dense.scored(KeyMethod::L2Norm, rows, KeySums::Own));
        for (a, s) in there.chunks(CAPACITY + GAP).zip(scored.chunks(CAPACITY)) {
            assert_eq!(a[..rows], s[..rows]);
        }
        let mut coded = Appends::new(lab, dtype, Codec::Int8.into(), dim);
        coded.append(&k, &[0, 2, 1, 3, 4, 5, 5, 4, 3, 2, 1, 0], rows, false).unwrap();
        if dtype == Dtype::F16 && codec == Codec::F16 {
            assert_eq!(lab.download::<u32>(&coded.l2norm), lab.download::<u32>(&dense.l2norm));
        }
    }
    let mut steps = Appends::new(lab, Dtype::Bf16, Codec::Bf16.into(), dim);
    for step in 0..4 {
        let mut k = rows_to_append(1, dim);
        k[dim..].iter_mut().enumerate().for_each(|(i, x)| *x += (i * step % 7) as f32);
        k[2 * dim] = if step == 2 { f32::INFINITY } else { 1.0 };
        steps.append(&k, &[step as i32; SEQS], 1, true).unwrap();
    }
    let own = steps.scored(KeyMethod::KeyDiff, 4, KeySums::Own);
    let given = steps.scored(KeyMethod::KeyDiff, 4, KeySums::Read(steps.sums.view()));
    for (a, b) in own.iter().zip(&given).take(SEQS * HEADS * CAPACITY) {
        assert!(a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-6, "{a} and {b}");
    }
}
