//! Rows to dense latents.

use super::division::Division;
use super::{HeadGroups, MAX_RANK};
use crate::append::check_dim;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{Device, Dtype, Memory, Result, Stream, Strides, View, ViewMut, abi};
use kvlar_reference::ProjectInput;

/// What [`ProjectPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectShape {
    /// Type of the rows and the encoder: bf16 or f16.
    pub dtype: Dtype,
    /// Type of the latents: f32, or `dtype`.
    pub out_dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// Rows a sequence.
    pub rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// n: latent groups.
    pub groups: usize,
    /// kv heads a group.
    pub size: usize,
    /// r: up to 4096.
    pub rank: usize,
}

/// A validated projection. `Copy`, holds no handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectPlan {
    shape: ProjectShape,
    division: Division,
    launch: Launch,
}

/// What latents are made from.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[B, Hk, rows, d]`: keys before RoPE, or values.
    pub x: View<'a>,
    /// `None`: dense, as above.
    pub x_strides: Option<Strides>,
    /// `[n, r, size · d]`, type of x.
    pub encoder: View<'a>,
    /// The kv heads of each group.
    pub groups: &'a HeadGroups,
    /// f32 `[n, r]`: [`ProjectShape::offset_of`] a mean that is taken off the rows; `None`: no mean.
    pub offset: Option<View<'a>>,
}

/// What no projection can be: sizes without a kernel, or that contradict each other.
pub(crate) fn check_projection(
    op: &'static str,
    kv_heads: usize,
    dim: usize,
    groups: usize,
    size: usize,
    rank: usize,
) -> Result<()> {
    check_dim(op, "head_dim", dim)?;
    if groups == 0 || rank == 0 {
        return invalid("groups", format!("{groups} groups of rank {rank}: there is at least one of each"));
    }
    if size == 0 || size > kv_heads {
        return invalid("size", format!("groups of {size} of {kv_heads} kv heads"));
    }
    if rank > MAX_RANK {
        return unsupported(op, format!("rank {rank}: up to {MAX_RANK} are"));
    }
    if size * dim >= 1 << 24 {
        return unsupported(op, format!("{size} kv heads of {dim} values a group: fewer than 2^24 values are"));
    }
    Ok(())
}

