//! Scores of tokens from their hidden states, by the gate of Fast KVzip (arXiv 2601.17668).

use super::score_strides;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{Buffer, Device, Dtype, Memory, Result, Stream, Strides, View, ViewMut, Workspace, WorkspaceSize, abi};
use kvlar_reference::Gate;

const OP: &str = "score_gate";
/// Of a gate's query vectors and key.
const GATE_DIM: usize = 16;
/// 16-bit numbers whose sum is an fp32 number: a sink key's.
const SINK_PARTS: usize = 3;

// As in `kernels/score/gate.cuh`.
const MANY_ROWS: usize = 128;
const MANY_HEADS: usize = 2;
const MANY_SHARED: u32 = 2 * (128 + 160) * 128;
const FEW_ROWS: usize = 32;
const FEW_SHARED: u32 = 4 * (32 + 80) * 128;
const STAGE_DIMS: usize = 64;
const PASS_QUERIES: usize = 4;
/// Bytes of a tile's projections of a pass: 32 rows by 5 blocks of 16 columns.
const PARTIAL: usize = 4 * 32 * 5 * 16;

/// A layer's gate on a device, packed for the kernels: made once, when a model is loaded.
#[derive(Debug)]
pub struct GateWeights {
    dtype: Dtype,
    hidden_dim: usize,
    kv_heads: usize,
    group: usize,
    sinks: usize,
    /// Each head's query vectors and key, `[Hk, 16 (G + 1), D]`.
    weights: Buffer,
    /// `[Hk, 3, 8 ⌈S/8⌉, 16]`.
    sink_keys: Buffer,
    /// bias `[Hk, G, 16]`, diagonal `[16]`, offsets `[Hk, G]`.
    constants: Buffer,
}

/// Values of a 16-bit type, as bytes; an error where one is beyond it.
fn bytes_of(name: &'static str, values: &[f32], dtype: Dtype) -> Result<Vec<u8>> {
    let bytes = |x: f32| match dtype {
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
        _ => half::bf16::from_f32(x).to_le_bytes(),
    };
    if let Some(bad) = values.iter().find(|&&x| !rounded(x, dtype).is_finite()) {
        return invalid(name, format!("{bad} is beyond {dtype}"));
    }
    Ok(values.iter().flat_map(|&x| bytes(x)).collect())
}

fn rounded(x: f32, dtype: Dtype) -> f32 {
    if dtype == Dtype::F16 { half::f16::from_f32(x).to_f32() } else { half::bf16::from_f32(x).to_f32() }
}

fn upload(device: &Device, stream: &Stream, bytes: &[u8]) -> Result<Buffer> {
    let mut buffer = device.alloc(bytes.len())?;
    stream.upload(&mut buffer, 0, bytes)?;
    Ok(buffer)
}

