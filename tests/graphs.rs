//! Captured launches replay with whatever the memory then holds.

use kvlar::{Dtype, Error, Schedule};
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, compare};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(a_replay_follows_the_lengths, capture_runs_nothing, nested_capture_is_an_error);

/// Two lengths of one case: data of the longer, expectations of both.
fn cases(schedule: Schedule) -> (AttendCase, AttendCase) {
    let long = AttendCase::new(Dtype::Bf16, (4, 2), 64, &[300, 77, 5]).with(|c| {
        c.schedule = schedule;
        c.segments[0].layout = kvlar_tests::pages::Layout::Contiguous;
    });
    let short = long.clone().with(|c| c.segments[0].lengths = vec![33, 0, 4]);
    (long, short)
}

fn a_replay_follows_the_lengths(lab: &Lab) {
    for schedule in [Schedule::Balanced, Schedule::Own] {
        let (long, short) = cases(schedule);
        let data = AttendData::new(&long);
        let mut run = AttendRun::new(lab, &data);
        let stream = &lab.stream;
        let graph = run.with_args(|plan, args, work, workspace| {
            stream.capture(|stream| {
                plan.schedule(stream, args, work, workspace)?;
                plan.launch(stream, args, work, workspace)
            })
        });
        let graph = graph.expect("a graph");
        for (case, lengths) in [(&long, [300, 77, 5]), (&short, [33, 0, 4]), (&long, [300, 77, 5])] {
            run.set_lengths(0, &lengths);
            // SAFETY: everything that was captured lives in `run`.
            unsafe { graph.launch(stream) }.expect("a replay");
            stream.synchronize().expect("a result");
            let mut expected = data.clone();
            expected.shorten(&case.segments[0].lengths);
            compare(&expected, &run.result(), case).unwrap_or_else(|e| panic!("{e}"));
            assert!(run.status().is_clean());
        }
    }
}

fn capture_runs_nothing(lab: &Lab) {
    let (long, _) = cases(Schedule::Balanced);
    let mut run = AttendRun::new(lab, &AttendData::new(&long));
    let graph = run.with_args(|plan, args, work, workspace| {
        lab.stream.capture(|stream| {
            plan.schedule(stream, args, work, workspace)?;
            plan.launch(stream, args, work, workspace)
        })
    });
    assert!(graph.is_ok());
    assert!(run.result().out.iter().all(|x| x.is_nan()), "the output was written during capture");
}

fn nested_capture_is_an_error(lab: &Lab) {
    let result = lab.stream.capture(|stream| stream.capture(|_| Ok(())).map(|_| ()));
    assert!(matches!(result, Err(Error::Capture(_) | Error::Cuda { .. })), "{result:?}");
    // The stream works again.
    lab.stream.capture(|_| Ok(())).expect("an empty graph");
}
