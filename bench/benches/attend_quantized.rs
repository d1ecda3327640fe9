//! attend over quantized rows, beside bf16 rows: one query row a sequence over paged caches, Llama-3.1-8B's heads.
//!
//! Goals on an H200, in percent of the read bandwidth measured in the same run: 8 bits 88, int4 80, int2 60.

use kvlar::{Codec, Format};
use kvlar_bench::{Attend, Case, Op, Rig};

pub const OP: Op = Op { name: "attend_quantized", cases };

const PAIRS: [(Codec, Codec); 7] = [
    (Codec::Bf16, Codec::Bf16),
    (Codec::Fp8, Codec::Fp8),
    (Codec::Int8, Codec::Int8),
    (Codec::Int8, Codec::Int4),
    (Codec::Int4, Codec::Int4),
    (Codec::Int4, Codec::Int2),
    (Codec::Int2, Codec::Int2),
];

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let case = |formats: (Format, Format), lengths: Vec<usize>| Attend { formats, ..Attend::new(Codec::Bf16, lengths) };
    let grouped = |codec: Codec| Format { group: Some(32), ..codec.into() };
    let kivi = |keys, values| (grouped(keys), grouped(values));
    let of_channels = [kivi(Codec::Int4Channel, Codec::Int4), kivi(Codec::Int2Channel, Codec::Int2)];
    let mut all = Vec::new();
    for formats in PAIRS.map(|(keys, values)| (keys.into(), values.into())).into_iter().chain(of_channels) {
        if rig.wants_tiny_shapes() {
            all.push(Attend { heads: (8, 2), ..case(formats, vec![192]) });
            continue;
        }
        for batch in [1, 4, 16] {
            all.extend([4, 16, 32, 128].map(|k| case(formats, vec![k << 10; batch])));
        }
    }
    let keys = Format { hadamard: true, ..Codec::Int4.into() };
    let rotated = |lengths| case((keys, Codec::Int4.into()), lengths);
    if rig.wants_tiny_shapes() {
        all.push(Attend { heads: (8, 2), ..rotated(vec![192]) });
    } else {
        all.extend([4, 128].map(|k| rotated(vec![k << 10])));
    }
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
