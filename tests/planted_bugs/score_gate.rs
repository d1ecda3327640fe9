//! Bugs of score_gate.

use super::{Bug, Compiler, Suite, bug};
use kvlar::Dtype;
use kvlar_tests::Lab;
use kvlar_tests::score_gate::{GateCase, GateTensors};

pub const SUITE: Suite = Suite { name: "score_gate", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const GATE: &str = "score/gate.cuh";
const FEW: &str = "score/gate_few.cuh";

const BUGS: &[Bug] = &[
    bug("rows of the capacity", GATE, "(p.counts ? __ldg(p.counts + seq) : int(p.rows))", "int(p.rows)"),
    bug("columns from 0", GATE, "__ldg(p.first_columns + seq) : 0", "0 * __ldg(p.first_columns + seq) : 0"),
    bug("scores behind the last column", GATE, "column >= int64_t(p.columns)", "column > int64_t(p.columns)"),
    bug("scores before the first column", GATE, "column < 0 || ", ""),
    bug("rows of sequence 0", GATE, "seq * p.hidden_seq_stride + ", ""),
    bug("scores of sequence 0", GATE, "seq * p.score_seq_stride + column", "column"),
    bug("the key of the head after", GATE, "block == 0 ? int(p.group)", "block == 0 ? int(p.group) + 1"),
    bug("queries of the first pass in all", GATE, "first_query + block - 1;\n", "block - 1;\n"),
    bug(
        "an unswizzled copy",
        GATE,
        "stage + chunk_at(row, chunk), source",
        "stage + uint32_t(row * kRowBytes + 16 * chunk), source",
    ),
    bug("dims beyond the last", GATE, "source && dim < hidden_dim ? 16 : 0", "source ? 16 : 0"),
    bug("the wrong half of A", GATE, "2 * step + lane / 16));", "2 * step + 1 - lane / 16));"),
    bug(
        "columns of B crossed",
        GATE,
        "lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2",
        "lane % 8 + lane / 8 % 2 * 8, 2 * step + lane / 16",
    ),
    bug("a copy not waited for", GATE, "ptx::cp_async_wait<Tl::kStages - 2>();", "ptx::cp_async_wait<Tl::kStages - 1>();"),
    bug("a stage refilled too early", GATE, "fetch(stage + Tl::kStages - 1, free);", "fetch(stage + Tl::kStages - 1, slot);"),
    bug("dropped barrier of a stage", GATE, "wait<Tl::kStages - 2>();\n    __syncthreads();", "wait<Tl::kStages - 2>();"),
    bug("one bias for all queries", GATE, "p.bias + int64_t(query) * kDim", "p.bias + int64_t(0 * query) * kDim"),
    bug(
        "projections not rounded",
        GATE,
        "Half16<T>::unpack(Half16<T>::pack(z[0][2 * h] + bias0.x, z[0][2 * h + 1] + bias0.y))",
        "make_float2(z[0][2 * h] + bias0.x, z[0][2 * h + 1] + bias0.y)",
    ),
    bug("a sum instead of a mean square", GATE, "squares / kDim + kEpsilon", "squares + kEpsilon"),
    bug("no epsilon", GATE, " + kEpsilon", ""),
    bug("infinite rows have scores", GATE, ": NAN;", ": 0.f;"),
    bug(
        "halves of a query swapped",
        GATE,
        "a[h + 2] = Half16<T>::pack(y.x * inverse, y.y * inverse);",
        "a[h + 2] = Half16<T>::pack(y.y * inverse, y.x * inverse);",
    ),
    bug("sinks in one part", GATE, "int part = 2; part >= 0", "int part = 0; part >= 0"),
    bug("padding counts as a sink", GATE, "if (sink + 2 * lane.c + i < count) {", "{"),
    bug("sinks of head 0", GATE, "(int64_t(3 * head + part)", "(int64_t(part)"),
    bug("b left out", GATE, " + __ldg(p.offsets + query)", ""),
    bug("one diagonal weight for two", GATE, "q0.y * k0.y * w0.y", "q0.y * k0.y * w0.x"),
    bug(
        "the sum of the queries' weights",
        GATE,
        "__fdiv_rn(shared.sums[i / Tl::kRows][row], float(p.group))",
        "shared.sums[i / Tl::kRows][row]",
    ),
    bug("NaN is a score", GATE, "mean == mean ? mean : 0.f", "mean"),
    bug("scores of head 0", GATE, "shared.targets[row] + head * p.score_head_stride", "shared.targets[row]"),
    bug(
        "a head that there is not",
        GATE,
        "if (head < int(p.kv_heads) && shared.targets[row] >= 0)",
        "if (shared.targets[row] >= 0)",
    ),
    bug("sums of the launch before", GATE, "shared.sums[h][i] = 0.f;", "shared.sums[h][i] += 0.f;"),
    bug("passes beyond the last query", GATE, "min(kQueries, int(p.group) - pass * kQueries)", "kQueries"),
    bug("dims of one warp alone", FEW, "for (int w = 0; w < Few::kSumWarps; ++w)", "for (int w = 0; w < 1; ++w)"),
    bug("partial sums of one split", FEW, "first + j < splits ? __ldcg", "first + j < 1 ? __ldcg"),
    bug(
        "passes in each other's partial sums",
        FEW,
        "(int64_t(unit) * passes + pass) * splits",
        "int64_t(unit) * passes * splits",
    ),
    bug("splits that overlap", FEW, "last = min(stages, first + each);", "last = min(stages, first + each + 1);"),
    bug(
        "dropped barrier after warps' sums",
        FEW,
        "Kept(ring, at.sum).put(z, rows_of(shared));\n    }\n    __syncthreads();",
        "Kept(ring, at.sum).put(z, rows_of(shared));\n    }",
    ),
    bug("dropped barrier after queries' weights", FEW, "__syncthreads();\n  if (warp != 0 ||", "if (warp != 0 ||"),
    bug("sixteen rows for all", FEW, "(rows >> 16 * m & 0xffffu) == 0", "(rows & 0xffffu) == 0"),
    bug("the first query in all", FEW, "get(z, m, warp + 1, rows)", "get(z, m, 1, rows)"),
];

const SOURCE: &str = "#include \"score/gate.cu\"\n";

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let gate = |dim, heads, sinks| GateTensors::random(dim as u64, dim, heads, sinks);
    for (dtype, rows, dim, heads, sinks) in [
        (Dtype::Bf16, 5, 72, (2, 3), 5),
        (Dtype::F16, 35, 200, (1, 5), 17),
        (Dtype::Bf16, 2, 456, (1, 6), 16),
        (Dtype::F16, 270, 72, (3, 5), 9),
    ] {
        GateCase::new(dtype, (1, rows), gate(dim, heads, sinks)).check(lab);
    }
    for rows in [3, 150] {
        let case = GateCase::new(Dtype::Bf16, (3, rows), gate(64, (2, 2), 16)).with(|c| {
            c.columns = 2 * rows + 3;
            (c.row_gap, c.head_gap) = (8, 5);
            c.first_columns = Some(vec![rows as i32 + 2, -1, 2 * rows as i32 + 1]);
            c.counts = Some(vec![1, rows as i32, rows as i32]);
        });
        case.check(lab);
    }
    // The first 16 rows of a tile are not kept.
    GateCase::new(Dtype::Bf16, (1, 20), gate(64, (2, 2), 16)).with(|c| c.first_columns = Some(vec![-17])).check(lab);
    // What is not finite; rows so small that the epsilon shows.
    let mut odd = GateCase::new(Dtype::F16, (1, 4), gate(64, (2, 2), 16));
    odd.hidden[70] = f32::INFINITY;
    odd.hidden[130] = f32::NAN;
    odd.hidden[192..].iter_mut().for_each(|x| *x *= 8192.0);
    odd.check(lab);
    let mut vast = GateCase::new(Dtype::Bf16, (1, 4), gate(64, (2, 2), 16));
    vast.hidden.iter_mut().for_each(|x| *x *= 1e25);
    assert_eq!(vast.run(lab), [0.0; 8]);
    let mut small = GateCase::new(Dtype::Bf16, (1, 4), gate(64, (2, 2), 16));
    small.tensors.q_bias.fill(0.0);
    small.hidden.iter_mut().for_each(|x| *x /= 4096.0);
    small.check(lab);
}
