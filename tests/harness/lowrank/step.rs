//! Decode steps of a low-rank cache: new tokens are projected and appended, work is scheduled, attention sees them.

use super::{LowrankCase, LowrankData, LowrankRun, ValueCase, groups};
use crate::heads::check_attended;
use crate::latents::{DeviceEncoding, Encoding};
use crate::{Lab, bytes_as};
use kvlar::{AppendLowrankArgs, AppendLowrankPlan, AppendLowrankShape, Buffer, Codec, SideArgs, SideShape, Stream, Workspace};
use kvlar_reference::Attended;
use kvlar_reference::testing::Rng;

/// One new token a sequence.
#[derive(Clone, Debug)]
struct Step {
    keys: Encoding,
    values: Encoding,
    /// Where its latents go, `[B]`; negative: the sequence gets none.
    slots: Vec<i32>,
    /// Rows held from then on, `[B, Hk]`.
    lengths: Vec<i32>,
}

/// Steps of a case of one segment of latents, on a device.
#[derive(Debug)]
pub struct LowrankSteps<'a> {
    lab: &'a Lab,
    data: LowrankData,
    steps: Vec<Step>,
    run: LowrankRun<'a>,
    encodings: [DeviceEncoding; 2],
    slots: Buffer,
    append: AppendLowrankPlan,
    workspace: Workspace,
}

/// The kv heads of each group.
fn members(group: &[i32]) -> Vec<Vec<i32>> {
    let of = |g| (0..group.len()).filter(|&h| group[h] as usize == g).map(|h| h as i32).collect();
    (0..groups(group)).map(of).collect()
}

/// An encoding of one token a sequence for each step, all with one encoder.
fn encodings(rng: &mut Rng, case: &LowrankCase, steps: usize, dim: usize, group: &[i32], rank: usize) -> Vec<Encoding> {
    let dims = [case.seqs, case.kv_heads, 1, dim];
    let mut all: Vec<_> = (0..steps).map(|_| Encoding::new(rng, case.dtype, dims, members(group), rank, false)).collect();
    let encoder = all.first().map(|e| e.encoder.clone()).unwrap_or_default();
    all.iter_mut().for_each(|e| e.encoder.clone_from(&encoder));
    all
}

impl<'a> LowrankSteps<'a> {
    /// `slots` `[step][B]`: a sequence's length is then one more. The case's lengths are the last; rows that no step
    /// appends are there from the start, those of steps are poison until they are appended.
    pub fn new(lab: &'a Lab, case: &LowrankCase, slots: &[&[i32]]) -> Self {
        let ValueCase::Latent { group: group_v, rank: rank_v, .. } = &case.values else { panic!("values are latents") };
        let mut rng = Rng::new(!case.seed);
        let keys = encodings(&mut rng, case, slots.len(), case.head_dim, &case.group_k, case.rank);
        let values = encodings(&mut rng, case, slots.len(), case.value_dim, group_v, *rank_v);
        let mut data = LowrankData::new(case);
        let (mut steps, mut lengths) = (Vec::<Step>::new(), vec![0; case.seqs * case.kv_heads]);
        for ((keys, values), slots) in keys.into_iter().zip(values).zip(slots) {
            for (b, &slot) in slots.iter().enumerate().filter(|s| *s.1 >= 0) {
                lengths[b * case.kv_heads..][..case.kv_heads].fill(slot + 1);
                data.append_later(b, slot as usize, &keys.latents(), &values.latents());
            }
            steps.push(Step { keys, values, slots: slots.to_vec(), lengths: lengths.clone() });
        }
        let first = steps.first().expect("a step");
        let [(key_codec, _), (value_codec, _)] = case.rows(&case.segments[0]);
        let side = |e: &Encoding, head_dim: usize, codec: Codec| SideShape::Project {
            kv_heads: case.kv_heads,
            head_dim,
            groups: e.members.len(),
            size: e.members[0].len(),
            rank: e.rank,
            codec,
        };
        let shape = AppendLowrankShape {
            dtype: case.dtype,
            seqs: case.seqs,
            new_rows: 1,
            keys: side(&first.keys, case.head_dim, key_codec),
            values: side(&first.values, case.value_dim, value_codec),
        };
        let append = shape.plan(&lab.device).expect("a plan");
        Self {
            lab,
            run: LowrankRun::new(lab, &data),
            encodings: [&first.keys, &first.values].map(|e| DeviceEncoding::upload(lab, e, false)),
            slots: lab.upload(&first.slots),
            append,
            workspace: Workspace::new(&lab.device, append.workspace()).expect("a workspace"),
            data,
            steps,
        }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.steps.len()
    }

