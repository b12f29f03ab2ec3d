//! How Ovenbird's cost grows with files, layers, steps and bytes: the exponent of time, and what memory does.

use std::fmt::Write as _;

use ovenbird_testing::registry::{Options, Registry};
use serde::{Deserialize, Serialize};

use super::Bench;
use super::case;
use super::input::Input;
use super::measure::{Sample, median};
use super::peer::{Job, Peer};

/// One kind of growth.
pub(super) struct Growth {
    /// Name on the command line.
    pub(super) name: &'static str,
    /// Context at a factor.
    prepare: fn(&Bench, usize) -> Result<Input, String>,
    /// Names and samples of one turn.
    run: fn(&Input, &mut Peer) -> Result<case::Samples, String>,
    /// Turns at each factor.
    turns: usize,
}

/// All of them.
pub(super) const GROWTHS: &[Growth] = &[
    Growth {
        name: "growth-files",
        prepare: |bench, factor| case::many_files(bench, bench.sized(20_000) * factor as u64),
        run: first_and_again,
        turns: 1,
    },
    Growth { name: "growth-layers", prepare: layers, run: first_and_again, turns: 3 },
    Growth { name: "growth-steps", prepare: |bench, factor| case::run_steps(bench, 20 * factor), run: without_cache, turns: 3 },
    Growth {
        name: "growth-bytes",
        prepare: |bench, factor| case::large_files(bench, bench.sized(128) * factor as u64),
        run: pushed,
        turns: 1,
    },
];

/// Results at one factor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Point {
    /// Times the smallest input.
    pub(super) factor: usize,
    /// Median.
    pub(super) seconds: f64,
    /// Largest.
    pub(super) memory: u64,
}

/// Results at all factors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Curve {
    /// `growth-files: first build`.
    pub(super) name: String,
    /// In order of factor.
    pub(super) points: Vec<Point>,
}

impl Curve {
    /// Exponent between the two largest factors: 1 is linear. Fixed costs hide growth at the small ones.
    pub(super) fn exponent(&self) -> Option<f64> {
        let [.., before, last] = &self.points[..] else { return None };
        Some((last.seconds / before.seconds).ln() / (last.factor as f64 / before.factor as f64).ln())
    }

    /// Memory at the largest by memory at the smallest factor.
    pub(super) fn memory_growth(&self) -> Option<f64> {
        let (first, last) = (self.points.first()?, self.points.last()?);
        Some(last.memory as f64 / first.memory as f64)
    }
}

impl Growth {
    /// Measures at every factor.
    pub(super) fn run(&self, bench: &Bench, own: &mut Peer, factors: &[usize]) -> Result<Vec<Curve>, String> {
        let mut curves: Vec<Curve> = vec![];
        for factor in factors {
            let input = (self.prepare)(bench, *factor)?;
            let mut samples: Vec<(&'static str, Vec<Sample>)> = vec![];
            for _ in 0..self.turns {
                input.warm()?;
                for (name, sample) in own.turn(&bench.state(), |own| (self.run)(&input, own))? {
                    match samples.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, list)) => list.push(sample),
                        None => samples.push((name, vec![sample])),
                    }
                }
            }
            for (name, list) in samples {
                let name = format!("{}: {name}", self.name);
                let seconds: Vec<f64> = list.iter().map(|sample| sample.seconds).collect();
                let memory = list.iter().map(|sample| sample.memory).max().unwrap_or(0);
                let point = Point { factor: *factor, seconds: median(&seconds), memory };
                println!("{name:32} x{factor:<4} {:8.3} s {:6} MB", point.seconds, point.memory / 1_000_000);
                match curves.iter_mut().find(|curve| curve.name == name) {
                    Some(curve) => curve.points.push(point),
                    None => curves.push(Curve { name, points: vec![point] }),
                }
            }
        }
        Ok(curves)
    }
}

/// A layer for each of 12 small files, times the factor.
fn layers(bench: &Bench, factor: usize) -> Result<Input, String> {
    let input = Input::new(bench, "layers")?;
    let count = 12 * factor;
    input.files("src", count as u64, 100..3000)?;
    let mut text = String::from("FROM scratch\n");
    for number in 0..count {
        let _ = writeln!(text, "COPY src/d{}/f{} /f{number}", number / 100, number % 100);
    }
    input.dockerfile(&text)?;
    Ok(input)
}

const LOCAL: &str = "bench.example/growth:latest";

fn first_and_again(input: &Input, own: &mut Peer) -> Result<case::Samples, String> {
    let job = Job { context: input.folder(), tag: LOCAL, cache: true, push: false, shared: None };
    Ok(vec![("first build", own.build(&job)?), ("unchanged", own.build(&job)?)])
}

fn without_cache(input: &Input, own: &mut Peer) -> Result<case::Samples, String> {
    let warm = input.folder().join("warm");
    own.build(&Job { context: &warm, tag: "bench.example/warm:latest", cache: true, push: false, shared: None })?;
    let job = Job { context: input.folder(), tag: LOCAL, cache: false, push: false, shared: None };
    Ok(vec![("no cache", own.build(&job)?), ("unchanged", own.build(&Job { cache: true, ..job })?)])
}

fn pushed(input: &Input, own: &mut Peer) -> Result<case::Samples, String> {
    let registry = Registry::start_with(Options::default()).map_err(|error| error.to_string())?;
    let tag = format!("{}/bench/growth:latest", registry.address());
    Ok(vec![("build and push", own.build(&Job { context: input.folder(), tag: &tag, cache: true, push: true, shared: None })?)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponent_is_that_of_the_last_two() {
        let point = |factor, seconds| Point { factor, seconds, memory: 100 };
        let curve = Curve { name: String::new(), points: vec![point(1, 5.0), point(4, 1.0), point(16, 16.0)] };
        assert!((curve.exponent().unwrap() - 2.0).abs() < 1e-9);
        assert!((curve.memory_growth().unwrap() - 1.0).abs() < 1e-9);
        assert!(Curve { name: String::new(), points: vec![point(1, 1.0)] }.exponent().is_none());
    }
}