/// The type of the rows, as in the names of entry points; and the variant for so many tokens.
pub(crate) fn variant<'a>(op: &'static str, dtype: Dtype, tokens: usize, entries: [[&'a str; 2]; 2]) -> Result<&'a str> {
    let of_type = match dtype {
        Dtype::Bf16 => entries[0],
        Dtype::F16 => entries[1],
        Dtype::F32 => return unsupported(op, "type f32: bf16 and f16 are"),
    };
    if tokens > i32::MAX as usize {
        return invalid("rows", format!("{tokens} rows are too many for one launch"));
    }
    Ok(of_type[usize::from(!Division::few(tokens))])
}

impl Projection<'_> {
    /// Checks it and gives the kernel's struct.
    pub(crate) fn abi(
        &self,
        dtype: Dtype,
        [seqs, kv_heads, rows, dim]: [usize; 4],
        [groups, size, rank]: [usize; 3],
        division: &Division,
    ) -> Result<abi::KvlarProjection> {
        let g = self.groups;
        if (g.kv_heads(), g.groups(), g.size()) != (kv_heads, groups, size) {
            let found = format!("{} groups of {} of {} kv heads", g.groups(), g.size(), g.kv_heads());
            return invalid("groups", format!("{found}; the shape says {groups} of {size} of {kv_heads}"));
        }
        let strides = self.x_strides.unwrap_or(Strides::heads_first(kv_heads, rows, dim));
        strides.check("x", &self.x, dtype, [seqs, kv_heads, rows, dim])?;
        within("encoder", &self.encoder, groups * rank * size * dim * dtype.bytes(), 16)?;
        if let Some(offset) = &self.offset {
            within("offset", offset, 4 * groups * rank, 4)?;
        }
        let (x_seq_stride, x_head_stride, x_row_stride) = strides.abi();
        Ok(abi::KvlarProjection {
            x: self.x.address(),
            x_seq_stride,
            x_head_stride,
            x_row_stride,
            encoder: self.encoder.address(),
            members: g.address(),
            offset: self.offset.map_or(0, |o| o.address()),
            ..division.bare([groups, size, dim, rank])
        })
    }
}

const ENTRIES: [[&str; 2]; 2] =
    [["kvlar_project_bf16_m16", "kvlar_project_bf16_m64"], ["kvlar_project_f16_m16", "kvlar_project_f16_m64"]];

impl ProjectShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a type, head dimension or rank without a kernel, [`crate::Error::Invalid`] for sizes
    /// that contradict each other.
    pub fn plan(&self, _device: &Device) -> Result<ProjectPlan> {
        let tokens = self.seqs.saturating_mul(self.rows);
        let entry = variant("project", self.dtype, tokens, ENTRIES)?;
        check_projection("project", self.kv_heads, self.head_dim, self.groups, self.size, self.rank)?;
        if self.out_dtype != Dtype::F32 && self.out_dtype != self.dtype {
            return unsupported(
                "project",
                format!("{} latents of {} rows: f32 or {} are", self.out_dtype, self.dtype, self.dtype),
            );
        }
        let division = Division::new(tokens, self.groups, self.size * self.head_dim, self.rank, false);
        if division.ctas() > i32::MAX as usize {
            return invalid("rows", format!("{} CTAs are too many for one launch", division.ctas()));
        }
        let launch = Launch { entry, grid: division.ctas() as u32, block: 256, shared_bytes: 0 };
        Ok(ProjectPlan { shape: *self, division, launch })
    }

    /// Encoder times mean, f32 `[n, r]`, summed in f64: encoder · x less this is encoder · (x − mean). `encoder`
    /// `[n, r, size · d]` is first rounded to the shape's type, as kernels read it; `members` is `[n, size]`, `mean` `[Hk, d]`.
    ///
    /// # Errors
    /// [`crate::Error::Reference`] for tensors that are not of the shape's size, or a member that is no kv head.
    pub fn offset_of(&self, mean: &[f32], encoder: &[f32], members: &[i32]) -> Result<Vec<f32>> {
        let dtype = match self.dtype {
            Dtype::Bf16 => kvlar_reference::Dtype::Bf16,
            Dtype::F16 => kvlar_reference::Dtype::F16,
            Dtype::F32 => kvlar_reference::Dtype::F32,
        };
        let encoder = dtype.round_all(encoder);
        Ok(kvlar_reference::project(&ProjectInput {
            seqs: 1,
            kv_heads: self.kv_heads,
            rows: 1,
            head_dim: self.head_dim,
            groups: self.groups,
            size: self.size,
            rank: self.rank,
            k: mean,
            encoder: &encoder,
            members,
            mean: None,
        })?)
    }
}

impl ProjectPlan {
    /// What it was made from.
    pub fn shape(&self) -> &ProjectShape {
        &self.shape
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.launch.entry
    }

    /// Latents of `from`'s rows into `out` `[B, n, rows, r]`. Enqueues one launch; none if there are no rows.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, from: &Projection<'_>, out: &mut ViewMut<'_>) -> Result<()> {
        let s = &self.shape;
        let bytes = s.seqs * s.groups * s.rows * s.rank * s.out_dtype.bytes();
        within("out", out, bytes, s.out_dtype.bytes())?;
        let rows = [s.seqs, s.kv_heads, s.rows, s.head_dim];
        let projection = from.abi(s.dtype, rows, [s.groups, s.size, s.rank], &self.division)?;
        let row = s.rank as i64;
        let params = abi::KvlarProject {
            projection,
            out: out.address(),
            out_seq_stride: (s.groups * s.rows) as i64 * row,
            out_group_stride: s.rows as i64 * row,
            out_row_stride: row,
            ..self.bare_params()
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
    /// `params` agrees with the plan ([`ProjectPlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses and strides are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarProject) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.launch.grid == 0 { Ok(()) } else { unsafe { stream.enqueue(self.launch, params) } }
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarProject {
        let s = &self.shape;
        abi::KvlarProject {
            projection: self.division.bare([s.groups, s.size, s.head_dim, s.rank]),
            seqs: s.seqs as u32,
            rows: s.rows as u32,
            dtype: s.dtype.abi(),
            out_dtype: s.out_dtype.abi(),
            ..Default::default()
        }
    }
}
