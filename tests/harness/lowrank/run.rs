//! Cases on a device.

use super::{LowrankCase, LowrankData, ValueCase};
use crate::pages::DevicePages;
use crate::{Lab, heads, once_a_case};
use kvlar::{
    AttendArgs, Bases, Buffer, Dtype, HeadSets, Latents, LowrankArgs, LowrankPlan, Pool, Rope, Rows, Segment, Status, ViewMut,
    WorkList, Workspace,
};
use kvlar_reference::Attended;

/// A case on a device, ready to launch any number of times.
#[derive(Debug)]
pub struct LowrankRun<'a> {
    lab: &'a Lab,
    pub plan: LowrankPlan,
    data: LowrankData,
    sets: HeadSets,
    q: Buffer,
    sinks: Option<Buffer>,
    q_positions: Option<Buffer>,
    key_basis: Buffer,
    key_scales: Option<Buffer>,
    mean: Option<Buffer>,
    value_basis: Option<Buffer>,
    inv_freq: Buffer,
    segments: Vec<(DevicePages, Buffer, Buffer, Buffer)>,
    pub out: Buffer,
    pub lse: Buffer,
    pub work: WorkList,
    pub workspace: Workspace,
}

impl<'a> LowrankRun<'a> {
    pub fn new(lab: &'a Lab, data: &LowrankData) -> Self {
        let c = &data.case;
        let group_v = if let ValueCase::Latent { group, .. } = &c.values { Some(group.as_slice()) } else { None };
        let sets = HeadSets::new(&lab.device, &lab.stream, &c.group_k, group_v).expect("sets");
        let plan = c.shape(&sets).plan(&lab.device).expect("a plan");
        let rows = c.seqs * c.q_heads * c.query_rows;
        let key_basis = match &data.int8_basis {
            Some(int8) => lab.upload(&int8.codes),
            None => lab.upload_as(
                &data.key_basis,
                if matches!(c.latents, Latents::Int8 | Latents::Int4) { Dtype::F16 } else { c.dtype },
            ),
        };
        Self {
            lab,
            plan,
            q: lab.upload_as(&data.q, c.dtype),
            sinks: data.sinks.as_ref().map(|x| lab.upload(x)),
            q_positions: data.q_positions.as_ref().map(|x| lab.upload(x)),
            key_basis,
            key_scales: data.int8_basis.as_ref().map(|b| lab.upload(&b.scales)),
            mean: data.mean.as_ref().map(|m| lab.upload(m)),
            value_basis: group_v.map(|_| lab.upload_as(&data.value_basis, c.dtype)),
            inv_freq: lab.upload(&c.rope.inv_freq),
            segments: data
                .segments
                .iter()
                .map(|s| {
                    (
                        DevicePages::upload(lab, &s.keys),
                        lab.upload(&s.lengths),
                        lab.upload(&s.key_bytes),
                        lab.upload(&s.value_bytes),
                    )
                })
                .collect(),
            out: lab.poisoned(rows * c.value_dim * c.out_dtype.bytes()),
            lse: lab.poisoned(rows * 4),
            work: plan.work_list(&lab.device).expect("a work list"),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            sets,
            data: data.clone(),
        }
    }