impl GateWeights {
    /// Packs a gate for hidden states of type `dtype`, which projections and normalised values are rounded to (bf16, as the
    /// released gates; f16). Projection weights are rounded to it; norms, sink keys, biases and `b` keep fp32's digits.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for f32, a gate dimension other than 16 and a hidden dimension that is no multiple of 8;
    /// [`crate::Error::Reference`] as for [`Gate::check`]; [`crate::Error::Invalid`] for weights beyond `dtype`; errors of
    /// allocation and upload.
    pub fn new(device: &Device, stream: &Stream, gate: &Gate<'_>, dtype: Dtype) -> Result<Self> {
        let Gate { hidden_dim: d, kv_heads, group, gate_dim, sinks, .. } = *gate;
        if dtype == Dtype::F32 {
            return unsupported(OP, "type f32: bf16 and f16 are");
        }
        if gate_dim != GATE_DIM {
            return unsupported(OP, format!("gate dimension {gate_dim}: {GATE_DIM} is"));
        }
        gate.check()?;
        if !d.is_multiple_of(8) {
            return unsupported(OP, format!("hidden_dim {d}: multiples of 8 are"));
        }
        let block = GATE_DIM * d;
        let mut weights = Vec::with_capacity(kv_heads * (group + 1) * block);
        for head in 0..kv_heads {
            weights.extend_from_slice(&gate.q_proj[head * group * block..][..group * block]);
            weights.extend_from_slice(&gate.k_proj[head * block..][..block]);
        }
        // Exponentials are of base 2; 1/4 is 1/√16.
        let (unit, log2e) = (std::f64::consts::LOG2_E / 4.0, std::f64::consts::LOG2_E);
        let padded = sinks.next_multiple_of(8);
        let mut sink_keys = vec![0f32; kv_heads * SINK_PARTS * padded * GATE_DIM];
        for (i, &base) in gate.k_base.iter().enumerate() {
            let (head, sink, j) = (i / (sinks * GATE_DIM), i / GATE_DIM % sinks, i % GATE_DIM);
            let mut left = f64::from(base) * f64::from(gate.q_norm[j]) * unit;
            for part in 0..SINK_PARTS {
                let digits = rounded(left as f32, dtype);
                sink_keys[((head * SINK_PARTS + part) * padded + sink) * GATE_DIM + j] = digits;
                left -= f64::from(digits);
            }
        }
        let diagonal = gate.q_norm.iter().zip(gate.k_norm).map(|(&q, &k)| (f64::from(q) * f64::from(k) * unit) as f32);
        let offsets = gate.b.iter().map(|&b| (f64::from(b) * log2e) as f32);
        let constants: Vec<f32> = gate.q_bias.iter().copied().chain(diagonal).chain(offsets).collect();
        if let Some(bad) = constants.iter().find(|x| !x.is_finite()) {
            return invalid("gate", format!("a product of norms or b is {bad} in fp32"));
        }
        Ok(Self {
            dtype,
            hidden_dim: d,
            kv_heads,
            group,
            sinks,
            weights: upload(device, stream, &bytes_of("projections", &weights, dtype)?)?,
            sink_keys: upload(device, stream, &bytes_of("k_base", &sink_keys, dtype)?)?,
            constants: upload(device, stream, bytemuck::cast_slice(&constants))?,
        })
    }

    /// Type of hidden states.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Device memory that it takes.
    pub fn bytes(&self) -> usize {
        self.weights.len() + self.sink_keys.len() + self.constants.len()
    }

    /// The shape of scoring `rows` rows of each of `seqs` sequences with it.
    pub fn shape(&self, seqs: usize, rows: usize, columns: usize) -> ScoreGateShape {
        let Self { dtype, hidden_dim, kv_heads, group, sinks, .. } = *self;
        ScoreGateShape { dtype, seqs, rows, columns, hidden_dim, kv_heads, group, sinks }
    }

    /// The parameter struct with the addresses of the weights, for [`ScoreGatePlan::launch_raw`].
    pub fn params(&self) -> abi::KvlarScoreGate {
        let heads = self.kv_heads * self.group;
        let constant = |index: usize| self.constants.address() + 4 * index as u64;
        abi::KvlarScoreGate {
            weights: self.weights.address(),
            sinks: self.sink_keys.address(),
            bias: constant(0),
            diagonal: constant(heads * GATE_DIM),
            offsets: constant((heads + 1) * GATE_DIM),
            ..Default::default()
        }
    }
}

/// What [`ScoreGatePlan`] is made from; see [`GateWeights::shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreGateShape {
    /// Type of hidden states: bf16 or f16.
    pub dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// Rows of hidden states a sequence, at most.
    pub rows: usize,
    /// Scores that a (sequence, head) has room for.
    pub columns: usize,
    /// D; a multiple of 8.
    pub hidden_dim: usize,
    /// Hk.
    pub kv_heads: usize,
    /// G: query heads a kv head.
    pub group: usize,
    /// S: sink keys of the gate.
    pub sinks: usize,
}

