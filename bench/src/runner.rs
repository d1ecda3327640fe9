//! Runs cases under criterion.

use crate::report::{Measurement, Report, size};
use crate::{Case, Launches, Op, Rig};
use criterion::{Criterion, SamplingMode, Throughput};
use kvlar::Graph;
use std::cell::RefCell;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// The buffer sets of a case take at least this many times the L2 together.
const L2_TIMES: usize = 4;
/// Fewer launches in a graph would time the gap between replays.
const MIN_LAUNCHES: usize = 20;

/// How a case's launches are spread over buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rotation {
    sets: usize,
    rounds: usize,
    cold: bool,
}

impl Rotation {
    /// `None` where one set alone is more than the budget.
    fn of(case: &dyn Case, l2: usize, budget: usize, min_launches: usize) -> Option<Self> {
        let bytes = case.bytes().max(1);
        let wanted = (L2_TIMES * l2 / bytes + 1).max(3).min(case.max_sets());
        let sets = wanted.min(budget / case.set_bytes().max(1));
        if sets == 0 {
            return None;
        }
        Some(Self { sets, rounds: min_launches.div_ceil(sets), cold: sets * bytes > 2 * l2 && case.max_sets() > 1 })
    }
}

/// A captured graph of launches, and the buffers it uses.
struct Replay {
    graph: Graph,
    launches: usize,
    // Declared last: the graph goes first.
    buffers: Box<dyn Launches>,
}

impl Replay {
    fn capture(rig: &Rig, case: &dyn Case, rotation: Rotation) -> kvlar::Result<Self> {
        let mut buffers = case.prepare(rig, rotation.sets)?;
        let graph = rig.stream.capture(|stream| {
            for set in (0..rotation.rounds).flat_map(|_| 0..rotation.sets) {
                buffers.launch(stream, set)?;
            }
            Ok(())
        })?;
        let replay = Self { graph, launches: rotation.sets * rotation.rounds, buffers };
        replay.run(rig, 1)?;
        rig.stream.synchronize()?;
        replay.buffers.check(rig);
        Ok(replay)
    }

    fn run(&self, rig: &Rig, times: u64) -> kvlar::Result<()> {
        for _ in 0..times {
            // SAFETY: the buffers that were captured live in `self`, and nothing but this stream uses them.
            unsafe { self.graph.launch(&rig.stream)? };
        }
        Ok(())
    }
}

/// How long a case is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pace {
    samples: usize,
    warm_up: Duration,
    measurement: Duration,
}

impl Pace {
    /// Of a case on a GPU.
    const FULL: Self = Self { samples: 30, warm_up: Duration::from_millis(500), measurement: Duration::from_secs(1) };
    /// Emulated: only to see it run.
    const EMULATED: Self = Self { samples: 10, warm_up: Duration::from_millis(50), measurement: Duration::from_secs(1) };

    /// Where all cases of an op together have a limit. The other half of a case's part is for its buffers.
    fn within(limit: Duration, cases: usize) -> Self {
        let part = limit / cases.max(1) as u32 / 2;
        if part >= Self::FULL.warm_up + Self::FULL.measurement {
            return Self::FULL;
        }
        let part = part.max(Duration::from_millis(60));
        Self { samples: if part.as_millis() < 500 { 10 } else { 20 }, warm_up: part / 4, measurement: part * 3 / 4 }
    }
}

/// Times the cases of ops, in this process, and reports. With a limit, an op samples less, and leaves out what is still to
/// come when its time is over.
pub(crate) fn run_ops(ops: &[&Op], limit: Option<Duration>) {
    let Some(rig) = Rig::open() else { return };
    let base = Criterion::default().without_plots();
    let base = if rig.is_emulated() || limit.is_some() { base.nresamples(2000) } else { base };
    let pace = if rig.is_emulated() { Pace::EMULATED } else { Pace::FULL };
    let base = base.sample_size(pace.samples).warm_up_time(pace.warm_up).measurement_time(pace.measurement);
    let mut criterion = base.configure_from_args();
    // Emulated, or in criterion's test mode, a time means nothing.
    let given = |argument: &str| std::env::args().any(|a| a == argument);
    let timed = !rig.is_emulated() && given("--bench") && !given("--test") && !given("--list");
    for op in ops {
        run_op(&rig, &mut criterion, op, timed, limit);
    }
    criterion.final_summary();
}