    /// Calls `f` with the arguments and what a launch needs besides.
    pub fn with_args<R>(&mut self, f: impl FnOnce(&LowrankPlan, &mut LowrankArgs<'_>, &mut WorkList, &mut Workspace) -> R) -> R {
        let c = &self.data.case;
        let segments: Vec<Segment<'_>> = self
            .segments
            .iter()
            .zip(&self.data.segments)
            .zip(&c.segments)
            .map(|(((pages, lengths, keys, values), host), s)| {
                let mut rows = pages.rows();
                rows.lengths = Some(lengths.view());
                (rows.length_seq_stride, rows.length_head_stride) = (c.kv_heads, 1);
                let [(kc, kd), (vc, vd)] = c.rows(s);
                Segment {
                    rows,
                    keys: host.keys.pool(keys.view(), &kc.into(), kd),
                    values: host.values.pool(values.view(), &vc.into(), vd),
                    tables: Default::default(),
                }
            })
            .collect();
        let mut args = LowrankArgs {
            attend: AttendArgs {
                q: self.q.view(),
                q_strides: None,
                out: self.out.view_mut(),
                out_strides: None,
                lse: Some(self.lse.view_mut()),
                segments: &segments,
                q_positions: self.q_positions.as_ref().map(Buffer::view),
                sink_logits: self.sinks.as_ref().map(Buffer::view),
            },
            bases: Bases {
                keys: self.key_basis.view(),
                keys_per_seq: c.per_seq_bases,
                key_scales: self.key_scales.as_ref().map(Buffer::view),
                key_mean: self.mean.as_ref().map(Buffer::view),
                values: self.value_basis.as_ref().map(Buffer::view),
                values_per_seq: c.per_seq_bases,
            },
            rope: Some(Rope {
                inv_freq: self.inv_freq.view(),
                rotary_dim: c.rope.rotary_dim(),
                layout: c.rope.layout,
                attention_factor: c.rope.attention_factor,
            }),
            sets: &self.sets,
        };
        f(&self.plan, &mut args, &mut self.work, &mut self.workspace)
    }

    /// Which rows a segment has room for, and the pools of their keys and values, to be written.
    pub fn pools(&mut self, segment: usize) -> (Rows<'_>, [Pool<ViewMut<'_>>; 2]) {
        let (pages, _, keys, values) = &mut self.segments[segment];
        let host = &self.data.segments[segment];
        let [(kc, kd), (vc, vd)] = self.data.case.rows(&self.data.case.segments[segment]);
        let pools = [host.keys.pool(keys.view_mut(), &kc.into(), kd), host.values.pool(values.view_mut(), &vc.into(), vd)];
        (pages.rows(), pools)
    }

    /// Replaces the lengths `[B, Hk]` of a segment on the device.
    pub fn set_lengths(&mut self, segment: usize, lengths: &[i32]) {
        self.lab.stream.upload(&mut self.segments[segment].1, 0, bytemuck::cast_slice(lengths)).expect("upload");
    }

    /// Enqueues the schedule and the launch.
    pub fn enqueue(&mut self) {
        let lab = self.lab;
        self.with_args(|plan, args, work, workspace| {
            plan.schedule(&lab.stream, args, work, workspace).expect("a schedule");
            plan.launch(&lab.stream, args, work, workspace).expect("a launch");
        });
    }

    /// The result so far.
    pub fn result(&self) -> Attended {
        Attended { out: self.lab.download_as(&self.out, self.data.case.out_dtype), lse: self.lab.download(&self.lse) }
    }

    /// Makes the outputs NaN again.
    pub fn poison(&mut self) {
        for buffer in [&mut self.out, &mut self.lse] {
            let all = 0..buffer.len();
            self.lab.stream.fill(buffer, all, 0xff).expect("a fill");
        }
    }

    /// What kernels reported.
    pub fn status(&self) -> Status {
        self.workspace.status(&self.lab.stream).expect("a status")
    }

    /// The counters of arrived splits.
    pub fn counters(&self) -> Vec<u32> {
        self.lab.counters(&self.workspace, self.plan.workspace())
    }
}

/// Runs a case and compares; the text names the case.
pub fn check(lab: &Lab, case: &LowrankCase) -> Result<(), String> {
    let made = once_a_case(case, || {
        let data = LowrankData::new(case);
        let expected = data.expected();
        (data, expected)
    });
    let (data, expected) = &*made;
    let mut run = LowrankRun::new(lab, data);
    run.enqueue();
    heads::check_attended(&run.result(), run.status(), expected, data.tolerances(), case)
}

/// Compares a result with the reference.
pub fn compare(data: &LowrankData, actual: &Attended) -> Result<(), String> {
    heads::compare_attended(actual, &data.expected(), data.tolerances(), &data.case)
}