/// A validated scoring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreGatePlan {
    shape: ScoreGateShape,
    /// CTAs that share the hidden dimension of a tile of few rows; `None`: tiles of many rows.
    splits: Option<usize>,
    grid: usize,
}

/// Arguments of [`ScoreGatePlan::launch`].
#[derive(Debug)]
pub struct ScoreGateArgs<'a> {
    /// `[B, rows, D]`: what the layer's attention takes, after its input norm.
    pub hidden: View<'a>,
    /// Elements from one sequence, and from one row, to the next: multiples of 8; `None`: dense.
    pub hidden_strides: Option<[usize; 2]>,
    /// The layer's gate.
    pub weights: &'a GateWeights,
    /// f32 `[B, Hk, columns]`.
    pub scores: ViewMut<'a>,
    /// Elements from one sequence, and from one head, to the next; `None`: dense.
    pub score_strides: Option<[usize; 2]>,
    /// Column that the score of a sequence's row 0 goes to, i32 `[B]`; `None`: 0. What would lie outside is not written, and
    /// reported as a bad slot.
    pub first_columns: Option<View<'a>>,
    /// Rows of each sequence that there are, i32 `[B]`; `None`: all.
    pub counts: Option<View<'a>>,
}

impl ScoreGateShape {
    /// Validates, and chooses between tiles of 128 rows by two heads, and tiles of 32 rows by one, whose hidden dimension
    /// several CTAs share where there are few: a chunk of a prefill, and a buffer of decoded tokens.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for f32 or a hidden dimension that is no multiple of 8, [`crate::Error::Invalid`] for sizes of
    /// 0 and too many rows.
    pub fn plan(&self, device: &Device) -> Result<ScoreGatePlan> {
        let Self { dtype, seqs, rows, columns, hidden_dim, kv_heads, group, sinks } = *self;
        if dtype == Dtype::F32 {
            return unsupported(OP, "type f32: bf16 and f16 are");
        }
        if hidden_dim == 0 || !hidden_dim.is_multiple_of(8) || hidden_dim > 1 << 20 {
            return unsupported(OP, format!("hidden_dim {hidden_dim}: multiples of 8 from 8 to 2^20 are"));
        }
        for (name, size, most) in [("kv_heads", kv_heads, 1 << 16), ("group", group, 1 << 10), ("sinks", sinks, 1 << 16)] {
            if size == 0 || size > most {
                return invalid(name, format!("{size} is not from 1 to {most}"));
            }
        }
        let tokens = seqs.saturating_mul(rows);
        if tokens > 1 << 30 || columns > 1 << 30 || tokens.div_ceil(FEW_ROWS).saturating_mul(kv_heads) > 1 << 24 {
            return invalid("rows", format!("{tokens} rows into {columns} columns are too many for one launch"));
        }
        let sms = device.info().sm_count as usize;
        let many = tokens.div_ceil(MANY_ROWS) * kv_heads.div_ceil(MANY_HEADS);
        if many >= sms.max(1) && device.info().shared_per_block >= MANY_SHARED {
            return Ok(ScoreGatePlan { shape: *self, splits: None, grid: many });
        }
        let units = tokens.div_ceil(FEW_ROWS) * kv_heads;
        // Two CTAs an SM, each with at least 128 dims.
        let most = hidden_dim.div_ceil(2 * STAGE_DIMS);
        let splits = (2 * sms / units.max(1)).clamp(1, most);
        // Those that an even division leaves nothing to are not launched.
        let stages = hidden_dim.div_ceil(STAGE_DIMS);
        let splits = stages.div_ceil(stages.div_ceil(splits));
        Ok(ScoreGatePlan { shape: *self, splits: Some(splits), grid: units * splits })
    }
}

impl ScoreGatePlan {
    /// What it was made from.
    pub fn shape(&self) -> &ScoreGateShape {
        &self.shape
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        match self.splits {
            None | Some(1) => WorkspaceSize::default(),
            Some(splits) => WorkspaceSize {
                zeroed: 4 * (self.grid / splits),
                scratch: self.grid * self.shape.group.div_ceil(PASS_QUERIES) * PARTIAL,
            },
        }
    }

