//! Plain CPU reference of every kvlar op: the oracle that kernels are checked against.
//!
//! Everything is computed in f64 from values already rounded to their storage type ([`Dtype::round`]); outputs are
//! f32 and not rounded further. Codecs alone are defined in f32 with a fixed order of operations, so that device,
//! emulation and this crate agree bit for bit. Tensors are dense and row-major; shapes are given in each op.

#![forbid(unsafe_code)]

mod append;
mod attend;
mod attend_quantized;
mod basis;
mod budget;
mod codec;
mod compact;
pub mod compare;
mod dtype;
mod error;
mod lowrank;
mod merge;
mod reduce;
mod rope;
mod scan;
mod score;
mod select;
mod storage;
pub mod testing;
pub mod tolerance;

pub use append::{AppendInput, Appended, append};
pub use attend::{AttendInput, Attended, HeadQuery, Masking, attend, attend_row};
pub use attend_quantized::{Int8Query, QuantizedAttended, QuantizedInput, attend_quantized};
pub use basis::{Int8Basis, RotaryPairs};
pub use budget::{
    HeadsInput, LayerBudget, LayersInput, best_counts, budget_heads, budget_layers, dynamickv_rounds, largest_remainder,
};
pub use codec::{
    Codebooks, Codec, EncodedChannels, EncodedRow, Format, decode_channels, decode_fp8, decode_pq, decode_pq16, decode_row,
    encode_channels, encode_fp8, encode_pq, encode_pq16, encode_row, hadamard, pack_codes, unpack_codes,
};
pub use compact::{CompactInput, CompactOrder, Compacted, compact, row_sources};
pub use dtype::Dtype;
pub use error::ReferenceError;
pub use lowrank::{LowrankInput, LowrankValues, ProjectInput, attend_lowrank, expand_row, project};
pub use merge::merge;
pub use reduce::{ReduceInput, Reduction, reduce};
pub use rope::{Rope, RopeLayout, RopeScaling, Yarn};
pub use scan::{ScanInput, Scanned, scan};
pub use score::{
    ColumnInput, Gate, HeadReduction, KeyMethod, KeysInput, Pool, RepeatInput, RowReduction, WindowColumns, WindowInput,
    score_column, score_gate, score_keys, score_repeat, score_window,
};
pub use select::{
    Chosen, Cut, Forced, Resolve, ThresholdInput, ThresholdRule, TopK, TopP, TopkInput, ToppInput, ordered_key, ordered_row,
    threshold, topk, topp,
};
pub use storage::{HeadStorage, QuantizedRows, Storage, Tiers, quantize_rows};
