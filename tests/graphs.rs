//! Captured launches replay with whatever the memory then holds.

use kvlar::{Dtype, Error, Latents, Schedule};
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, compare};
use kvlar_tests::lowrank::{LowrankCase, LowrankSteps};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    a_replay_follows_the_lengths,
    a_replayed_lowrank_step_appends_and_follows_the_lengths,
    capture_runs_nothing,
    nested_capture_is_an_error,
    what_cannot_be_captured_is_refused
);

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
        // The shorter ones: work that is divided now, and not at a replay, does not reach the other rows.
        run.set_lengths(0, &[33, 0, 4]);
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
            compare(&expected, &run.result()).unwrap_or_else(|e| panic!("{e}"));
            assert!(run.status().is_clean());
        }
    }
}

/// append_lowrank, schedule and attend_lowrank, captured once: tokens, slots and lengths are what memory holds at a replay.
fn a_replayed_lowrank_step_appends_and_follows_the_lengths(lab: &Lab) {
    // Far longer from the first step to the second (with schedule = own, of two splits instead of one); then by one row each,
    // the second sequence not at all.
    for (schedule, latents, long) in [
        (Schedule::Balanced, Latents::Dtype, 200),
        (Schedule::Balanced, Latents::Int8, 131),
        (Schedule::Own, Latents::Dtype, 540),
    ] {
        let slots: [&[i32]; 3] = [&[32, 0, 4], &[long - 1, 76, 31], &[long, -1, 32]];
        let lengths = [long as usize + 1, 77, 33];
        let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (64, 32), &lengths).with(|c| c.schedule = schedule);
        let case = if latents == Latents::Dtype { case } else { case.int8(latents) };
        let mut steps = LowrankSteps::new(lab, &case, &slots);
        let stream = &lab.stream;
        // The shortest lengths: work that is divided now, and not at a replay, does not reach later rows.
        steps.prepare(0);
        let graph = stream.capture(|stream| steps.enqueue(stream)).expect("a graph");
        assert!(steps.result().out.iter().all(|x| x.is_nan()), "the output was written during capture");
        for step in 0..steps.count() {
            steps.prepare(step);
            // SAFETY: everything that was captured lives in `steps`.
            unsafe { graph.launch(stream) }.expect("a replay");
            stream.synchronize().expect("a result");
            steps.check(step).unwrap_or_else(|e| panic!("{e}"));
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

/// Whatever is refused, the capture goes on, and holds the rest.
fn what_cannot_be_captured_is_refused(lab: &Lab) {
    let (mut a, mut b, mut there) = (lab.upload(&[1u8; 8]), lab.upload(&[2u8; 8]), [0u8; 8]);
    let graph = lab.stream.capture(|stream| {
        let refused = [
            stream.upload(&mut a, 0, &[3; 8]),
            stream.download(&a, 0, &mut there),
            stream.fill(&mut a, 0..8, 4),
            stream.synchronize(),
            stream.capture(|_| Ok(())).map(|_| ()),
        ];
        assert!(refused.iter().all(|r| matches!(r, Err(Error::Capture(_)))), "{refused:?}");
        stream.copy(&a, 0..8, &mut b, 0)
    });
    let graph = graph.expect("a graph");
    assert_eq!((lab.download::<u8>(&a), lab.download::<u8>(&b)), (vec![1; 8], vec![2; 8]));
    // SAFETY: the buffers live here.
    unsafe { graph.launch(&lab.stream) }.expect("a replay");
    assert_eq!(lab.download::<u8>(&b), [1; 8]);
}