    /// Enqueues one launch; none without rows.
    ///
    /// A token's score is the softmax weight of its own key against the gate's sink keys, mean over the query heads of a kv
    /// head, in [0, 1]. A token that is not finite, or has a projection that is not (or whose squares' sum is beyond fp32),
    /// scores 0.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ScoreGateArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let s = &self.shape;
        if args.weights.shape(s.seqs, s.rows, s.columns) != *s {
            return invalid("weights", "they are of another shape or type than the plan");
        }
        let [seq, row] = args.hidden_strides.unwrap_or([s.rows * s.hidden_dim, s.hidden_dim]);
        Strides { seq, head: 0, row }.check("hidden", &args.hidden, s.dtype, [s.seqs, 1, s.rows, s.hidden_dim])?;
        let [score_seq, score_head] = score_strides(&args.scores, args.score_strides, [s.seqs, s.kv_heads, s.columns])?;
        let ints = |name, view: &Option<View<'_>>| match view {
            None => Ok(0),
            Some(view) => within(name, view, 4 * s.seqs, 4).map(|()| view.address()),
        };
        let scratch = workspace.scratch(self.workspace())?;
        let weights = args.weights.params();
        let params = abi::KvlarScoreGate {
            hidden: args.hidden.address(),
            hidden_seq_stride: seq as i64,
            hidden_row_stride: row as i64,
            weights: weights.weights,
            sinks: weights.sinks,
            bias: weights.bias,
            diagonal: weights.diagonal,
            offsets: weights.offsets,
            scores: args.scores.address(),
            score_seq_stride: score_seq as i64,
            score_head_stride: score_head as i64,
            first_columns: ints("first_columns", &args.first_columns)?,
            counts: ints("counts", &args.counts)?,
            partials: scratch.scratch,
            counters: scratch.zeroed,
            status: scratch.status,
            ..self.bare_params()
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct with everything that follows from the shape; addresses are 0, strides those of dense tensors.
    pub fn bare_params(&self) -> abi::KvlarScoreGate {
        let s = &self.shape;
        abi::KvlarScoreGate {
            hidden_seq_stride: (s.rows * s.hidden_dim) as i64,
            hidden_row_stride: s.hidden_dim as i64,
            score_seq_stride: (s.kv_heads * s.columns) as i64,
            score_head_stride: s.columns as i64,
            seqs: s.seqs as u32,
            rows: s.rows as u32,
            hidden_dim: s.hidden_dim as u32,
            kv_heads: s.kv_heads as u32,
            group: s.group as u32,
            sink_count: s.sinks as u32,
            columns: s.columns as u32,
            splits: self.splits.unwrap_or(1) as u32,
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ScoreGatePlan::bare_params`] fills in all that is not an address), has the weights of
    /// [`GateWeights::params`], and its addresses are valid on the stream's device until the launch has run; where there is
    /// scratch ([`ScoreGatePlan::workspace`]), `counters` point to zeros and `partials` to a multiple of 16 bytes.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarScoreGate) -> Result<()> {
        if self.grid == 0 {
            return Ok(());
        }
        let (f16, grid) = (self.shape.dtype == Dtype::F16, self.grid as u32);
        let launch = match self.splits {
            None => {
                let entry = if f16 { "kvlar_score_gate_f16_many" } else { "kvlar_score_gate_bf16_many" };
                Launch { entry, grid, block: 256, shared_bytes: MANY_SHARED }
            }
            Some(_) => {
                let entry = if f16 { "kvlar_score_gate_f16_few" } else { "kvlar_score_gate_bf16_few" };
                Launch { entry, grid, block: 128, shared_bytes: FEW_SHARED }
            }
        };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(launch, params) }
    }
}
