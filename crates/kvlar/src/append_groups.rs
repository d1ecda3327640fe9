//! Writing new rows as they are, and encoding rows that have been there long enough, several at a time, in one launch.

use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{
    AppendArgs, AppendPlan, AppendShape, Codec, Device, Format, Memory, Pool, Result, Rows, Stream, Tables, View, ViewMut,
    Workspace, abi,
};

const OP: &str = "append_groups";

/// What [`AppendGroupsPlan`] is made from.
///
/// New rows stay as they are, in pages of exact rows, until as many as `pack_rows` leave together: KIVI's residual
/// (arXiv 2402.02750, §3.2), or an exact recent window before rows of any format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendGroupsShape {
    /// New rows; its formats are the type of k and v.
    pub append: AppendShape,
    /// Of encoded keys; channel-wise, its group is `pack_rows`.
    pub key_format: Format,
    /// Of encoded values; likewise.
    pub value_format: Format,
    /// Rows that are encoded together.
    pub pack_rows: usize,
    /// Times that, at most, a sequence in one launch.
    pub max_packs: usize,
}

/// A validated append_groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendGroupsPlan {
    shape: AppendGroupsShape,
    append: AppendPlan,
    launch: Launch,
    row_ctas: u32,
}

/// Arguments of [`AppendGroupsPlan::launch`]. Rows are counted from the first that is ever encoded: rows before it (sinks) are
/// negative.
#[derive(Debug)]
pub struct AppendGroupsArgs<'a> {
    /// New rows, and where they stay: a row that is encoded at once may be skipped there.
    pub append: AppendArgs<'a>,
    /// Tables and capacity of encoded rows. Its lengths and positions are not used.
    pub rows: Rows<'a>,
    /// Encoded keys.
    pub keys: Pool<ViewMut<'a>>,
    /// Encoded values.
    pub values: Pool<ViewMut<'a>>,
    /// What encoded rows of a head share.
    pub tables: Tables<'a>,
    /// i32 `[B, source_pages]`: pages of `append`'s pools with the rows of earlier steps that are encoded now.
    pub source: View<'a>,
    /// Entries of a sequence.
    pub source_pages: usize,
    /// i32 `[B, 4]`: rows before this step, the row that `source` begins with, the first row to encode, how many. The last two
    /// are multiples of `pack_rows`.
    pub packing: View<'a>,
}

impl AppendGroupsShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] as for [`AppendShape::plan`], and for new rows that do not stay in the type of k and v;
    /// [`crate::Error::Invalid`] for groups of channel-wise rows that are not `pack_rows`.
    pub fn plan(&self, device: &Device) -> Result<AppendGroupsPlan> {
        let append = self.append.plan(device)?;
        let a = &self.append;
        let native = Option::<Codec>::from(a.dtype).map(Format::from);
        if [a.key_format, a.value_format].into_iter().any(|f| Some(f) != native) {
            return unsupported(OP, format!("new rows of another type than {}", a.dtype));
        }
        if self.pack_rows == 0 {
            return invalid("pack_rows", "0 rows are encoded together");
        }
        for (arg, format, dim) in [("key format", self.key_format, a.head_dim), ("value format", self.value_format, a.value_dim)]
        {
            format.check(arg, dim)?;
            if format.codec.is_channel_wise() && format.group_of(dim) != self.pack_rows {
                let group = format.group_of(dim);
                return invalid(arg, format!("groups of {group} rows where {} are encoded together", self.pack_rows));
            }
        }
        let rows = a.seqs * a.kv_heads * a.new_rows;
        let packs = (2 * a.seqs * a.kv_heads).saturating_mul(self.max_packs); // keys and values
        if rows.div_ceil(4).saturating_add(packs) > i32::MAX as usize {
            return invalid("max_packs", format!("{} are too many for one launch", self.max_packs));
        }
        let row_ctas = rows.div_ceil(4) as u32;
        Ok(AppendGroupsPlan {
            shape: *self,
            append,
            launch: Launch { entry: "kvlar_append_groups", grid: row_ctas + packs as u32, block: 128, shared_bytes: 0 },
            row_ctas,
        })
    }
}

impl AppendGroupsPlan {
    /// What it was made from.
    pub fn shape(&self) -> &AppendGroupsShape {
        &self.shape
    }

    /// Enqueues one launch; none if there are no rows.
    ///
    /// # Errors
    /// As for [`AppendPlan::launch`]; [`crate::Error::Invalid`] also for pages that do not hold whole packs.
    pub fn launch(&self, stream: &Stream, args: &mut AppendGroupsArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let (s, a) = (&self.shape, &self.shape.append);
        if args.append.key_scores.is_some() {
            return unsupported(OP, "scores of new keys: append has them, and score_keys");
        }
        let exact = self.append.params(&mut args.append, workspace)?;
        args.rows.check("encoded rows", a.seqs, (a.kv_heads, a.kv_heads), args.keys.page_count.min(args.values.page_count))?;
        let page_rows = 1usize << args.rows.page_rows_log2;
        if !page_rows.is_multiple_of(s.pack_rows) && (args.rows.table.is_some() || args.rows.max_rows > page_rows) {
            return invalid("encoded rows", format!("pages of {page_rows} rows hold no whole packs of {}", s.pack_rows));
        }
        args.keys.check("encoded keys", &args.rows, a.seqs, a.kv_heads, s.key_format.stored(a.head_dim))?;
        args.values.check("encoded values", &args.rows, a.seqs, a.kv_heads, s.value_format.stored(a.value_dim))?;
        let [key_tables, value_tables] =
            args.tables.addresses(a.kv_heads, [(s.key_format, a.head_dim), (s.value_format, a.value_dim)])?;
        within("source", &args.source, 4 * a.seqs * args.source_pages, 4)?;
        within("packing", &args.packing, 16 * a.seqs, 16)?;
        let params = abi::KvlarAppendGroups {
            exact,
            rows: args.rows.abi(),
            key_pool: args.keys.abi(),
            value_pool: args.values.abi(),
            key_format: s.key_format.abi(a.head_dim, key_tables),
            value_format: s.value_format.abi(a.value_dim, value_tables),
            source: args.source.address(),
            packing: args.packing.address(),
            source_pages: args.source_pages as u32,
            pack_rows: s.pack_rows as u32,
            max_packs: s.max_packs as u32,
            row_ctas: self.row_ctas,
        };
        // SAFETY: every address was checked against the shape above.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors and strides.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan's shape, and its addresses and strides are valid on the stream's device until the
    /// launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAppendGroups) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(self.launch, params) }
    }
}