fn run_op(rig: &Rig, criterion: &mut Criterion, op: &Op, timed: bool, limit: Option<Duration>) {
    rig.restart();
    let start = Instant::now();
    let mut report = Report::new(op.name, rig, timed);
    let cases = (op.cases)(rig);
    let mut names = HashSet::new();
    assert!(cases.iter().all(|case| names.insert(case.name())), "{}: two cases have one name", op.name);
    let cases: Vec<_> = cases.into_iter().filter(|case| !report.has(&case.name())).collect();
    let pace = limit.filter(|_| timed).map(|limit| Pace::within(limit, cases.len()));
    let (mut left, mut filtered) = (0, 0);
    for (i, case) in cases.iter().enumerate() {
        if limit.is_some_and(|limit| start.elapsed() > limit) {
            left = cases.len() - i;
            break;
        }
        if !run_case(rig, criterion, &mut report, op.name, &**case, pace) {
            filtered += 1;
        }
    }
    report.finish(left, filtered);
}

/// Whether it was asked for.
fn run_case(
    rig: &Rig,
    criterion: &mut Criterion,
    report: &mut Report<'_>,
    op: &str,
    case: &dyn Case,
    pace: Option<Pace>,
) -> bool {
    let (budget, min_launches) = (rig.budget(), if rig.is_emulated() { 1 } else { MIN_LAUNCHES });
    let Some(rotation) = Rotation::of(case, rig.l2_bytes(), budget, min_launches) else {
        report.skip(&case.name(), &format!("needs {}, may take {}", size(case.set_bytes()), size(budget)));
        return true;
    };
    // Prepared when criterion first asks, so that a filter saves the memory and the time of what it leaves out.
    let mut replay: Option<Replay> = None;
    let samples: RefCell<Vec<(u64, Duration)>> = RefCell::default();
    let mut group = criterion.benchmark_group(op);
    if let Some(pace) = pace {
        group.sample_size(pace.samples).warm_up_time(pace.warm_up).measurement_time(pace.measurement);
    }
    if !rig.is_emulated() {
        group.throughput(Throughput::Bytes(case.bytes() as u64));
    }
    let emulated = if rig.is_emulated() { " (emulated, not a speed)" } else { "" };
    group.sampling_mode(SamplingMode::Flat).bench_function(format!("{}{emulated}", case.name()), |bencher| {
        let replay = replay.get_or_insert_with(|| {
            report.begin(&case.name());
            Replay::capture(rig, case, rotation).expect("a case that runs")
        });
        bencher.iter_custom(|replays| {
            let total = rig.time(|| replay.run(rig, replays)).expect("replays");
            samples.borrow_mut().push((replays, total));
            // Criterion counts iterations: one is a launch, on average.
            total.div_f64(replay.launches as f64)
        });
    });
    group.finish();
    let Some(replay) = replay else { return false };
    let samples = samples.into_inner();
    // Flat sampling repeats one count of iterations; warm-up comes before, with other counts.
    let last = samples.last().map_or(1, |s| s.0);
    let measured = samples.iter().rev().take_while(|s| s.0 == last);
    report.add(Measurement {
        name: case.name(),
        parameters: case.parameters(),
        bytes: case.bytes(),
        operations: case.operations(),
        sets: rotation.sets,
        launches_a_replay: replay.launches,
        cold: rotation.cold,
        seconds: measured.map(|(n, t)| t.as_secs_f64() / (*n as f64 * replay.launches as f64)).collect(),
    });
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    struct Sized(usize);

    impl Case for Sized {
        fn name(&self) -> String {
            String::new()
        }
        fn parameters(&self) -> Value {
            Value::Null
        }
        fn bytes(&self) -> usize {
            self.0
        }
        fn prepare(&self, _: &Rig, _: usize) -> kvlar::Result<Box<dyn Launches>> {
            unreachable!("only its size is asked for")
        }
    }

    #[test]
    fn a_limit_is_divided_among_cases() {
        let seconds = Duration::from_secs;
        assert_eq!(Pace::within(seconds(300), 100), Pace::FULL);
        let short = Pace::within(seconds(40), 100);
        assert_eq!((short.samples, short.warm_up + short.measurement), (10, Duration::from_millis(200)));
        assert!(Pace::within(seconds(1), 1000).measurement > Duration::ZERO && Pace::within(seconds(1), 0) != Pace::FULL);
    }

    #[test]
    fn rotations_exceed_the_cache_or_say_that_they_do_not() {
        let of = |bytes| Rotation::of(&Sized(bytes), 60, 4000, 20);
        assert_eq!(of(100), Some(Rotation { sets: 3, rounds: 7, cold: true }));
        assert_eq!(of(1), Some(Rotation { sets: 241, rounds: 1, cold: true }));
        assert_eq!(of(4000), Some(Rotation { sets: 1, rounds: 20, cold: true }));
        assert_eq!(of(4001), None);
        let tiny = Rotation::of(&Sized(1), 60_000, 4_000_000, 20).expect("room");
        assert!(tiny.sets == 1024 && !tiny.cold);
    }
}
