//! Scores of cached rows from keys and values alone: no queries, no attention.

use super::score_strides;
use crate::append::check_dim;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{Codec, Device, Dtype, Format, Memory, Pool, Result, Rows, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};
use kvlar_reference::KeyMethod;

const OP: &str = "score_keys";
// As in `kernels/score/keys.cuh` and `lags.cuh`.
const THREADS: u32 = 256;
const SCORE_ROWS: usize = 256;
const SUM_ROWS: usize = 1024;
const SINKS: usize = 4;
const LAG: usize = 128;

/// What [`ScoreKeysPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreKeysShape {
    /// Type of stored rows, which are dense: bf16 or f16.
    pub dtype: Dtype,
    /// What rows are judged by.
    pub method: KeyMethod,
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// Rows that a (sequence, head) can hold, at most.
    pub max_rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// dv, likewise; not used by methods without values ([`KeyMethod::needs_values`]).
    pub value_dim: usize,
    /// Rows beyond a length get −∞; else they are left as they are.
    pub fill: bool,
}

/// A validated scoring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreKeysPlan {
    shape: ScoreKeysShape,
    /// CTAs a (sequence, head).
    blocks: usize,
    /// Of the launch that sums keys; 0 without one.
    sum_blocks: usize,
}

/// Sums of k / ‖k‖ over the rows of each head, f32 `[B, Hk, d]`: what [`KeyMethod::KeyDiff`] compares keys with.
#[derive(Debug, Default)]
pub enum KeySums<'a> {
    /// Made from the rows.
    #[default]
    Own,
    /// Made from the rows and kept: append makes them grow ([`KeyScores::direction_sums`]).
    Write(ViewMut<'a>),
    /// Given: keys are read once instead of twice.
    Read(View<'a>),
}

/// Arguments of [`ScoreKeysPlan::launch`].
#[derive(Debug)]
pub struct ScoreKeysArgs<'a> {
    /// Tables, lengths (`None`: the capacity) and capacity.
    pub rows: Rows<'a>,
    /// Key rows.
    pub keys: Pool<View<'a>>,
    /// Value rows, where the method needs them.
    pub values: Option<Pool<View<'a>>>,
    /// f32 `[B, Hk, rows.max_rows]`.
    pub scores: ViewMut<'a>,
    /// Elements from one sequence, and from one head, to the next; `None`: dense.
    pub score_strides: Option<[usize; 2]>,
    /// Of [`KeyMethod::KeyDiff`]; others have none.
    pub sums: KeySums<'a>,
}

/// What append writes about new keys beside the rows, so that they need not be read again
/// ([`AppendArgs::key_scores`](crate::AppendArgs::key_scores)). Keys count as they are stored where that is dense, else as
/// rounded to the type they come in, rotated.
#[derive(Debug)]
pub struct KeyScores<'a> {
    /// −‖k‖₂ at each row's slot, f32 `[B, Hk, max_rows]`: the bits of [`KeyMethod::L2Norm`].
    pub l2norm: Option<ViewMut<'a>>,
    /// Of `l2norm`: elements from one sequence, and from one head, to the next; `None`: dense.
    pub strides: Option<[usize; 2]>,
    /// Grows by k / ‖k‖₂, f32 `[B, Hk, d]`: [`KeySums::Read`] of a later [`KeyMethod::KeyDiff`]. One new row a sequence, or
    /// their order would not be that of the rows. What is evicted stays in it until it is made anew.
    pub direction_sums: Option<ViewMut<'a>>,
}

/// The kernels' number of a method.
pub(crate) const fn method(method: KeyMethod) -> u32 {
    match method {
        KeyMethod::L2Norm => abi::KVLAR_KEYS_L2NORM,
        KeyMethod::KeyDiff => abi::KVLAR_KEYS_KEYDIFF,
        KeyMethod::LagKv => abi::KVLAR_KEYS_LAGKV,
        KeyMethod::ValueKeyRatio => abi::KVLAR_KEYS_VALUE_KEY_RATIO,
    }
}

