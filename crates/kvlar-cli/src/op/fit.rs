//! group_heads, fit_lowrank, fit_values, budget_ranks: fitting runs on the CPU, whatever the backend.

use super::case::{Case, Floats, Output, expect};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar_calibrate::basis::{GroupBasis, Metric, covariance, eigen, leading, tail, tail_energy};
use kvlar_calibrate::faer::{Mat, MatRef};
use kvlar_calibrate::grouping::{self, check_partition, check_size};
use kvlar_calibrate::{Error, Grouping, PairLayout, RopePairs, SecondMoment, budget, ovc, similarity};
use kvlar_reference::Dtype;

impl From<Error> for OpError {
    fn from(e: Error) -> Self {
        match e {
            Error::Numerical(_) | Error::File { .. } => Self::Other(e.to_string()),
            _ => Self::Input(e.to_string()),
        }
    }
}

/// `dtype`: what inputs are rounded to. Nothing is stored here, so they are taken as they are unless it is given.
fn dtype(case: &mut Case) -> Result<Dtype> {
    case.choice("dtype", &[("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("f16", Dtype::F16)])
}

/// Rows of a tensor that fitting can take: some, and finite.
fn rows(name: &str, t: &Floats, dtype: Dtype) -> Result<Vec<f32>> {
    if t.shape.contains(&0) {
        return input(format!("{name} is {:?}: there is nothing to fit to", t.shape));
    }
    let width: usize = t.shape[1..].iter().product();
    let values = dtype.round_all(&t.values);
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => input(format!("{name}: row {} holds {}; inputs must be finite", at / width, values[at])),
        None => Ok(values),
    }
}

fn required(case: &mut Case, key: &str) -> Result<usize> {
    match case.text(key) {
        None => input(format!("no key {key}")),
        Some(text) => text.trim().parse().or_else(|_| input(format!("{key}: {text:?} is not a whole number"))),
    }
}

fn narrow(m: MatRef<'_, f64>) -> Vec<f32> {
    m.row_iter().flat_map(|r| r.iter().map(|x| *x as f32).collect::<Vec<_>>()).collect()
}

pub fn group_heads(case: &mut Case, _: Backend) -> Result<Output> {
    let k = case.floats("k", 3)?;
    let (heads, d) = (k.shape[1], k.shape[2]);
    let size = required(case, "size")?;
    let method = case.choice("method", &[("best", Grouping::Best), ("greedy", Grouping::Greedy)])?;
    let rank: usize = case.scalar("rank", (size.saturating_mul(d) / 2).max(1))?;
    let dtype = dtype(case)?;
    case.finish()?;
    check_size(heads, size)?;
    within("rank", rank, size * d)?;
    let moment = SecondMoment::of("k", &rows("k", &k, dtype)?, heads, d)?;
    let cka = similarity::cka(&moment);
    let cost = |group: &[usize]| tail_energy(&moment, group, None, false, rank);
    let groups = grouping::group(method, &cka, heads, size, 1, &cost)?;
    let flat: Vec<i32> = groups.iter().flatten().map(|h| *h as i32).collect();
    let cka: Vec<f32> = cka.iter().map(|x| *x as f32).collect();
    Ok(Output::default().floats("similarity", &[heads, heads], &cka).ints("groups", &[heads / size, size], &flat))
}

fn within(key: &str, rank: usize, full: usize) -> Result<()> {
    if rank == 0 || rank > full { input(format!("{key}: {rank} is outside 1..={full}")) } else { Ok(()) }
}

#[derive(Clone, Copy)]
enum Weighting {
    None,
    Query,
    Output,
}

pub fn fit_lowrank(case: &mut Case, _: Backend) -> Result<Output> {
    let k = case.floats("k", 3)?;
    let [n, heads, d] = k.shape[..] else { return input("k") };
    let (shape, groups) = case.ints_of("groups", 2)?;
    let rank = required(case, "rank")?;
    let weighting =
        case.choice("weighting", &[("none", Weighting::None), ("query", Weighting::Query), ("output", Weighting::Output)])?;
    let dtype = dtype(case)?;
    let q = if matches!(weighting, Weighting::Query) { Some(case.floats("q", 3)?) } else { None };
    let wo = if matches!(weighting, Weighting::Output) { Some(case.floats("wo", 2)?) } else { None };
    case.finish()?;
    let k = rows("k", &k, dtype)?;
    let size = shape[1];
    let head = |h: &i32| usize::try_from(*h).or_else(|_| input(format!("groups: {h} is not a kv head")));
    let groups = groups.iter().map(head).collect::<Result<Vec<usize>>>()?;
    let groups: Vec<Vec<usize>> = groups.chunks(size.max(1)).map(<[usize]>::to_vec).collect();
    check_partition(&groups, heads)?;
    within("rank", rank, size * d)?;
    let metric = match (q, wo) {
        (Some(q), _) => Some(query_metric(&q, n, heads, d, dtype)?),
        (_, Some(wo)) => {
            let per_head = heads * d;
            if wo.shape[1] == 0 || !wo.shape[1].is_multiple_of(per_head) {
                return input(format!("wo is {:?}; its columns must be Hq x {d}, Hq a multiple of {heads}", wo.shape));
            }
            Some(Metric::output(&rows("wo", &wo, dtype)?, wo.shape[0], wo.shape[1] / d, heads, d)?)
        }
        _ => None,
    };
    let moment = SecondMoment::of("k", &k, heads, d)?;
    let mut uk = vec![0.0f32; heads * d * rank];
    let (mut encoder, mut error) = (Vec::new(), Vec::new());
    for group in &groups {
        let spectrum = eigen(covariance(&moment, group, metric.as_ref(), false).as_ref())?;
        let basis = GroupBasis::new(leading(&spectrum, rank), group, metric.as_ref());
        let decode = narrow(basis.decode.as_ref());
        for (h, rows) in group.iter().zip(decode.chunks_exact(d * rank)) {
            uk[h * d * rank..(h + 1) * d * rank].copy_from_slice(rows);
        }
        encoder.extend(narrow(basis.encode.as_ref()));
        error.push(tail(&spectrum.values, rank) as f32);
    }
    let count = groups.len();
    Ok(Output::default().floats("uk", &[heads, d, rank], &uk).floats("encoder", &[count, rank, size * d], &encoder).floats(
        "error",
        &[count],
        &error,
    ))
}

fn query_metric(q: &Floats, n: usize, heads: usize, d: usize, dtype: Dtype) -> Result<Metric> {
    let q_heads = q.shape[1];
    expect("q", &q.shape, &[n, q_heads, d])?;
    if !q_heads.is_multiple_of(heads) || !d.is_multiple_of(2) {
        return input(format!("q is {:?}; Hq must be a multiple of {heads}, and d even for rotary pairs", q.shape));
    }
    let mut power = vec![0.0f64; q_heads * d];
    for row in rows("q", q, dtype)?.chunks_exact(q_heads * d) {
        power.iter_mut().zip(row).for_each(|(p, x)| *p += f64::from(*x).powi(2) / n as f64);
    }
    Ok(Metric::query(&power, q_heads, heads, d, RopePairs { rotary_dim: d, layout: PairLayout::Half })?)
}

pub fn fit_values(case: &mut Case, _: Backend) -> Result<Output> {
    let (w, x) = (case.floats("w", 2)?, case.floats("x", 2)?);
    let rank = required(case, "rank")?;
    let rounds: usize = case.scalar("rounds", 1)?;
    let dtype = dtype(case)?;
    case.finish()?;
    expect("x", &x.shape, &[x.shape[0], w.shape[1]])?;
    let wide = |name: &str, t: &Floats| -> Result<Mat<f64>> {
        let (values, columns) = (rows(name, t, dtype)?, t.shape[1]);
        Ok(Mat::from_fn(t.shape[0], columns, |r, c| f64::from(values[r * columns + c])))
    };
    let f = ovc::factorize(wide("w", &w)?.as_ref(), wide("x", &x)?.as_ref(), rank, rounds)?;
    Ok(Output::default()
        .floats("left", &[w.shape[0], rank], &narrow(f.left.as_ref()))
        .floats("right", &[rank, w.shape[1]], &narrow(f.right.as_ref()))
        .floats("error", &[], &[f.error as f32]))
}

pub fn budget_ranks(case: &mut Case, _: Backend) -> Result<Output> {
    let importance = case.floats("importance", 1)?;
    let (shape, full) = case.ints_of("full", 1)?;
    expect("full", &shape, &importance.shape)?;
    let Some(keep) = case.text("keep") else { return input("no key keep") };
    let keep: f64 = keep.trim().parse().or_else(|_| input(format!("keep: {keep:?} is not a number")))?;
    let multiple: usize = case.scalar("multiple", 32)?;
    dtype(case)?;
    case.finish()?;
    let importance: Vec<f64> = importance.values.iter().map(|x| f64::from(*x)).collect();
    let full = full.iter().map(|f| usize::try_from(*f).or_else(|_| input(format!("full: {f} is not a rank"))));
    let full = full.collect::<Result<Vec<usize>>>()?;
    if full.is_empty() {
        return input("importance is empty: there is nothing to deal out");
    }
    let ranks = budget::budget_ranks(&importance, &full, keep, multiple)?;
    let ranks: Vec<i32> = ranks.iter().map(|r| *r as i32).collect();
    Ok(Output::default().ints("ranks", &shape, &ranks))
}
