//! Plans and launches of scores by attention.

use super::{ScoreShape, ScoredRows};
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::workspace::{Scratch, WorkspaceSize};
use crate::{Codec, DeviceInfo, Dtype, Format, Memory, Pool, Result, Rows, Stream, Strides, View, ViewMut, Workspace, abi};

/// Validated scores. `Copy`, holds no handles; reusable across layers, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScorePlan {
    shape: ScoreShape,
    lse: Lse,
    scores: Scores,
}

/// The pass that finds lse: the mirror of `kernels/score/lse.cuh`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Lse {
    entry: &'static str,
    shared: usize,
    /// Of the 4: that have queries of their own.
    query_warps: usize,
    /// Packed queries a CTA.
    width: usize,
    /// CTAs that share the queries of a kv head's group, and those that share its rows.
    query_tiles: usize,
    splits: usize,
}

/// The pass that makes scores: the mirror of `kernels/score/scores.cuh`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scores {
    entry: &'static str,
    chunk_rows: usize,
    resident: bool,
    ring_rows: usize,
    /// Bytes into dynamic shared memory, and all of it.
    queries: usize,
    lse: usize,
    sums: usize,
    shared: usize,
    splits: usize,
}

const THREADS: u32 = 128;
const WARPS: usize = 4;
/// CTAs that fit an SM's registers.
const CTAS_PER_SM: usize = 4;
/// Of a kernel and of CUDA, beside what is asked for; rounded up.
const STATIC_BYTES: usize = 3 << 10;
/// Queries that stay in shared memory may take so much: two CTAs of d = 128 then fit an SM of Hopper.
const RESIDENT_BYTES: usize = 64 << 10;
/// Of the merge of partial results, which is one CTA's work.
const MOST_SPLITS: usize = 128;

/// A kernel's head dimension, and rows that one of its warps takes.
fn template(head_dim: usize) -> (usize, usize) {
    let dim = [64, 128].into_iter().find(|&n| head_dim <= n).unwrap_or(256);
    (dim, if dim == 256 { 16 } else { 32 })
}