impl KeyScores<'_> {
    /// Addresses and strides of an append's parameters.
    pub(crate) fn put(&self, params: &mut abi::KvlarAppend, heads: usize, max_rows: usize) -> Result<()> {
        let seqs = params.seqs as usize;
        if let Some(scores) = &self.l2norm {
            let [seq, head] = score_strides(scores, self.strides, [seqs, heads, max_rows])?;
            params.key_scores = scores.address();
            (params.key_score_seq_stride, params.key_score_head_stride) = (seq as i64, head as i64);
        }
        if let Some(sums) = &self.direction_sums {
            if params.new_rows > 1 {
                return unsupported(
                    "append",
                    format!("{} new rows beside direction_sums: 1 is (score_keys sums a prompt's)", params.new_rows),
                );
            }
            within("direction_sums", sums, 4 * seqs * heads * params.head_dim as usize, 4)?;
            params.key_sums = sums.address();
        }
        Ok(())
    }
}

impl ScoreKeysShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a type or head dimension without a kernel, [`crate::Error::Invalid`] for too many rows.
    pub fn plan(&self, _: &Device) -> Result<ScoreKeysPlan> {
        if self.dtype == Dtype::F32 {
            return unsupported(OP, "rows of type f32: bf16 and f16 are");
        }
        check_dim(OP, "head_dim", self.head_dim)?;
        if self.method.needs_values() {
            check_dim(OP, "value_dim", self.value_dim)?;
        }
        let blocks = match self.method {
            KeyMethod::LagKv => self.max_rows.saturating_sub(SINKS).div_ceil(LAG).max(usize::from(self.max_rows > 0)),
            _ => self.max_rows.div_ceil(SCORE_ROWS),
        };
        let heads = self.seqs.saturating_mul(self.kv_heads);
        if self.max_rows > 1 << 30 || heads.saturating_mul(blocks.max(1)) > i32::MAX as usize {
            return invalid("max_rows", format!("{} rows of {heads} heads are too many for one launch", self.max_rows));
        }
        let sum_blocks = if self.method == KeyMethod::KeyDiff { self.max_rows.div_ceil(SUM_ROWS).max(1) } else { 0 };
        Ok(ScoreKeysPlan { shape: *self, blocks, sum_blocks })
    }
}

impl ScoreKeysPlan {
    /// What it was made from.
    pub fn shape(&self) -> &ScoreKeysShape {
        &self.shape
    }

    /// Scratch that launches need: sums of keys.
    pub fn workspace(&self) -> WorkspaceSize {
        let heads = self.shape.seqs * self.shape.kv_heads;
        match self.sum_blocks {
            0 => WorkspaceSize::default(),
            n => WorkspaceSize { zeroed: 4 * heads, scratch: 4 * heads * (1 + n) * self.shape.head_dim },
        }
    }

