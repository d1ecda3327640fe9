//! A case on a device.

use super::{AttendCase, AttendData, transpose};
use crate::Lab;
use crate::pages::DevicePages;
use kvlar::{AttendArgs, AttendPlan, Buffer, Segment, Status, Tables, WorkList, Workspace};
use kvlar_reference::Attended;

/// A case on a device, ready to launch any number of times.
#[derive(Debug)]
pub struct AttendRun<'a> {
    lab: &'a Lab,
    pub plan: AttendPlan,
    data: AttendData,
    q: Buffer,
    sinks: Option<Buffer>,
    q_positions: Option<Buffer>,
    segments: Vec<(DevicePages, Buffer, Buffer, [Option<Buffer>; 2])>,
    pub out: Buffer,
    pub lse: Buffer,
    pub work: WorkList,
    pub workspace: Workspace,
}

impl<'a> AttendRun<'a> {
    pub fn new(lab: &'a Lab, data: &AttendData) -> Self {
        let c = &data.case;
        let plan = c.shape().plan(&lab.device).expect("a plan");
        let rows = c.seqs * c.q_heads * c.query_rows;
        let q = if c.rows_first { transpose(&data.q, c, c.head_dim) } else { data.q.clone() };
        Self {
            lab,
            plan,
            q: lab.upload_as(&q, c.dtype),
            sinks: data.sinks.as_ref().map(|x| lab.upload(x)),
            q_positions: data.q_positions.as_ref().map(|x| lab.upload(x)),
            segments: data
                .segments
                .iter()
                .zip(&c.segments)
                .map(|(s, case)| {
                    let scales = [case.keys.upload(lab), case.values.upload(lab)];
                    (DevicePages::upload(lab, &s.pages), lab.upload(&s.keys), lab.upload(&s.values), scales)
                })
                .collect(),
            out: lab.poisoned(rows * c.value_dim * c.out_dtype.bytes()),
            lse: lab.poisoned(rows * 4),
            work: plan.work_list(&lab.device).expect("a work list"),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            data: data.clone(),
        }
    }

    /// Calls `f` with the arguments and what a launch needs besides.
    pub fn with_args<R>(&mut self, f: impl FnOnce(&AttendPlan, &mut AttendArgs<'_>, &mut WorkList, &mut Workspace) -> R) -> R {
        let c = &self.data.case;
        let segments: Vec<Segment<'_>> = self
            .segments
            .iter()
            .zip(&self.data.segments)
            .zip(&c.segments)
            .map(|(((rows, keys, values, scales), host), s)| Segment {
                rows: rows.rows(),
                keys: host.pages.pool(keys.view(), &s.keys, c.head_dim),
                values: host.pages.pool(values.view(), &s.values, c.value_dim),
                tables: Tables { keys: scales[0].as_ref().map(Buffer::view), values: scales[1].as_ref().map(Buffer::view) },
            })
            .collect();
        let mut args = AttendArgs {
            q: self.q.view(),
            q_strides: Some(c.strides(c.head_dim)),
            out: self.out.view_mut(),
            out_strides: Some(c.strides(c.value_dim)),
            lse: Some(self.lse.view_mut()),
            segments: &segments,
            q_positions: self.q_positions.as_ref().map(Buffer::view),
            sink_logits: self.sinks.as_ref().map(Buffer::view),
        };
        f(&self.plan, &mut args, &mut self.work, &mut self.workspace)
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
        let c = &self.data.case;
        let out = self.lab.download_as(&self.out, c.out_dtype);
        let back = AttendCase { q_heads: c.query_rows, query_rows: c.q_heads, ..c.clone() };
        let out = if c.rows_first { transpose(&out, &back, c.value_dim) } else { out };
        Attended { out, lse: self.lab.download(&self.lse) }
    }

    /// What kernels reported.
    pub fn status(&self) -> Status {
        self.workspace.status(&self.lab.stream).expect("a status")
    }

    /// Makes the outputs NaN again.
    pub fn poison(&mut self) {
        for buffer in [&mut self.out, &mut self.lse] {
            let all = 0..buffer.len();
            self.lab.stream.fill(buffer, all, 0xff).expect("a fill");
        }
    }

    /// The counters of arrived splits.
    pub fn counters(&self) -> Vec<u32> {
        self.lab.counters(&self.workspace, self.plan.workspace())
    }

    /// Replaces the lengths of a segment on the device.
    pub fn set_lengths(&mut self, segment: usize, lengths: &[i32]) {
        let bytes = bytemuck::cast_slice(lengths);
        self.lab.stream.upload(&mut self.segments[segment].0.lengths, 0, bytes).expect("upload");
    }
}