fn entry(names: [[&'static str; 3]; 2], dtype: Dtype, dim: usize) -> &'static str {
    names[usize::from(dtype == Dtype::F16)][dim.ilog2() as usize - 6]
}

impl Lse {
    const NAMES: [[&'static str; 3]; 2] = [
        ["kvlar_score_lse_bf16_d64", "kvlar_score_lse_bf16_d128", "kvlar_score_lse_bf16_d256"],
        ["kvlar_score_lse_f16_d64", "kvlar_score_lse_f16_d128", "kvlar_score_lse_f16_d256"],
    ];

    fn new(s: &ScoreShape, info: &DeviceInfo) -> Self {
        let (dim, warp_rows) = template(s.head_dim);
        let packed = s.group() * s.queries;
        let query_warps = [1, 2].into_iter().find(|n| packed <= n * warp_rows).unwrap_or(WARPS);
        let width = query_warps * warp_rows;
        let query_tiles = packed.div_ceil(width);
        let (tile_rows, shared) = (WARPS * warp_rows, 2 * WARPS * warp_rows * 2 * dim);
        let units = (s.seqs * s.kv_heads * query_tiles).max(1);
        // A wave of CTAs, each with two tiles at least.
        let wave = info.sm_count as usize * ctas_per_sm(shared, info) / units;
        let splits = wave.min(s.rows.div_ceil(2 * tile_rows)).clamp(1, MOST_SPLITS);
        Self { entry: entry(Self::NAMES, s.dtype, dim), shared, query_warps, width, query_tiles, splits }
    }
}

impl Scores {
    const NAMES: [[&'static str; 3]; 2] = [
        ["kvlar_score_rows_bf16_d64", "kvlar_score_rows_bf16_d128", "kvlar_score_rows_bf16_d256"],
        ["kvlar_score_rows_f16_d64", "kvlar_score_rows_f16_d128", "kvlar_score_rows_f16_d256"],
    ];

    fn new(s: &ScoreShape, info: &DeviceInfo) -> Result<Self> {
        let (dim, warp_rows) = template(s.head_dim);
        let (tile_rows, group, padded) = (WARPS * warp_rows, s.group(), s.queries.next_multiple_of(8));
        let ring_rows = s.pool.abi().1.saturating_mul(2).saturating_add(tile_rows).checked_next_power_of_two().unwrap_or(1 << 40);
        let layout = |resident: bool, chunk_rows: usize| {
            let staged = if resident { group * chunk_rows } else { 2 * chunk_rows };
            let queries = tile_rows * 2 * dim;
            let (lse, sums) = (queries + staged * 2 * dim, queries + staged * (2 * dim + 4));
            let shared = sums.saturating_add(ring_rows.saturating_mul(4 * group));
            let entry = entry(Self::NAMES, s.dtype, dim);
            Self { entry, chunk_rows, resident, ring_rows, queries, lse, sums, shared, splits: 1 }
        };
        let fits = |x: &Self| x.shared + STATIC_BYTES <= info.shared_per_block as usize;
        let whole = (group * padded * 2 * dim <= RESIDENT_BYTES).then(|| layout(true, padded));
        let parts = [64, 32, 16, 8].into_iter().map(|n: usize| layout(false, n.min(padded)));
        let Some(mut scores) = whole.into_iter().chain(parts).find(fits) else {
            let what = format!("{:?} over {group} query heads a kv head of {} dimensions on {}", s.pool, s.head_dim, info.name);
            return unsupported("score", format!("{what}: their sums do not fit shared memory"));
        };
        // A chunk may begin anywhere in a tile.
        let tiles = s.columns().div_ceil(tile_rows) + usize::from(matches!(s.scored, ScoredRows::Chunk(_)));
        let wave = info.sm_count as usize * ctas_per_sm(scores.shared, info) / (s.seqs * s.kv_heads).max(1);
        // Where queries come in chunks a tile is work enough for a CTA, and later tiles have less of it.
        scores.splits = if scores.resident { wave.clamp(1, tiles.max(1)) } else { tiles.max(1) };
        Ok(scores)
    }
}

fn ctas_per_sm(shared: usize, info: &DeviceInfo) -> usize {
    (info.shared_per_sm as usize / (shared + STATIC_BYTES)).clamp(1, CTAS_PER_SM)
}

/// Arguments of [`ScorePlan::launch`].
#[derive(Debug)]
pub struct ScoreArgs<'a> {
    /// `[B, Hq, W, d]`, rotated.
    pub q: View<'a>,
    /// `None`: dense, as above.
    pub q_strides: Option<Strides>,
    /// Which rows, the queries' own among them; lengths are required, positions are not read: the order of rows is that of
    /// their positions.
    pub rows: Rows<'a>,
    /// Their keys, rotated.
    pub keys: Pool<View<'a>>,
    /// Of chunks: i32 `[B, 3]`, how many of the first rows are seen beside it (the system prompt), its first row, its rows. What
    /// reaches beyond the queries' first row is cut off, and reported as a bad length.
    pub spans: Option<View<'a>>,
    /// f32 `[B, Hq, W]`: ln Σ exp(logit) over the rows that a query sees; there as the shape says. A query of lse −∞ adds 0.
    pub given_lse: Option<View<'a>>,
    /// Likewise, where it is not given: an output. Queries whose rows there are none of have −∞.
    pub lse: Option<ViewMut<'a>>,
    /// f32 `[B, Hk, columns]` ([`ScoreShape::columns`]); of a chunk, from its first row on.
    pub scores: ViewMut<'a>,
    /// Scores between the first ones of two kv heads; `None`: the columns.
    pub score_stride: Option<usize>,
    /// With [`ScoreShape::accumulate`]: rows that have a score, i32 `[B]` or `[B, Hk]`; those beyond begin with 0. `None`: the
    /// rows before the queries' own.
    pub previous: Option<View<'a>>,
    /// Whether there is one for each kv head.
    pub previous_per_head: bool,
}

impl<'a> ScoreArgs<'a> {
    /// Of dense q and scores; nothing optional.
    pub fn new(q: View<'a>, rows: Rows<'a>, keys: Pool<View<'a>>, scores: ViewMut<'a>) -> Self {
        let (spans, given_lse, lse, score_stride, previous) = (None, None, None, None, None);
        let (q_strides, previous_per_head) = (None, false);
        Self { q, q_strides, rows, keys, spans, given_lse, lse, scores, score_stride, previous, previous_per_head }
    }
}

impl ScorePlan {
    pub(super) fn new(shape: ScoreShape, info: &DeviceInfo) -> Result<Self> {
        let plan = Self { shape, lse: Lse::new(&shape, info), scores: Scores::new(&shape, info)? };
        if plan.lse_grid().max(plan.score_grid()) > i32::MAX as usize {
            return invalid("rows", format!("{} rows of {} heads are too many", shape.rows, shape.seqs * shape.kv_heads));
        }
        Ok(plan)
    }

    /// What it was made from.
    pub fn shape(&self) -> &ScoreShape {
        &self.shape
    }

    /// Launches of one [`ScorePlan::launch`]: 2, or 1 where the lse is given.
    pub fn launches(&self) -> usize {
        2 - usize::from(self.shape.given_lse)
    }

    fn heads(&self) -> usize {
        self.shape.seqs * self.shape.kv_heads
    }
    fn lse_grid(&self) -> usize {
        self.heads().saturating_mul(self.lse.query_tiles).saturating_mul(self.lse.splits)
    }
    fn score_grid(&self) -> usize {
        self.heads().saturating_mul(self.scores.splits)
    }
    /// Bytes of partial results, and of an lse that is no output.
    fn partials(&self) -> usize {
        if self.lse.splits > 1 { 8 * self.lse_grid() * self.lse.width } else { 0 }
    }
    fn lse_bytes(&self) -> usize {
        4 * self.shape.seqs * self.shape.q_heads * self.shape.queries
    }

    /// Scratch that launches need: none where the lse is given.
    pub fn workspace(&self) -> WorkspaceSize {
        if self.shape.given_lse {
            return WorkspaceSize::default();
        }
        WorkspaceSize { zeroed: 4 * self.heads() * self.lse.query_tiles, scratch: self.partials() + self.lse_bytes() }
    }

    /// Enqueues [`ScorePlan::launches`] launches; none without heads.
    ///
    /// A NaN or +∞ among the logits of a query makes all its weights NaN (with a given lse: that weight alone); a sum or mean
    /// with one is NaN, in a maximum it is the least.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ScoreArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        if self.heads() == 0 {
            return Ok(());
        }
        self.check(args)?;
        let s = &self.shape;
        let Scratch { status, zeroed, scratch } = workspace.scratch(self.workspace())?;
        let lse = match (&args.given_lse, &args.lse) {
            (Some(given), _) => given.address(),
            (None, Some(wanted)) => wanted.address(),
            (None, None) => scratch + self.partials() as u64,
        };
        let q = args.q_strides.unwrap_or(self.dense_q());
        let mut params = abi::KvlarScore {
            rows: Rows { positions: None, ..args.rows }.abi(),
            keys: args.keys.abi(),
            q: args.q.address(),
            lse,
            scores: args.scores.address(),
            score_stride: args.score_stride.unwrap_or(s.columns()) as i64,
            spans: args.spans.map_or(0, |x| x.address()),
            previous: args.previous.map_or(0, |x| x.address()),
            previous_seq_stride: if args.previous_per_head { s.kv_heads as i64 } else { 1 },
            previous_head_stride: args.previous_per_head.into(),
            partials: scratch,
            counters: zeroed,
            status,
            ..self.bare_params()
        };
        (params.q_seq_stride, params.q_head_stride, params.q_row_stride) = q.abi();
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    fn dense_q(&self) -> Strides {
        Strides::heads_first(self.shape.q_heads, self.shape.queries, self.shape.head_dim)
    }

    fn check(&self, args: &ScoreArgs<'_>) -> Result<()> {
        let (s, heads) = (&self.shape, self.heads());
        let q = args.q_strides.unwrap_or(self.dense_q());
        q.check("q", &args.q, s.dtype, [s.seqs, s.q_heads, s.queries, s.head_dim])?;
        if args.rows.lengths.is_none() {
            return invalid("rows", "scores need lengths");
        }
        if args.rows.max_rows > s.rows {
            return invalid("rows", format!("{} rows in scores planned for {}", args.rows.max_rows, s.rows));
        }
        let rows = Rows { positions: None, ..args.rows };
        rows.check("rows", s.seqs, (s.kv_heads, s.kv_heads), args.keys.page_count)?;
        let codec = if s.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
        args.keys.check("keys", &args.rows, s.seqs, s.kv_heads, Format::from(codec).stored(s.head_dim))?;
        match (&args.spans, s.scored) {
            (Some(spans), ScoredRows::Chunk(_)) => within("spans", spans, 12 * s.seqs, 4)?,
            (None, ScoredRows::Chunk(_)) => return invalid("spans", "where is the chunk?"),
            (Some(_), _) => return invalid("spans", "the shape has no chunk"),
            (None, _) => {}
        }
        match (&args.given_lse, &args.lse) {
            (Some(_), _) if !s.given_lse => return invalid("given_lse", "the plan finds the lse by itself"),
            (None, _) if s.given_lse => return invalid("given_lse", "the plan needs it"),
            (Some(_), Some(_)) => return invalid("lse", "it is given"),
            (Some(given), None) => within("given_lse", given, self.lse_bytes(), 4)?,
            (None, Some(lse)) => within("lse", lse, self.lse_bytes(), 4)?,
            (None, None) => {}
        }
        match &args.previous {
            Some(_) if s.accumulate.is_none() => return invalid("previous", "scores are not added to others"),
            Some(previous) => within("previous", previous, 4 * if args.previous_per_head { heads } else { s.seqs }, 4)?,
            None => {}
        }
        let (columns, stride) = (s.columns(), args.score_stride.unwrap_or(s.columns()));
        if stride < columns && heads > 1 {
            return invalid("score_stride", format!("{stride} is less than {columns} scores"));
        }
        let need = heads.saturating_sub(1).saturating_mul(stride).saturating_add(columns).saturating_mul(4);
        within("scores", &args.scores, if heads == 0 { 0 } else { need }, 4)
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0, that of scores dense.
    pub fn bare_params(&self) -> abi::KvlarScore {
        let (s, lse, scores) = (&self.shape, &self.lse, &self.scores);
        let (pool, pool_half) = s.pool.abi();
        abi::KvlarScore {
            score_stride: s.columns() as i64,
            scale: s.scale,
            decay: s.accumulate.unwrap_or(0.0),
            seqs: s.seqs as u32,
            kv_heads: s.kv_heads as u32,
            group: s.group() as u32,
            query_rows: s.queries as u32,
            head_dim: s.head_dim as u32,
            row_count: s.columns() as u32,
            columns: match s.scored {
                ScoredRows::Prefix => abi::KVLAR_COLUMNS_PREFIX,
                ScoredRows::All => abi::KVLAR_COLUMNS_ALL,
                ScoredRows::Chunk(_) => abi::KVLAR_COLUMNS_CHUNK,
            },
            from_start: s.from_start.into(),
            over_rows: s.over_rows.abi(),
            over_heads: s.over_heads.abi(),
            pool,
            pool_half: pool_half as u32,
            accumulate: s.accumulate.is_some().into(),
            fill: s.fill.into(),
            query_warps: lse.query_warps as u32,
            query_tiles: lse.query_tiles as u32,
            key_splits: lse.splits as u32,
            splits: scores.splits as u32,
            chunk_rows: scores.chunk_rows as u32,
            resident: scores.resident.into(),
            ring_rows: scores.ring_rows as u32,
            shared_queries: scores.queries as u32,
            shared_lse: scores.lse as u32,
            shared_sums: scores.sums as u32,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launches.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ScorePlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses are valid on the stream's device until the launches have run. Where the lse is not given, `lse` is written,
    /// `counters` and `partials` point to what [`ScorePlan::workspace`] says: 4 zeroed bytes a counter, 8 bytes a partial.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarScore) -> Result<()> {
        let (lse, scores) = (&self.lse, &self.scores);
        let launch =
            |entry, grid: usize, shared: usize| Launch { entry, grid: grid as u32, block: THREADS, shared_bytes: shared as u32 };
        if self.heads() == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            if !self.shape.given_lse {
                stream.enqueue(launch(lse.entry, self.lse_grid(), lse.shared), params)?;
            }
            stream.enqueue(launch(scores.entry, self.score_grid(), scores.shared), params)
        }
    }
}