    /// Puts a step's tokens, slots and lengths where launches read them.
    pub fn prepare(&mut self, step: usize) {
        let (s, stream) = (&self.steps[step], &self.lab.stream);
        for (on_device, e) in self.encodings.iter_mut().zip([&s.keys, &s.values]) {
            stream.upload(&mut on_device.x, 0, &bytes_as(&e.x, self.data.case.dtype)).expect("upload");
        }
        stream.upload(&mut self.slots, 0, bytemuck::cast_slice(&s.slots)).expect("upload");
        self.run.set_lengths(0, &s.lengths);
    }

    /// Enqueues what a step is: append, schedule, attention.
    pub fn enqueue(&mut self, stream: &Stream) -> kvlar::Result<()> {
        let (rows, [keys, values]) = self.run.pools(0);
        let [of_keys, of_values] = &self.encodings;
        let mut args = AppendLowrankArgs {
            keys: SideArgs::Project { from: of_keys.projection(), pool: keys },
            values: SideArgs::Project { from: of_values.projection(), pool: values },
            positions: None,
            slots: self.slots.view(),
            rows,
            row_positions: None,
        };
        self.append.launch(stream, &mut args, &mut self.workspace)?;
        self.run.with_args(|plan, args, work, workspace| {
            plan.schedule(stream, args, work, workspace)?;
            plan.launch(stream, args, work, workspace)
        })
    }

    /// The result so far.
    pub fn result(&self) -> Attended {
        self.run.result()
    }

    /// Compares the result with the reference's after a step; nothing was clamped, counters are zero again.
    pub fn check(&self, step: usize) -> Result<(), String> {
        let mut data = self.data.clone();
        data.segments[0].lengths.clone_from(&self.steps[step].lengths);
        check_attended(&self.run.result(), self.run.status(), &data.expected(), data.tolerances(), &data.case)
            .map_err(|e| format!("step {step}: {e}"))?;
        let status = self.workspace.status(&self.lab.stream).expect("a status");
        let counters = [self.run.counters(), self.lab.counters(&self.workspace, self.append.workspace())].concat();
        if !status.is_clean() || counters.iter().any(|&c| c != 0) {
            return Err(format!("step {step}: append: {status:?}, counters: {counters:?}\n{:?}", data.case));
        }
        Ok(())
    }
}

impl LowrankData {
    /// Makes a row of the first segment what an append of latents `[B, groups, r]` gives; in memory it is poison until then.
    fn append_later(&mut self, seq: usize, row: usize, keys: &[f32], values: &[f32]) {
        let [(key_codec, key_rank), (value_codec, value_rank)] = self.case.rows(&self.case.segments[0]);
        let data = &mut self.segments[0];
        for (pages, bytes, rows, latents, codec, n) in [
            (&data.keys, &mut data.key_bytes, &mut data.key_rows, keys, key_codec, key_rank),
            (&data.values, &mut data.value_bytes, &mut data.value_rows, values, value_codec, value_rank),
        ] {
            for group in 0..pages.heads {
                let (at, index) = ((seq, group, row), seq * pages.heads + group);
                let decoded = pages.store(bytes, at, &latents[index * n..][..n], &codec.into());
                pages.poison(bytes, at, n, &codec.into());
                rows[index][row * n..][..n].copy_from_slice(&decoded);
            }
        }
    }
}