    /// Enqueues one launch, for [`KeyMethod::KeyDiff`] two unless the sums are given; none without heads.
    ///
    /// Scores and what becomes of rows that are not finite: [`kvlar_reference::score_keys`]. A page id that is none of the
    /// pool's reads page 0 and is reported.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ScoreKeysArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let s = &self.shape;
        let (heads, stored) = ((s.kv_heads, s.kv_heads), |dim| Format::from(self.codec()).stored(dim));
        let needs_values = s.method.needs_values();
        if args.rows.max_rows > s.max_rows {
            return invalid("rows", format!("{} rows where the plan has {}", args.rows.max_rows, s.max_rows));
        }
        let values = match &args.values {
            Some(values) if needs_values => Some(values),
            None if needs_values => return invalid("values", "the method needs them"),
            _ => None,
        };
        let page_count = args.keys.page_count.min(values.map_or(usize::MAX, |v| v.page_count));
        // Positions are of no matter.
        let rows = Rows { positions: None, ..args.rows };
        rows.check("rows", s.seqs, heads, page_count)?;
        args.keys.check("keys", &rows, s.seqs, s.kv_heads, stored(s.head_dim))?;
        if let Some(values) = values {
            values.check("values", &rows, s.seqs, s.kv_heads, stored(s.value_dim))?;
        }
        let [score_seq, score_head] = score_strides(&args.scores, args.score_strides, [s.seqs, s.kv_heads, rows.max_rows])?;
        let scratch = workspace.scratch(self.workspace())?;
        let sum_bytes = 4 * s.seqs * s.kv_heads * s.head_dim;
        let has_sums = s.method == KeyMethod::KeyDiff;
        let sums = match &args.sums {
            KeySums::Own if has_sums => scratch.scratch,
            KeySums::Own => 0,
            _ if !has_sums => return invalid("sums", "they are of keydiff alone"),
            KeySums::Write(sums) => within("sums", sums, sum_bytes, 16).map(|()| sums.address())?,
            KeySums::Read(sums) => within("sums", sums, sum_bytes, 16).map(|()| sums.address())?,
        };
        let adds_up = has_sums && !matches!(args.sums, KeySums::Read(_));
        let bare = self.bare_params();
        let params = abi::KvlarScoreKeys {
            rows: rows.abi(),
            keys: args.keys.abi(),
            values: values.map_or(Default::default(), Pool::abi),
            scores: args.scores.address(),
            score_seq_stride: score_seq as i64,
            score_head_stride: score_head as i64,
            sums,
            partials: if adds_up { scratch.scratch + sum_bytes as u64 } else { 0 },
            counters: scratch.zeroed,
            status: scratch.status,
            sum_blocks: if adds_up { bare.sum_blocks } else { 0 },
            ..bare
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    fn codec(&self) -> Codec {
        if self.shape.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 }
    }

    /// The parameter struct with everything that follows from the shape; rows, pools and addresses are 0.
    pub fn bare_params(&self) -> abi::KvlarScoreKeys {
        let s = &self.shape;
        abi::KvlarScoreKeys {
            score_seq_stride: (s.kv_heads * s.max_rows) as i64,
            score_head_stride: s.max_rows as i64,
            seqs: s.seqs as u32,
            kv_heads: s.kv_heads as u32,
            head_dim: s.head_dim as u32,
            value_dim: if s.method.needs_values() { s.value_dim as u32 } else { 0 },
            method: method(s.method),
            fill: s.fill.into(),
            blocks: self.blocks as u32,
            sum_blocks: self.sum_blocks as u32,
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors; `sum_blocks` 0 says that `sums` are
    /// given.
    ///
    /// # Errors
    /// Those of the launches.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ScoreKeysPlan::bare_params`] fills in all that is not an address), and its addresses are
    /// valid on the stream's device until the launches have run; where there is scratch ([`ScoreKeysPlan::workspace`]),
    /// `counters` point to zeros and `partials` to `sum_blocks · d` values a head; `sums` are at a multiple of 16 bytes.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarScoreKeys) -> Result<()> {
        let (f16, heads) = (self.shape.dtype == Dtype::F16, self.shape.seqs * self.shape.kv_heads);
        let enqueue = |entry, blocks: usize| {
            if heads * blocks == 0 {
                return Ok(());
            }
            let launch = Launch { entry, grid: (heads * blocks) as u32, block: THREADS, shared_bytes: 0 };
            // SAFETY: the caller's promise.
            unsafe { stream.enqueue(launch, params) }
        };
        if params.sum_blocks > 0 {
            enqueue(if f16 { "kvlar_score_keys_f16_sums" } else { "kvlar_score_keys_bf16_sums" }, self.sum_blocks)?;
        }
        let entry = match (self.shape.method, f16) {
            (KeyMethod::LagKv, false) => "kvlar_score_keys_bf16_lags",
            (KeyMethod::LagKv, true) => "kvlar_score_keys_f16_lags",
            (_, false) => "kvlar_score_keys_bf16",
            (_, true) => "kvlar_score_keys_f16",
        };
        enqueue(entry, self.blocks)
    }
}
