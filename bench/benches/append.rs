//! append: new rows rotated, encoded and stored, in one launch; decode steps and a piece of prefill.

use kvlar::{AppendArgs, AppendPlan, AppendShape, Buffer, Codec, Dtype, Result, Rope, RopeLayout, Stream, Workspace};
use kvlar_bench::{Case, HEAD_PAGE_ROWS, Launches, Op, Pages, Rig, codec_name};
use serde_json::{Value, json};

pub const OP: Op = Op { name: "append", cases };

#[derive(Clone)]
struct Append {
    codec: Codec,
    seqs: usize,
    heads: usize,
    /// A sequence's.
    new_rows: usize,
    dim: usize,
}

impl Append {
    fn new(codec: Codec, seqs: usize, new_rows: usize) -> Self {
        Self { codec, seqs, heads: 8, new_rows, dim: 128 }
    }

    fn shape(&self) -> AppendShape {
        AppendShape {
            dtype: Dtype::Bf16,
            key_format: self.codec.into(),
            value_format: self.codec.into(),
            seqs: self.seqs,
            kv_heads: self.heads,
            new_rows: self.new_rows,
            head_dim: self.dim,
            value_dim: self.dim,
        }
    }

    fn row_bytes(&self) -> usize {
        self.codec.row_bytes(self.dim) + self.codec.params_bytes(self.dim, self.dim)
    }

    /// Of k or v, one launch.
    fn input_bytes(&self) -> usize {
        self.seqs * self.heads * self.new_rows * self.dim * 2
    }

    /// Of positions or slots, one launch.
    fn index_bytes(&self) -> usize {
        self.seqs * self.new_rows * 4
    }
}

impl Case for Append {
    fn name(&self) -> String {
        format!("{}/b{}/n{}", codec_name(self.codec), self.seqs, self.new_rows)
    }

    fn parameters(&self) -> Value {
        json!({
            "dtype": "bf16",
            "codec": codec_name(self.codec),
            "batch": self.seqs,
            "new_rows": self.new_rows,
            "kv_heads": self.heads,
            "head_dim": self.dim,
            "page_rows": HEAD_PAGE_ROWS,
            "rope": "half",
        })
    }

    fn bytes(&self) -> usize {
        let stored = self.seqs * self.heads * self.new_rows * self.row_bytes();
        2 * (self.input_bytes() + self.index_bytes() + stored)
    }

    fn set_bytes(&self) -> usize {
        // Rows of all sets share pages, so the last page of a sequence may be in part empty.
        self.bytes() + 2 * self.seqs * self.heads * HEAD_PAGE_ROWS * self.row_bytes()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        let (seqs, n) = (self.seqs, self.new_rows);
        // Set i stores the rows that follow set i - 1's: every launch writes memory of its own.
        let pages = Pages::new(rig, &vec![sets * n; seqs], false)?;
        let rows_of = |set: usize| (0..seqs).flat_map(move |_| (set * n..(set + 1) * n).map(|r| r as i32));
        let slots: Vec<i32> = (0..sets).flat_map(rows_of).collect();
        let inv_freq: Vec<f32> = (0..self.dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / self.dim as f32)).collect();
        let pool_bytes = pages.count * HEAD_PAGE_ROWS * self.heads * self.row_bytes();
        Ok(Box::new(Buffers {
            plan: self.shape().plan(&rig.device)?,
            k: rig.normals(Dtype::Bf16, sets * self.input_bytes() / 2)?,
            v: rig.normals(Dtype::Bf16, sets * self.input_bytes() / 2)?,
            slots: rig.upload(&slots)?,
            inv_freq: rig.upload(&inv_freq)?,
            keys: rig.device.alloc(pool_bytes)?,
            values: rig.device.alloc(pool_bytes)?,
            pages,
            workspace: Workspace::new(&rig.device, Default::default())?,
            case: self.clone(),
        }))
    }
}

struct Buffers {
    case: Append,
    plan: AppendPlan,
    /// Of all sets, as are `v` and `slots`; a row's position is its slot.
    k: Buffer,
    v: Buffer,
    slots: Buffer,
    inv_freq: Buffer,
    pages: Pages,
    keys: Buffer,
    values: Buffer,
    workspace: Workspace,
}

impl Launches for Buffers {
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()> {
        let Append { codec, heads, dim, .. } = self.case;
        let part = |bytes: usize| set * bytes..(set + 1) * bytes;
        let (input, index) = (self.case.input_bytes(), self.case.index_bytes());
        let slots = self.slots.view().slice(part(index))?;
        let mut args = AppendArgs {
            k: self.k.view().slice(part(input))?,
            k_strides: None,
            v: self.v.view().slice(part(input))?,
            v_strides: None,
            positions: slots,
            slots,
            slots_per_head: false,
            rope: Some(Rope { inv_freq: self.inv_freq.view(), rotary_dim: dim, layout: RopeLayout::Half, attention_factor: 1.0 }),
            rows: self.pages.rows(),
            row_positions: None,
            keys: self.pages.pool(self.keys.view_mut(), heads, codec, dim),
            values: self.pages.pool(self.values.view_mut(), heads, codec, dim),
            tables: Default::default(),
            key_scores: None,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    fn check(&self, rig: &Rig) {
        let status = self.workspace.status(&rig.stream).expect("a status");
        assert!(status.is_clean(), "append: {status:?}");
        let mut bytes = vec![0u8; self.keys.len().min(1 << 20)];
        rig.stream.download(&self.keys, 0, &mut bytes).expect("a download");
        assert!(bytes.iter().any(|&x| x != 0), "append stored nothing");
    }
}

fn cases(rig: &Rig) -> Vec<Box<dyn Case>> {
    let mut all = Vec::new();
    for codec in [Codec::Bf16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2] {
        if rig.wants_tiny_shapes() {
            all.extend([Append { heads: 2, ..Append::new(codec, 3, 1) }, Append { heads: 2, ..Append::new(codec, 1, 33) }]);
        } else {
            all.extend([(1, 1), (32, 1), (256, 1), (1, 4096), (8, 4096)].map(|(seqs, n)| Append::new(codec, seqs, n)));
        }
    }
    all.into_iter().map(|case| Box::new(case) as Box<dyn Case>).collect()
}
